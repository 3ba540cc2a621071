"""Stream shards as batches: deterministic, resumable at any batch, the same number of batches on every rank.

Which sample goes where is `order.py`'s, known before anything is read: each worker keeps only the records of its own
batches, and a resume opens no shard that only past batches needed. Augmentation is a function of (seed, epoch, sample key).
Each worker reads the tars of its rank's whole segment.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dsquant.data.damage import Damage, DamageLog
from dsquant.data.order import Share, hash_of, parts_of, read_segment
from dsquant.data.reading import Record, decode
from dsquant.data.shards import ShardSet
from dsquant.data.workers import Batch, load_batches
from dsquant.errors import DataError

Row = tuple[Any, ...]
Transform = Callable[[Any], Any]  # one that has a method `stack` makes batches of its results itself


class TrainStream:
    """Give a rank its endless sequence of training batches.

    A sample becomes one row (image, label) by `transform`, or the rows that `decode_rows` makes of its record; a batch
    stacks the rows of `batch_size` samples. Either may draw from any random generator: it is seeded for each sample.
    `batches_per_epoch` = floor(samples / (batch_size * world_size)), the same on every rank; what is left over differs
    from epoch to epoch. shuffle_buffer is in samples (1 keeps the order of the shards). Of text, every `bucket_batches`
    batches in a row share their samples out by length, the shortest together; then those batches come in an order of their
    own, on every rank the same, so that ranks have batches of like length at a time. `order_ranks`: whose order it is, where
    a run has gone on to another number of ranks. Raises DataError where the samples do not fill one batch a rank.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        transform: Transform | None = None,
        decode_rows: Callable[[Record], list[Row]] | None = None,
        batch_size: int,
        rank: int,
        world_size: int,
        order_ranks: int | None = None,
        seed: int,
        num_workers: int = 0,
        shuffle_buffer: int = 4096,
        bucket_batches: int = 1,
        pin_memory: bool = False,
        max_damaged: int = 0,
    ):
        if (transform is None) == (decode_rows is None):
            raise ValueError("give either transform or decode_rows")
        self.shards, self.transform, self.batch_size = shards, transform, batch_size
        self.decode_rows = decode_rows or self._one_row
        self.rank, self.world_size, self.seed = _checked_rank(rank, world_size), world_size, seed
        self.damage = DamageLog(max_damaged, rank)
        self.loader = {"num_workers": num_workers, "pin_memory": pin_memory}
        self.batches_per_epoch = shards.total // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"{shards.total} training samples do not fill one batch of {batch_size} on each of {world_size} ranks "
                f"({batch_size * world_size} samples); use a smaller batch, fewer ranks, or more data"
            )
        drawn, left = divmod(batch_size * world_size, order_ranks or world_size)
        if left:
            raise ValueError(f"{batch_size} samples on each of {world_size} ranks do not divide among {order_ranks}")
        options = {"shuffle_buffer": shuffle_buffer, "bucket_batches": bucket_batches, "seed": seed}
        self.shares = [
            Share(shards, share, drawn, part, self.batches_per_epoch, **options)
            for share, part in parts_of(range(rank * batch_size, (rank + 1) * batch_size), drawn)
        ]

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield (images float32 (B, C, H, W), labels int64 (B,), ...) without end, from batch `start` of the whole run.

        For text, tokens (a dict of int64 (B, N)) take the place of images, and labels may be float32 scores.

        Batch i belongs to epoch i // batches_per_epoch; `batches(k)` continues an earlier run bit for bit after its
        first k batches. Raises DataError for a shard or sample that cannot be read.
        """
        if start < 0:
            raise ValueError(f"start must be at least 0, not {start}")
        return self._counted(load_batches(partial(self._worker_batches, start), **self.loader))

    def _counted(self, loaded: Iterator[tuple[Batch, int, list[Damage]]]) -> Iterator[Batch]:
        for batch, worker, damages in loaded:
            self.damage.add(worker, damages)
            yield batch

    def _worker_batches(self, start: int, worker: int, workers: int) -> Iterator[tuple[Batch, int, list[Damage]]]:
        index = start + worker
        while True:
            epoch, first = divmod(index, self.batches_per_epoch)
            mine = range(first, self.batches_per_epoch, workers)
            for batch, damages in self._epoch_batches(epoch, mine):
                yield batch, worker, damages
            index += len(mine) * workers

    def _epoch_batches(self, epoch: int, mine: range) -> Iterator[tuple[Batch, list[Damage]]]:
        for parts in zip(*(share.batches(epoch, mine) for share in self.shares), strict=True):
            yield self._decoded([record for part in parts for record in part], epoch)

    def _decoded(self, records: list[Record | Damage], epoch: int) -> tuple[Batch, list[Damage]]:
        """Decode a batch; in place of a damaged sample comes another of the batch, or of the rank's share, augmented anew."""
        rows, damages = [], []
        with _preserved_rng():
            for record in records:
                try:
                    rows.append(self._rows(record, epoch))
                except DataError as error:
                    if self.damage.limit == 0:
                        raise
                    rows.append(None)
                    damages.append(_damage_of(record, str(error)))
            if damages:
                good = [record for record, made in zip(records, rows, strict=True) if made]
                good = good or self._readable(epoch) or _fail(damages[0])
                for place in (place for place, made in enumerate(rows) if not made):
                    rows[place] = self._rows(good[place % len(good)], epoch, f"in place of {place}")
        return _stacked([row for made in rows for row in made], self.transform), damages

    def _rows(self, record: Record | Damage, epoch: int, place: str = "") -> list[Row]:
        if isinstance(record, Damage):
            _fail(record)
        _seed_rng(hash_of(self.seed, epoch, record["__key__"] + place))
        return self.decode_rows(record)

    def _readable(self, epoch: int) -> list[Record]:
        """Find up to a batch of samples in the rank's share of an epoch that can be decoded, the first there are."""
        found: list[Record] = []
        for record in self.shares[0].all_records(epoch):
            with suppress(DataError):
                self._rows(record, epoch)
                found.append(record)
            if len(found) == self.batch_size:
                break
        return found

    def _one_row(self, record: Record) -> list[Row]:
        return [decode(record, self.transform)]


