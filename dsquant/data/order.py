"""The order of samples: a function of seed, epoch and ranks, of positions alone, known before anything is read.

In an epoch the shards are permuted, their samples form one sequence, and every rank takes an equal contiguous segment of it;
webdataset's shuffle buffer, run over the *positions* of the segment, says which sample goes where. Where a run goes on to
another number of ranks the order stays that of the ranks it began with: what those would draw for a step, one after another,
is cut anew, and a rank reads the segments that its part is of.
"""

import hashlib
import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
from webdataset.filters import shuffle

from dsquant.data.damage import Damage
from dsquant.data.reading import Record, read_shard
from dsquant.data.shards import TEXT_MEMBER, ShardSet
from dsquant.errors import DataError


def parts_of(places: range, drawn: int) -> list[tuple[int, slice]]:
    """Return (rank of the order, part of its batch) that make up these places of a step, of which each rank draws `drawn`."""
    ranks = range(places.start // drawn, -(-places.stop // drawn))
    ends = [(max(places.start - rank * drawn, 0), min(places.stop - rank * drawn, drawn)) for rank in ranks]
    return [(rank, slice(*end)) for rank, end in zip(ranks, ends, strict=True)]


class Share:
    """Give the records that one rank of the order draws, or of each of its batches the same part.

    Of text, every `bucket_batches` batches in a row share their samples out by length.
    """

    def __init__(
        self, shards: ShardSet, rank: int, batch_size: int, part: slice, batches_per_epoch: int, *, shuffle_buffer: int,
        bucket_batches: int, seed: int,
    ):  # fmt: skip
        self.shards, self.rank, self.batch_size, self.part, self.seed = shards, rank, batch_size, part, seed
        self.shuffle_buffer, self.bucket_batches = shuffle_buffer, bucket_batches
        self.size = batches_per_epoch * batch_size

    def batches(self, epoch: int, mine: range) -> Iterator[list[Record | Damage]]:
        """Yield the records of these batches of an epoch."""
        order, part = self._order(epoch), self.part
        if self.bucket_batches == 1:  # else which sample is in the part depends on what all are like
            order, part = order[:, part], slice(None)
        buckets = sorted({batch // self.bucket_batches for batch in mine})
        spans = {b: range(b * self.bucket_batches, (b + 1) * self.bucket_batches) for b in buckets}
        wanted = np.zeros(self.size, dtype=bool)
        for span in spans.values():
            wanted[order[span.start : span.stop]] = True
        records = self._segment(epoch, wanted)
        kept: dict[int, Record | Damage] = {}  # read, but of a later bucket: never more than the shuffle buffer
        for bucket, span in spans.items():
            rows = []
            for position in order[span.start : span.stop].ravel().tolist():
                while position not in kept:
                    kept.update([next(records)])
                rows.append(kept.pop(position))
            batches = self._by_length(rows, order.shape[1], hash_of(self.seed, epoch, f"bucket {bucket}"))
            for index in (i for i in mine if i in span):
                yield batches[index - span.start][part]

    def all_records(self, epoch: int) -> Iterator[Record | Damage]:
        """Yield every record of the segment, in the order of the shards."""
        for _, record in self._segment(epoch, np.ones(self.size, dtype=bool)):
            yield record

    def _segment(self, epoch: int, wanted: np.ndarray) -> Iterator[tuple[int, Record | Damage]]:
        shard_order = list(range(len(self.shards)))
        random.Random(hash_of(self.seed, epoch, "shards")).shuffle(shard_order)
        return read_segment(self.shards, shard_order, self.rank * self.size, wanted)

    def _order(self, epoch: int) -> np.ndarray:
        """Give the positions in the segment, (batches_per_epoch, batch_size), that make up each batch."""
        rng = random.Random(hash_of(self.seed, epoch, f"rank {self.rank}"))
        positions = shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(iter(range(self.size)))
        return np.fromiter(positions, dtype=np.int64, count=self.size).reshape(-1, self.batch_size)

    def _by_length(self, rows: list[Record | Damage], size: int, seed: int) -> list[list[Record | Damage]]:
        """Cut the records of a bucket into batches of like length, in a random order; a bucket of one batch stays as it is."""
        if len(rows) > size:
            rows = sorted(rows, key=_text_length)
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        random.Random(seed).shuffle(batches)
        return batches


def read_segment(
    shards: ShardSet, shard_order: Sequence[int], first: int, wanted: np.ndarray
) -> Iterator[tuple[int, Record | Damage]]:
    """Yield (position, record) where `wanted`, in the segment that starts at sample `first` of the ordered shards."""
    begin = -first  # position of the shard's first sample in the segment
    parts = []
    for index in shard_order:
        low, high = max(begin, 0), max(begin + shards.counts[index], 0)
        positions = np.flatnonzero(wanted[low:high]) + low
        if len(positions):
            parts.append((index, positions.tolist(), (positions - begin).tolist()))
        begin += shards.counts[index]
    for (index, positions, numbers), following in zip_longest(parts, parts[1:]):
        if following:
            shards.prefetch(following[0])
        yield from zip(positions, _read_samples(shards, index, numbers), strict=True)


def _read_samples(shards: ShardSet, index: int, numbers: list[int]) -> Iterator[Record | Damage]:
    """Yield the samples of a shard that have these numbers, in order; once it cannot be read, what is lost of them."""
    url, wanted = shards.urls[index], deque(numbers)
    try:
        for number, record in enumerate(read_shard(*shards.row(index), shards.cache, frozenset(numbers))):
            if number == wanted[0]:
                wanted.popleft()
                yield record
                if not wanted:
                    return
    except DataError as error:
        yield from (Damage(url, number, str(error)) for number in wanted)


def _text_length(record: Record | Damage) -> int:
    return 0 if isinstance(record, Damage) else len(record.get(TEXT_MEMBER, b""))


def hash_of(seed: int, epoch: int, name: str) -> int:
    """Give a 63-bit integer that (seed, epoch, name) determine, on any machine."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
