"""Measure the stream of training batches against other loaders of the same images, interleaved in one run."""

import io
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, default_collate
from torchvision.datasets import ImageFolder

from dsquant.data import ShardSet, TrainStream, build_transform
from dsquant.data.reading import read_shard
from dsquant.data.shards import LABEL_MEMBER, image_member

LOOK = {"image_size": 224, "channels": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OURS, ALONE = "dsquant", "decode and transform alone"
PREFETCHED = 2  # batches that DataLoader keeps ready for each worker
Transform = Callable[[Image.Image], torch.Tensor]


def loader(
    shards: str, batch: int = 32, workers: int = 2, batches: int = 16, turns: int = 9, shuffle_buffer: int = 1000,
    out: str | None = None,
) -> None:  # fmt: skip
    """Time decode, RandomResizedCrop to 224, flip and normalization of the images of some shards, and print one JSON line a case.

    Cases: dsquant's TrainStream; a plain webdataset pipeline; torchvision's ImageFolder, of the images as files, with
    DataLoader; and decode and transform of bytes in memory, without any reading, in as many processes. All run the same
    transform on Pillow images, in worker processes of DataLoader, without end. They take turns: in a turn a case gives
    what it has ready and as much again untimed, then `batches` timed batches. A line holds medians over turns: of
    images_per_second, of the CPU time of an image (that of all processes of the case, which a busy machine changes less),
    and of ratios within a turn: how many times as fast as `decode and transform alone` a case is, and dsquant as each other.

    Args:
        shards: folder, glob or brace pattern of image shards.
        batch, workers: images in a batch, and worker processes of each case.
        batches, turns: timed batches in a turn, and turns of each case, after one that is not counted.
        shuffle_buffer: samples, of dsquant and webdataset.
        out: also write the lines to this file.
    """
    found = ShardSet.open(shards)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more workers than cores, and of webdataset's own
        starts = _starts(found, Path(folder), batch, workers, shuffle_buffer)
        cases = {name: _Case(start) for name, start in starts.items()}
        taken = _measure(cases, batches, turns, warmup=2 * PREFETCHED * workers)
        del cases
    lines = [json.dumps(line) for line in _lines(taken, batch * batches, found.total, workers)]
    print("\n".join(lines))
    if out:
        Path(out).write_text("\n".join(lines) + "\n")


def _starts(
    shards: ShardSet, folder: Path, batch: int, workers: int, shuffle_buffer: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    transform = build_transform(train=True, augment="rrc", interpolation="bicubic", crop_pct=0.875, **LOOK)
    ours = {"transform": transform, "batch_size": batch, "num_workers": workers, "shuffle_buffer": shuffle_buffer}
    samples = _extract(shards, folder)
    return {
        OURS: lambda: TrainStream(shards, **ours, rank=0, world_size=1, seed=0).batches(),
        "webdataset": lambda: _webdataset(shards, transform, batch, workers, shuffle_buffer),
        "torchvision ImageFolder": lambda: _image_folder(str(folder), transform, batch, workers),
        ALONE: lambda: _loaded(_InMemory(samples, transform, batch), workers),
    }


def _extract(shards: ShardSet, folder: Path) -> list[tuple[bytes, int]]:
    """Write every image as CLASS/NUMBER.SUFFIX, and return their bytes with labels."""
    samples = []
    for url, count in zip(shards.urls, shards.counts, strict=True):
        for record in read_shard(url, count):
            suffix, label = image_member(url, record), int(record[LABEL_MEMBER])
            path = folder / f"{label:05d}" / f"{len(samples):08d}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(record[suffix])
            samples.append((record[suffix], label))
    return samples


def _loaded(dataset: Any, workers: int, **options: Any) -> Iterator[Any]:
    return iter(DataLoader(dataset, num_workers=workers, prefetch_factor=PREFETCHED, **{"batch_size": None} | options))


def _webdataset(shards: ShardSet, transform: Transform, batch: int, workers: int, shuffle_buffer: int) -> Iterator[Any]:
    pipeline = (
        webdataset.WebDataset(list(shards.urls), shardshuffle=len(shards), empty_check=False)
        .shuffle(shuffle_buffer)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", LABEL_MEMBER)
        .map_tuple(transform, lambda label: label)
        .batched(batch, collation_fn=default_collate)
        .repeat()
    )
    return _loaded(pipeline, workers)


def _image_folder(folder: str, transform: Transform, batch: int, workers: int) -> Iterator[Any]:
    files = ImageFolder(folder, transform)
    endless = RandomSampler(files, replacement=False, num_samples=1 << 30)
    return _loaded(files, workers, batch_size=batch, sampler=endless)


class _InMemory(IterableDataset):
    def __init__(self, samples: list[tuple[bytes, int]], transform: Transform, batch: int):
        self.samples, self.transform, self.batch = samples, transform, batch

    def __iter__(self) -> Iterator[Any]:
        endless = itertools.cycle(self.samples)
        while True:
            rows = itertools.islice(endless, self.batch)
            yield default_collate([(self.transform(Image.open(io.BytesIO(data))), label) for data, label in rows])


class _Case:
    """Hold an endless loader and the CPU time that its worker processes have taken."""

    def __init__(self, start: Callable[[], Iterator[Any]]):
        before = set(psutil.Process().children())
        self.batches = start()
        next(self.batches)  # a generator starts its workers now
        self.workers = set(psutil.Process().children()) - before

    def take(self, batches: int) -> tuple[float, float]:
        """Take batches; return wall-clock seconds and CPU seconds, those of the workers and of this process."""
        began, used = time.perf_counter(), self._cpu_seconds()
        for _ in range(batches):
            next(self.batches)
        return time.perf_counter() - began, self._cpu_seconds() - used

    def _cpu_seconds(self) -> float:
        return time.process_time() + sum(sum(worker.cpu_times()[:2]) for worker in self.workers)


def _measure(
    cases: dict[str, _Case], batches: int, turns: int, warmup: int
) -> dict[str, list[tuple[float, float]]]:  # fmt: skip
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, case in cases.items():
            case.take(warmup)
            measured = case.take(batches)
            if turn:
                taken[name].append(measured)
    return taken


def _lines(
    taken: dict[str, list[tuple[float, float]]], images: int, total: int, workers: int
) -> list[dict[str, Any]]:  # fmt: skip
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "webdataset": webdataset.__version__,
    }
    shared = {"workers": workers, "images": total, "turns": len(taken[OURS])} | versions
    lines = []
    for name, turns in taken.items():
        wall, cpu = map(statistics.median, zip(*turns, strict=True))
        line = {
            "case": name,
            "images_per_second": round(images / wall, 1),
            "cpu_ms_per_image": round(1e3 * cpu / images, 3),
        }
        for column, kind in enumerate(("wall", "cpu")):
            of = partial(_ratio, taken, column, name)
            line[f"{kind}_speed_over_alone"] = of(ALONE)
            if name == OURS:
                line[f"{kind}_speed_over"] = {peer: of(peer) for peer in taken if peer not in (OURS, ALONE)}
        lines.append(line | shared)
    return lines


def _ratio(taken: dict[str, list[tuple[float, float]]], column: int, name: str, other: str) -> float:
    """Return the median over turns of the other's time over that of `name`."""
    pairs = zip(taken[other], taken[name], strict=True)
    return round(statistics.median(theirs[column] / own[column] for theirs, own in pairs), 3)
