"""The soft-label tool as a user runs it: what it writes is what the teacher says, whatever the ranks and interruptions."""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file
from torchvision.transforms import functional

from dsquant.config import ModelConfig, parse_config
from dsquant.data import ShardSet, write_shards
from dsquant.data.reading import read_shard
from dsquant.data.shards import PENDING_INDEX
from dsquant.engine import World, init_world
from dsquant.errors import ConfigError, DataError
from dsquant.models import build_model
from dsquant.preemption import Stopped, StopRequest
from dsquant.run_data import images_per_batch
from dsquant.soft_labels import SoftLabelWriter, make_settings, open_teacher
from tests.integration.runs import REPO, TINY, free_port, losses, records, run, run_forked, train_command

NAME, CLASSES, SIZE, CROPS = "vit_tiny_patch16_224", 10, 16, 6
KWARGS = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
TEACHER = ModelConfig(name=NAME, num_classes=CLASSES, kwargs=KWARGS)
MEAN, STD = 0.5, 0.5  # what timm says of this model's weights


def jpeg(number):
    """Make a small colour picture of gradients, no two alike and none square."""
    x, y = torch.meshgrid(torch.linspace(0, 1, 30 + number), torch.linspace(0, 1, 40), indexing="ij")
    channels = [(255 * (0.5 + 0.5 * torch.sin((number + c) * x + (2 + c) * y))).to(torch.uint8) for c in range(3)]
    content = io.BytesIO()
    Image.fromarray(torch.stack(channels, dim=-1).numpy()).save(content, format="JPEG")
    return content.getvalue()


