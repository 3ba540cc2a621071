"""Check shards: decode every sample."""

from collections.abc import Callable

from dsquant.data.reading import decode, read_shard
from dsquant.data.shards import ShardSet


def verify(shards: ShardSet, progress: Callable[[int], None] = lambda samples: None) -> dict[int | float, int]:
    """Decode every sample; give the number of samples of each label or score.

    progress is called with the number of samples done since the last call. Raises DataError at the first shard or
    sample that cannot be read.
    """
    labels: dict[int | float, int] = {}
    for url, count in zip(shards.urls, shards.counts, strict=True):
        for record in read_shard(url, count):
            _, label = decode(record, lambda content: content)
            labels[label] = labels.get(label, 0) + 1
            progress(1)
    return dict(sorted(labels.items()))