class EvalStream:
    """Give a rank its share of the samples, each counted once over all ranks, in as many batches as any other rank.

    Every batch has batch_size rows; rows beyond the rank's share have label -1 (a score: NaN), which the caller must not
    count; they are zeros, or for text a sample once more. `batches_per_epoch` = ceil(samples / (batch_size * world_size)).
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        transform: Transform,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.shards, self.transform, self.batch_size = shards, transform, batch_size
        _checked_rank(rank, world_size)
        self.first, self.last = (shards.total * side // world_size for side in (rank, rank + 1))
        self.batches_per_epoch = -(-shards.total // (batch_size * world_size))
        self.loader = {"num_workers": num_workers, "pin_memory": pin_memory}

    def batches(self) -> Iterator[Batch]:
        """Yield (images float32 (B, C, H, W), labels int64 (B,)), or tokens, batches_per_epoch times; padding has label -1."""
        return load_batches(self._worker_batches, **self.loader)

    def _worker_batches(self, worker: int, workers: int) -> Iterator[Batch]:
        mine = range(worker, self.batches_per_epoch, workers)
        wanted = np.zeros(self.last - self.first, dtype=bool)
        for batch in mine:
            wanted[batch * self.batch_size : (batch + 1) * self.batch_size] = True
        records = read_segment(self.shards, range(len(self.shards)), self.first, wanted)
        for batch in mine:
            present = int(wanted[batch * self.batch_size : (batch + 1) * self.batch_size].sum())
            rows = [self._row(next(records)[1]) for _ in range(present)]
            if present < self.batch_size:
                sample, label = rows[0] if rows else self._any_sample()
                blank = torch.zeros_like(sample) if isinstance(sample, Tensor) else sample
                rows += [(blank, math.nan if isinstance(label, float) else -1)] * (self.batch_size - present)
            yield _stacked(rows, self.transform)

    def _any_sample(self) -> tuple[Any, int | float]:
        """Give a sample of the set, for the shape of a batch that is all padding."""
        return self._row(next(read_segment(self.shards, range(len(self.shards)), 0, np.ones(1, dtype=bool)))[1])

    def _row(self, record: Record | Damage) -> tuple[Any, int | float]:
        if isinstance(record, Damage):  # a score over fewer samples would be another score
            _fail(record)
        return decode(record, self.transform)


def _damage_of(record: Record | Damage, cause: str) -> Damage:
    return record if isinstance(record, Damage) else Damage(record["__url__"], record["__number__"], cause)


def _fail(damage: Damage) -> NoReturn:
    raise DataError(damage.cause)


def _stacked(rows: list[Row], transform: Transform | None) -> Batch:
    if hasattr(transform, "stack"):
        return transform.stack(rows)
    columns = zip(*rows, strict=True)
    # default_collate stacks where the main process will read: of torch.stack's result a worker sends a copy
    return tuple(
        default_collate(list(c)) if isinstance(c[0], Tensor) else torch.tensor(c, dtype=torch.int64) for c in columns
    )


def _checked_rank(rank: int, world_size: int) -> int:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")
    return rank


def _seed_rng(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)  # torch.manual_seed would seed the accelerators as well


@contextmanager
def _preserved_rng() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