def command(*options, ranks=None):
    """Give the tool's command: through the deepspeed launcher, or as one process with ranks=None."""
    start = [sys.executable]
    if ranks:
        launcher = Path(sys.executable).with_name("deepspeed")
        start = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*start, str(REPO / "tools" / "make_soft_labels.py"), *map(str, options)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with shards, a teacher, its `options`, and the shards labelled as one process (`alone`)."""
    folder = tmp_path_factory.mktemp("made")
    samples = [(f"picture{number:02d}", {"jpg": jpeg(number), "cls": str(number % CLASSES).encode()})
               for number in range(11)]  # fmt: skip
    write_shards(samples, folder / "plain", "train", 4)
    (folder / "plain" / "classes.txt").write_text("".join(f"{c}\n" for c in "abcdefghij"))
    torch.manual_seed(0)
    model = build_model(TEACHER)
    torch.nn.init.normal_(model.head.weight)  # timm's is nearly zero: all classes would be as likely
    save_file(model.state_dict(), folder / "teacher.safetensors")
    ended = run_forked(command(*options(folder, "alone")), folder / "alone.log").ok()
    return folder, ended.output


def options(folder, out, **changed):
    chosen = {
        "shards": folder / "plain", "out": folder / out, "model": NAME, "checkpoint": folder / "teacher.safetensors",
        "num_classes": CLASSES, "model_kwargs": json.dumps(KWARGS), "crops": CROPS, "batch_size": 13,
    } | changed  # fmt: skip
    return [f"--{key}={value}" for key, value in chosen.items()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def labelled(folder):
    shards = ShardSet.open(folder)
    return [record for url, count in zip(shards.urls, shards.counts, strict=True) for record in read_shard(url, count)]


def test_soft_labels_are_what_the_teacher_says_of_the_stored_crops(made):
    folder, _ = made
    model = build_model(TEACHER.model_copy(update={"checkpoint": str(folder / "teacher.safetensors")})).eval()
    records = labelled(folder / "alone")
    assert len(records) == 11
    for record in records:
        soft = load(bytes(record["soft.safetensors"]))
        image = Image.open(io.BytesIO(record["jpg"]))
        shares = soft["crops"].double() * torch.tensor([image.height, image.width] * 2)
        rows = []
        for (top, left, height, width), flip in zip(shares.round().int().tolist(), soft["flips"].tolist(), strict=True):
            height, width = min(height, image.height - top), min(width, image.width - left)
            crop = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
            rows.append((functional.to_tensor(crop) - MEAN) / STD)
        with torch.no_grad():
            expected = model(torch.stack(rows)).softmax(-1)
        told = soft["probabilities"].float()
        assert told.shape == (CROPS, 5)
        torch.testing.assert_close(told, expected.gather(1, soft["indices"].long()), rtol=2**-10, atol=1e-6)
        torch.testing.assert_close(told, expected.sort(dim=1, descending=True).values[:, :5], rtol=2**-10, atol=1e-6)
    assert told.std() > 0.05  # the teacher does tell classes apart


def test_all_else_of_the_samples_is_kept_and_the_set_is_one(made):
    folder, _ = made
    before, after = labelled(folder / "plain"), labelled(folder / "alone")
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in new.items() if k not in ("soft.safetensors", "__url__")} == {
            k: v for k, v in old.items() if k != "__url__"
        }
    names = {"train-0000.tar", "train-0001.tar", "train-0002.tar", "index.json", "soft_labels.json", "classes.txt"}
    assert contents(folder / "alone").keys() == names
    index = json.loads((folder / "alone" / "index.json").read_text())["shardlist"]
    assert [entry["nsamples"] for entry in index] == [4, 4, 3]


def test_the_settings_and_the_size_are_told(made):
    folder, output = made
    settings = json.loads((folder / "alone" / "soft_labels.json").read_text())
    told = {key: settings[key] for key in ("crops", "top_k", "dtype", "scale", "temperature", "seed", "num_classes")}
    assert told == {"crops": 6, "top_k": 5, "dtype": "float16", "scale": [0.08, 1.0], "temperature": 1.0, "seed": 0,
                    "num_classes": CLASSES}  # fmt: skip
    assert settings["view"]["image_size"] == SIZE
    size = len(labelled(folder / "alone")[0]["soft.safetensors"])
    tar = 512 + -(-size // 512) * 512
    assert f"{size} bytes an image, {tar} in the tar" in output
    assert f"ImageNet-1k {tar * 1281167 / 1e9:.1f} GB" in output


def test_two_ranks_write_what_one_writes(made):
    folder, _ = made
    run(command(*options(folder, "two"), ranks=2), folder / "two.log").ok()
    assert contents(folder / "two") == contents(folder / "alone")


def test_an_interrupted_set_is_refused_and_goes_on_to_the_same_bytes(made):
    folder, _ = made
    out = folder / "interrupted"
    shutil.copytree(folder / "alone", out)
    (out / "train-0001.tar").unlink()
    (out / "index.json").rename(out / PENDING_INDEX)
    (out / ".train-0001.tar.partial").write_bytes(b"half a shard")
    kept = (out / "train-0000.tar").stat().st_mtime_ns
    with pytest.raises(DataError, match="half-written; run the tool that writes it again"):
        ShardSet.open(out)
    run_forked(command(*options(folder, "interrupted")), folder / "interrupted.log").ok()
    assert contents(out) == contents(folder / "alone")
    assert (out / "train-0000.tar").stat().st_mtime_ns == kept


def stop_while_labelling(shards, out, checkpoint):
    """Label on all ranks, of which rank 1 is signalled after its first images; return the files that this leaves."""
    world, stop = init_world(), StopRequest()
    stop.listen()
    teacher = open_teacher(world, model=NAME, checkpoint=checkpoint, num_classes=CLASSES, model_kwargs=KWARGS)
    settings = make_settings(teacher, {"crops": CROPS})
    writer = SoftLabelWriter(ShardSet.open(shards), out, teacher, settings, world, batch_size=13, stop=stop)
    with pytest.raises(Stopped, match="stopped in soft labels, after"):
        writer.write(lambda done, total: os.kill(os.getpid(), signal.SIGUSR1) if world.rank == 1 else None)
    return {path.name for path in out.iterdir()}


def test_a_signal_to_one_rank_stops_all_and_the_set_goes_on_to_the_same_bytes(made, run_ranks):
    folder, _ = made
    out = folder / "stopped"
    target, checkpoint = "tests.test_soft_labels_tool:stop_while_labelling", str(folder / "teacher.safetensors")
    left, _ = run_ranks(2, target, shards=str(folder / "plain"), out=out, checkpoint=checkpoint)
    assert "train-0001.tar" not in left  # rank 1's
    assert PENDING_INDEX in left
    assert not [name for name in left if name.endswith(".tar.partial")]
    run_forked(command(*options(folder, "stopped")), folder / "stopped.log").ok()
    assert contents(out) == contents(folder / "alone")


@pytest.mark.parametrize(
    ("out", "changed", "words"),
    [
        ("alone", {"crops": 5}, "were made with crops 6, not 5"),
        ("new", {"top_k": 11}, "top_k is 11; the teacher has 10 classes"),
    ],
)
def test_what_cannot_be_done_is_one_clear_message_and_changes_nothing(made, out, changed, words):
    folder, _ = made
    before = contents(folder / "alone")
    ended = run_forked(command(*options(folder, out, **changed)), folder / "refused.log")
    assert ended.code == 1
    assert words in ended.output
    assert "Traceback" not in ended.output
    assert contents(folder / "alone") == before
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({}, "either --model NAME (of timm, or of --library transformers) or --run RUN"),
        (
            {"model": NAME, "run": "somewhere"},
            "either --model NAME (of timm, or of --library transformers) or --run RUN",
        ),
        ({"model": NAME}, "has no weights: give --pretrained or --checkpoint"),
        ({"model": NAME, "checkpoint": "c", "stage": "fp"}, "--stage is for a teacher by --run"),
        ({"model": NAME, "checkpoint": "c", "precision": "fp8"}, "precision is 'fp8'; choose fp32 or bf16"),
        (
            {"model": NAME, "pretrained": True, "num_classes": 10},
            "pretrained weights of vit_tiny_patch16_224 have 1000",
        ),
        ({"model": NAME, "checkpoint": "c", "model_kwargs": {"in_chans": 1}}, "in_chans is 1"),
        ({"model": "vit_tinny_patch16_224", "checkpoint": "c"}, "similar names: vit_tiny_patch16_224"),
        ({"run": "somewhere", "num_classes": 10}, "--num_classes is for a teacher by --model"),
    ],
)
def test_a_teacher_that_cannot_be_had_is_named(chosen, words):
    with pytest.raises(ConfigError) as raised:
        open_teacher(World(0, 1, torch.device("cpu")), **chosen)
    assert words in str(raised.value)


def test_options_of_the_labels_and_the_folder_are_checked(made):
    folder, _ = made
    world = World(0, 1, torch.device("cpu"))
    teacher = open_teacher(
        world, model=NAME, checkpoint=str(folder / "teacher.safetensors"), num_classes=CLASSES, model_kwargs=KWARGS
    )
    with pytest.raises(ConfigError, match=r"--corps: unknown option; of soft labels there are crops, dtype"):
        make_settings(teacher, {"corps": 5})
    settings, shards = make_settings(teacher, {"crops": 5}), ShardSet.open(folder / "plain")
    with pytest.raises(ConfigError, match="is where the shards lie; name another folder"):
        SoftLabelWriter(shards, folder / "plain", teacher, settings, world)
    with pytest.raises(DataError, match="two of the shards have the same name"):
        SoftLabelWriter(ShardSet(shards.urls * 2, shards.counts * 2), folder / "new", teacher, settings, world)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Return a folder where a run (`teacher`) labels its own digits (`soft`), on which another run (`student`) trains."""
    folder = tmp_path_factory.mktemp("taught")
    run_forked(
        train_command("--recipe", TINY, "--max_steps", 5, "--out_dir", folder / "teacher"), folder / "teacher.log"
    ).ok()
    data = folder / "teacher" / "data"
    labels = [f"--shards={data / 'train'}", f"--out={folder / 'soft'}", f"--run={folder / 'teacher'}", "--stage=fp"]
    run_forked(command(*labels, f"--crops={CROPS}", "--top_k=3"), folder / "soft.log").ok()
    shared = "batch_size: 64, lr: 1.0e-3"
    quant = "quant: {weight: {n_bits: 2}, activation: {n_bits: 2}}"
    stages = (
        f"{{fp: {{epochs: 0.5, {shared}, distill: {{teacher: soft_labels}}}}, "
        f"w2a2: {{init_from: fp, steps: 2, {shared}, {quant}, distill: {{teacher: soft_labels, hard: 0.5}}}}, "
        f"last: {{init_from: w2a2, steps: 2, {shared}, {quant}, distill: {{teacher: fp}}}}}}"
    )
    student = [
        "--data.source=shards", f"--data.train={folder / 'soft'}", f"--data.val={data / 'val'}", "--data.augment=none",
        "--data.soft_labels.crops_per_image=4", f"--stages={stages}", "--telemetry.log_every=1",
    ]  # fmt: skip
    run_forked(train_command("--recipe", TINY, *student, "--out_dir", folder / "student"), folder / "student.log").ok()
    return folder


