"""Write shards anew with a teacher's soft labels of many crops: python tools/make_soft_labels.py --help, or under deepspeed"""

import sys

import fire
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsquant.errors import DsquantError
from dsquant.preemption import EXIT_STOPPED, Stopped, StopRequest, leave_together

STOP = StopRequest()


def bar(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=disable)


def make(
    shards: str,
    out: str,
    model: str | None = None,
    library: str = "timm",
    run: str | None = None,
    stage: str | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    num_classes: int | None = None,
    model_kwargs: dict | None = None,
    image_size: int | None = None,
    precision: str = "fp32",
    batch_size: int = 256,
    num_threads: int = 8,
    local_rank: int = 0,
    **settings,
) -> None:
    """Have a teacher look at crops of every image, and write the shards anew with its top-k probabilities of each crop.

    Started again, it goes on after the last whole shard. SIGUSR1 or SIGTERM to any rank stops all, with exit code 75.

    Args:
        shards: folder, glob or brace pattern of WebDataset shards.
        out: folder of the new shards.
        model: timm name of the teacher, with --pretrained or --checkpoint FILE; or with --library transformers an image
            classifier of the hub or a local folder; or give --run.
        library: of --model: timm or transformers.
        run: folder of a run that is to teach.
        stage: stage of the run (default: the newest).
        pretrained: take timm's own weights.
        checkpoint: float state dict of --model.
        num_classes: classes of --model, where they are not those of its pretrained weights.
        model_kwargs: more arguments of timm.create_model, as a dict.
        image_size: of the crops that the teacher sees (default: the teacher's).
        precision: fp32 or bf16, of the teacher.
        batch_size: crops that the teacher sees at a time.
        num_threads: threads of a rank that cut crops.
        local_rank: set by the launcher; ignored, the environment says it.
        settings: --crops=500 of each image, --top_k=5 classes stored, --dtype=float16 or float32,
            --scale=0.08,1.0 and --ratio=0.75,1.3333 of RandomResizedCrop, --temperature=1, --seed=0.
    """
    from dsquant.data import ShardSet
    from dsquant.engine import init_world
    from dsquant.soft_labels import SoftLabelWriter, make_settings, open_teacher, sizes

    del local_rank
    world = init_world()
    world.use_threads(None)
    teacher = open_teacher(
        world, model=None if model is None else str(model), library=library, pretrained=pretrained,
        checkpoint=checkpoint, num_classes=num_classes, model_kwargs=model_kwargs, run=run, stage=stage,
        image_size=image_size, precision=precision,
    )  # fmt: skip
    chosen = make_settings(teacher, settings)
    writer = SoftLabelWriter(
        ShardSet.open(shards), out, teacher, chosen, world, batch_size=batch_size, num_threads=num_threads, stop=STOP
    )
    with bar(disable=world.rank != 0) as progress:
        task = progress.add_task("images", total=None)
        found = writer.write(lambda done, total: progress.update(task, completed=done, total=total))
    if world.rank == 0:
        size = sizes(chosen)
        print(f"{found.total} images in {len(found)} shards under {out}, {chosen.crops} crops each")
        print(
            f"soft labels: {size['member']} bytes an image, {size['tar']} in the tar; "
            f"for the 1281167 images of ImageNet-1k {size['imagenet'] / 1e9:.1f} GB"
        )


if __name__ == "__main__":
    STOP.listen()
    try:
        fire.Fire(make, name="make_soft_labels.py")
    except Stopped as stopped:
        leave_together()
        print(f"dsquant: {stopped}; started again it goes on from there", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except DsquantError as error:
        sys.exit(f"dsquant: {error}")
