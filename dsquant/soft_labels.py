"""Soft labels of a whole set: a teacher sees K crops of every image, and shards are written anew with what it says.

Each rank takes whole shards, so what is written depends on neither their number nor on interruptions: a shard is a
function of the old shard, the teacher and the settings. It gets its name once it is whole, and one that has its name is
not made again. Threads cut the crops while the teacher works on those before.
"""

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.transforms import functional

from dsquant.checkpoint import load_model, load_run_checkpoint
from dsquant.config import ModelConfig
from dsquant.data.reading import Record, decode, read_shard
from dsquant.data.shard_writing import begin_set, finish_set, write_shard
from dsquant.data.shards import ShardSet, count_samples, shard_name
from dsquant.data.soft_labels import MEMBER, SETTINGS, SoftLabels, SoftLabelSettings, cut, draw_crops
from dsquant.data.transforms import ToMode
from dsquant.engine import World
from dsquant.errors import ConfigError, DataError
from dsquant.files import write_atomically
from dsquant.models import logits_of
from dsquant.models.registry import build_model, pretrained_view
from dsquant.preemption import Stopped, StopRequest

IMAGENET_IMAGES = 1_281_167
TAR_BLOCK = 512
POLL_SECONDS = 0.5
STOPPING = ".stopping"  # file in the folder of the new shards
VIEW = ("image_size", "channels", "mean", "std", "interpolation")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Teacher:
    """Hold a model in evaluation mode, how it sees images (`view`), and what it is (`identity`, with a digest of its weights)."""

    model: nn.Module
    num_classes: int
    view: dict[str, Any]
    identity: dict[str, Any]

    @torch.no_grad()
    def top_k(self, images: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the k largest of softmax(logits / T), float32, and their classes, both (B, k) on the model's device.

        images: uint8 (B, C, S, S).
        """
        like = next(self.model.parameters())
        pixels = images.to(like.device, non_blocking=True).float().div(255)
        pixels = functional.normalize(pixels, list(self.view["mean"]), list(self.view["std"]))
        logits = logits_of(self.model, pixels.to(like.dtype)).float()
        return (logits / temperature).softmax(dim=-1).topk(k)


def open_teacher(
    world: World, *, model: str | None = None, library: str = "timm", pretrained: bool = False,
    checkpoint: str | None = None, num_classes: int | None = None, model_kwargs: dict[str, Any] | None = None,
    run: str | None = None, stage: str | None = None, image_size: int | None = None, precision: str = "fp32",
) -> Teacher:  # fmt: skip
    """Open a timm model with the weights that are named, an image classifier of transformers, or a stage of a run (by default
    its newest), on this rank's device.

    A timm model sees images as timm says of its weights, one of transformers as its image processor says, a run's as its
    recipe says; `image_size` overrides each. Raises ConfigError for options that do not fit together, CheckpointError for
    weights that do not fit.
    """
    world.use_precision(_checked_precision(precision))
    given = {"checkpoint": checkpoint, "model_kwargs": model_kwargs}
    if (model is None) == (run is None):
        raise ConfigError("give a teacher: either --model NAME (of timm, or of --library transformers) or --run RUN")
    if run is not None:
        given |= {"library": library != "timm", "pretrained": pretrained, "num_classes": num_classes}
        _refuse(given, "by --model", "a run knows its own")
        teacher, classes, view, identity = _run_teacher(Path(run), stage)
    else:
        _refuse({"stage": stage}, "by --run", "a model by name has none")
        if library == "transformers":
            _refuse(given, "of timm", "one of transformers brings its own")
            teacher, classes, view = _transformers_teacher(model, num_classes, image_size)
            identity = {"model": Path(model).name if Path(model).is_dir() else model, "library": library}
        elif library == "timm":
            teacher, classes, view = _timm_teacher(model, pretrained, checkpoint, num_classes, model_kwargs or {})
            identity = {"model": model}
        else:
            raise ConfigError(f"library is {library!r}; choose timm or transformers")
    view |= {"image_size": image_size or view["image_size"], "precision": precision}
    identity["weights"] = _digest(teacher)
    teacher = teacher.eval().requires_grad_(False).to(world.device, torch.bfloat16 if world.bf16 else torch.float32)
    return Teacher(teacher, classes, view, identity)


def _checked_precision(precision: str) -> str:
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision is {precision!r}; choose fp32 or bf16")
    return precision


def _refuse(given: dict[str, Any], whose: str, why: str) -> None:
    if odd := next((key for key, value in given.items() if value), None):
        raise ConfigError(f"--{odd} is for a teacher {whose}; {why}")


def _run_teacher(run: Path, stage: str | None) -> tuple[nn.Module, int, dict[str, Any], dict[str, Any]]:
    found = load_run_checkpoint(run, stage)
    model, data = found.config.model, found.config.data
    if data.task != "image":
        raise ConfigError(f"{run} trains on {data.task}; soft labels are of crops of images")
    view = {key: getattr(data, key) for key in VIEW}
    return load_model(found), model.num_classes, view, {"model": model.name, "stage": found.stage, "step": found.step}


def _transformers_teacher(
    name: str, num_classes: int | None, image_size: int | None
) -> tuple[nn.Module, int, dict[str, Any]]:
    from dsquant.models.image_classifiers import open_image_classifier  # importing transformers takes seconds

    teacher, view = open_image_classifier(name, image_size)
    own = view.pop("num_classes")
    if num_classes not in (None, own):
        raise ConfigError(f"num_classes is {num_classes}, but {name} tells {own}; leave it out")
    return teacher, own, view


def _timm_teacher(
    name: str, pretrained: bool, checkpoint: str | None, num_classes: int | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, int, dict[str, Any]]:
    if not pretrained and not checkpoint:
        raise ConfigError(f"teacher {name} has no weights: give --pretrained or --checkpoint FILE")
    view = pretrained_view(name)
    own = view.pop("num_classes")
    classes = num_classes or own
    if pretrained and classes != own:
        raise ConfigError(f"num_classes is {classes}, but the pretrained weights of {name} have {own}; leave it out")
    if kwargs.get("in_chans", view["channels"]) != view["channels"]:
        raise ConfigError(f"in_chans is {kwargs['in_chans']}: teachers by --model see {view['channels']} channels")
    view["image_size"] = kwargs.get("img_size", view["image_size"])
    built = ModelConfig(name=name, num_classes=classes, pretrained=pretrained, checkpoint=checkpoint, kwargs=kwargs)
    return build_model(built), classes, view


def _digest(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def make_settings(teacher: Teacher, options: dict[str, Any]) -> SoftLabelSettings:
    """Join what the user chose with what the teacher is. Raises ConfigError naming an option that is unknown or cannot be."""
    allowed = {field.name for field in fields(SoftLabelSettings)} - {"num_classes", "teacher", "view"}
    if odd := next((key for key in options if key not in allowed), None):
        raise ConfigError(f"--{odd}: unknown option; of soft labels there are {', '.join(sorted(allowed))}")
    return SoftLabelSettings(num_classes=teacher.num_classes, teacher=teacher.identity, view=teacher.view, **options)


class SoftLabelWriter:
    """Write the shards of a set anew with soft labels, on all ranks together.

    Args:
        shards: the set; its names are kept.
        out: another folder, the same on every rank. It gets index.json, soft_labels.json, and classes.txt where there is one.
        teacher, settings: who labels, and how.
        batch_size: crops that the teacher sees at a time.
        num_threads: threads of this rank that cut crops.
        stop: where any rank is asked to stop, all leave their shards as they are and raise Stopped.
    """

    def __init__(
        self, shards: ShardSet, out: str | Path, teacher: Teacher, settings: SoftLabelSettings, world: World, *,
        batch_size: int = 256, num_threads: int = 8, stop: StopRequest | None = None,
    ):  # fmt: skip
        self.shards, self.out, self.world = shards, Path(out).absolute(), world
        self.teacher, self.settings, self.stop = teacher, settings, stop or StopRequest()
        self.stop.join(world.size)
        self.batch_size, self.num_threads = batch_size, num_threads
        self.to_mode = ToMode("L" if teacher.view["channels"] == 1 else "RGB")
        self.counts = {shard_name(url): count for url, count in zip(shards.urls, shards.counts, strict=True)}
        if len(self.counts) < len(shards):
            raise DataError("two of the shards have the same name; label each folder into one of its own")
        if any(Path(url).parent == self.out for url in shards.urls):
            raise ConfigError(f"--out {out} is where the shards lie; name another folder")
        self._check_classes()
        if batch_size < 1 or num_threads < 1:
            raise ConfigError(f"batch_size {batch_size} and num_threads {num_threads} must be at least 1")

    def write(self, progress: Progress = lambda done, total: None) -> ShardSet:
        """Label what is not labelled yet; every rank calls this, and returns once the set is whole.

        progress is called with (samples done, samples in all) as this rank and others go on.
        Raises ConfigError where `out` holds soft labels of other settings, DataError for a shard that cannot be read.
        """
        pending = self._begin()
        mine = pending[self.world.rank :: self.world.size]
        urls = dict(zip(self.counts, self.shards.urls, strict=True))
        stopping = False
        try:
            with ThreadPoolExecutor(self.num_threads) as pool:
                for name in mine:
                    write_shard(self.out / name, self._labelled(urls[name], self.counts[name], pool, progress))
            # No collective: one of its peers may need longer for its last shard than a process group waits.
            while (done := self._samples_done()) < self.shards.total:
                progress(done, self.shards.total)
                self._stop_if_asked()
                time.sleep(POLL_SECONDS)
            progress(done, self.shards.total)
        except Stopped:
            stopping = True
        self.stop.agree(stopping, f"soft labels, after {self._samples_done()} of {self.shards.total} images")
        if self.world.rank == 0:
            finish_set(self.out, self.counts)
        dist.barrier()
        return ShardSet(tuple(str(self.out / name) for name in self.counts), tuple(self.counts.values()))

    def _stop_if_asked(self) -> None:
        """Raise Stopped where this rank or, by a file that it leaves, another was asked to: ranks here do not go in step."""
        if self.stop.asked:
            (self.out / STOPPING).touch()
        if (self.out / STOPPING).exists():
            raise Stopped

    def _begin(self) -> list[str]:
        """Agree on the settings and give the names of the shards that are still to be made."""
        path = self.out / SETTINGS
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / STOPPING).unlink(missing_ok=True)  # of a start that was stopped
            if not path.exists():
                write_atomically(path, self.settings.to_json())
        dist.barrier()
        self.settings.check_same(SoftLabelSettings.from_json(path.read_bytes(), str(path)), self.out)
        pending = [[]]
        if self.world.rank == 0:
            for name in self.counts:
                if not self._is_done(name):
                    pending[0].append(name)
            if pending[0]:
                begin_set(self.out)
                self._copy_classes()
        dist.broadcast_object_list(pending)
        return pending[0]

    def _check_classes(self) -> None:
        """Raise ConfigError where the set has a classes.txt of another number of classes than the teacher tells."""
        path = self._classes_file()
        if path.is_file() and (held := len(path.read_text().splitlines())) != self.teacher.num_classes:
            raise ConfigError(
                f"{path} names {held} classes and the teacher tells {self.teacher.num_classes}; take a teacher of these classes"
            )

    def _classes_file(self) -> Path:
        return Path(self.shards.urls[0]).with_name("classes.txt")

    def _is_done(self, name: str) -> bool:
        if not (self.out / name).exists():
            return False
        found = count_samples(str(self.out / name))
        if found != self.counts[name]:
            raise DataError(f"{self.out / name} has {found} samples where {self.counts[name]} are to be; remove it")
        return True

    def _copy_classes(self) -> None:
        classes = self._classes_file()
        if classes.is_file():
            shutil.copyfile(classes, self.out / classes.name)

    def _samples_done(self) -> int:
        return sum(count for name, count in self.counts.items() if (self.out / name).exists())

    def _labelled(
        self, url: str, count: int, pool: ThreadPoolExecutor, progress: Progress
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the samples of a shard with their soft labels; one group of images is read back while the next is cut."""
        records, begun, waiting = read_shard(url, count), self._samples_done(), deque()
        per_group, done = max(1, self.batch_size // self.settings.crops), 0
        while group := list(islice(records, per_group)):
            waiting.append((group, *self._launch(group, pool)))
            if len(waiting) > 1:
                yield from self._encoded(*waiting.popleft())
            self._stop_if_asked()
            done += len(group)
            progress(begun + done, self.shards.total)
        for entry in waiting:
            yield from self._encoded(*entry)

    def _launch(
        self, group: list[Record], pool: ThreadPoolExecutor
    ) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Draw and cut the crops of a few images and start the teacher on them; give the drawn and what it will say."""
        drawn, jobs, said = [], [], []
        for record in group:
            image, label = decode(record, self.to_mode)
            if label >= self.teacher.num_classes:
                raise DataError(
                    f"shard {record['__url__']}, sample {record['__key__']}: it is of class {label}, and the teacher tells "
                    f"{self.teacher.num_classes} classes (0, 1, ...); take a teacher of these classes"
                )
            crops, flips = draw_crops(self.settings, record["__key__"], *image.size)
            drawn.append((crops, flips))
            jobs += [(image, crop, flip) for crop, flip in zip(crops.tolist(), flips.tolist(), strict=True)]
        for first in range(0, len(jobs), self.batch_size):
            images = torch.stack(list(pool.map(self._pixels, jobs[first : first + self.batch_size])))
            said.append(self.teacher.top_k(images, self.settings.top_k, self.settings.temperature))
        return drawn, said

    def _pixels(self, job: tuple[Any, list[float], int]) -> Tensor:
        view = self.teacher.view
        return functional.pil_to_tensor(cut(*job, view["image_size"], view["interpolation"]))

    def _encoded(
        self, group: list[Record], drawn: list[tuple[Tensor, Tensor]], said: list[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        probabilities, indices = (torch.cat(parts).cpu() for parts in zip(*said, strict=True))
        if not probabilities.isfinite().all():
            raise DataError(
                f"shard {group[0]['__url__']}: the teacher's probabilities are not finite; use another precision"
            )
        parts = zip(
            group, drawn, indices.split(self.settings.crops), probabilities.split(self.settings.crops), strict=True
        )
        for record, (crops, flips), top, values in parts:
            members = {name: content for name, content in record.items() if not name.startswith("__")}
            yield record["__key__"], members | {MEMBER: SoftLabels(crops, flips, top, values).encode(self.settings)}


def sizes(settings: SoftLabelSettings) -> dict[str, int]:
    """Return the bytes of an image's `member`, of it in the `tar` with header and padding, and of all of ImageNet-1k in tars."""
    member = settings.bytes_per_image
    tar = TAR_BLOCK + -(-member // TAR_BLOCK) * TAR_BLOCK
    return {"member": member, "tar": tar, "imagenet": tar * IMAGENET_IMAGES}