def test_a_stage_of_a_run_teaches_with_its_own_view_of_images(taught):
    settings = json.loads((taught / "soft" / "soft_labels.json").read_text())
    assert {key: settings["teacher"][key] for key in ("model", "stage", "step")} == {
        "model": NAME,
        "stage": "fp",
        "step": 5,
    }
    assert settings["view"] == {"image_size": 8, "channels": 1, "mean": [0.305], "std": [0.376],
                                "interpolation": "bilinear", "precision": "fp32"}  # fmt: skip
    assert (settings["num_classes"], settings["top_k"]) == (10, 3)


def test_a_run_on_soft_labels_takes_the_steps_of_single_crops_and_counts_crops(taught):
    """1437 images, batches of 64 crops: 22 steps an epoch whatever the crops an image, 16 images a step."""
    found = records(taught / "student", "train", "fp")
    assert [record["step"] for record in found] == list(range(1, 12))
    assert all(0 <= record["top1"] <= 100 for record in found)
    assert {round(record["top1"] * 64 / 100, 6) % 1 for record in found} == {0.0}


def test_the_first_loss_of_a_run_is_the_dense_formula_on_its_first_batch(taught):
    """Computed from the files alone: the batch by its labels and crops, the loss by a dense target in float64."""
    from dsquant.config import load_config
    from dsquant.data import StoredCrops, TrainStream

    config = load_config(str(taught / "student" / "recipe.yaml"))
    torch.manual_seed(config.seed)
    model = build_model(config.model).double()
    shards = ShardSet.open(taught / "soft")
    stream = TrainStream(
        shards, decode_rows=StoredCrops.of_recipe(config, shards), batch_size=16, rank=0, world_size=1,
        seed=config.seed, shuffle_buffer=config.data.shuffle_buffer,
    )  # fmt: skip
    images, labels, indices, probabilities = next(stream.batches())
    assert len(labels) == 64
    assert (labels.view(16, 4) == labels.view(16, 4)[:, :1]).all()
    dense = ((1 - probabilities.double().sum(1, keepdim=True)) / 7).expand(-1, 10).clone()
    dense.scatter_(1, indices, probabilities.double())
    with torch.no_grad():
        expected = -(dense * model(images.double()).log_softmax(-1)).sum(-1).mean()
    assert losses(taught / "student")["fp", 1] == pytest.approx(expected.item(), rel=1e-5)


def test_quantized_stages_are_calibrated_and_taught_on_stored_crops_by_either_teacher(taught):
    for stage in ("w2a2", "last"):
        found = records(taught / "student", "train", stage)
        assert [record["step"] for record in found] == [1, 2]
        assert all(0 < record["loss"] < 20 for record in found)


@pytest.mark.parametrize(("ranks", "accumulation", "images"), [(1, 1, 4), (2, 1, 2), (2, 2, 1), (4, 1, 1)])
def test_each_rank_gets_whole_images(ranks, accumulation, images):
    config = soft_recipe(accumulation)
    assert images_per_batch(config, config.stages["s"], ranks) == images
    with pytest.raises(ConfigError, match=rf"batch_size 16 gives 2 crops to each of {8 // accumulation} ranks .* 4"):
        images_per_batch(config, config.stages["s"], 8 // accumulation)


def soft_recipe(accumulation):
    stage = {"steps": 1, "batch_size": 16, "lr": 0.1, "gradient_accumulation": accumulation}
    data = {"train": "t", "val": "v", "image_size": 8, "augment": "none", "soft_labels": {"crops_per_image": 4}}
    stages = {"s": stage | {"distill": {"teacher": "soft_labels"}}}
    return parse_config({"recipe": "r", "model": {"name": "x", "num_classes": 2}, "data": data, "stages": stages}, "r")
