"""The order of samples, over ranks, workers, layouts of shards and resumes.

DSQ_ORDERS sets how many random layouts are tried beside those that are listed.
"""

import os
import random
from functools import cache
from itertools import accumulate, chain, islice

import pytest
import torch

from dsquant.data import EvalStream, ShardSet, TrainStream, write_shards
from tests.data.conftest import numbered_samples

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
LAYOUTS = {
    "one shard": [31],
    "fewer shards than ranks": [19, 12],
    "shards of one sample": [1] * 29,
    "uneven shards": [1, 13, 2, 7, 5, 19],
    "a prime total": [11] * 8 + [9],
}
EPOCHS = 2


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """Return `make(*sizes)`: a set of shards of these sizes whose labels number the samples."""

    @cache
    def make(*sizes):
        folder, samples = tmp_path_factory.mktemp("layout"), list(numbered_samples(sum(sizes)))
        parts = [
            write_shards(samples[end - size : end], folder / f"{number:03d}", "train", size)
            for number, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True))
        ]
        return ShardSet(tuple(part.urls[0] for part in parts), sizes)

    return make


def as_it_is(image):
    return torch.zeros(1)


def orders(shards, start=0, stop=None, **options):
    """Return the labels of batches start to stop (default: of two epochs), a list each."""
    options = {"batch_size": 3, "rank": 0, "world_size": 1, "seed": 5, "shuffle_buffer": 8} | options
    stream = TrainStream(shards, transform=as_it_is, **options)
    end = EPOCHS * stream.batches_per_epoch if stop is None else stop
    return [labels.tolist() for _, labels in islice(stream.batches(start), end - start)]


def assert_an_epoch_is_shared_out(shards, world_size, batch_size, by_rank):
    steps = shards.total // (batch_size * world_size)
    assert [len(batches) for batches in by_rank] == [EPOCHS * steps] * world_size
    for epoch in range(EPOCHS):
        seen = [
            label for batches in by_rank for batch in batches[epoch * steps : (epoch + 1) * steps] for label in batch
        ]
        assert len(seen) == len(set(seen)) == steps * batch_size * world_size
        assert set(seen) <= set(range(shards.total))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_share_every_epoch_in_equal_steps_and_one_order_for_any_number_of_workers(laid_out, layout, world_size):
    shards = laid_out(*LAYOUTS[layout])
    by_rank = [orders(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_an_epoch_is_shared_out(shards, world_size, 3, by_rank)
    for workers in (1, 2):
        for rank, expected in enumerate(by_rank):
            assert orders(shards, rank=rank, world_size=world_size, num_workers=workers) == expected
    counted = []
    for rank in range(world_size):
        stream = EvalStream(shards, transform=as_it_is, batch_size=3, rank=rank, world_size=world_size)
        batches = [labels.tolist() for _, labels in stream.batches()]
        assert len(batches) == -(-shards.total // (3 * world_size))
        counted += [label for batch in batches for label in batch if label != -1]
    assert sorted(counted) == list(range(shards.total))


@pytest.mark.parametrize("number", range(int(os.environ.get("DSQ_ORDERS", "6"))))
def test_random_layouts_keep_the_same_promises(laid_out, number):
    rng = random.Random(number)
    shards = laid_out(*(rng.choice((1, 2, rng.randint(1, 40))) for _ in range(rng.randint(1, 12))))
    world_size, batch_size = rng.randint(1, 6), rng.randint(1, 5)
    if shards.total < world_size * batch_size:
        world_size, batch_size = 1, 1
    options = {"world_size": world_size, "batch_size": batch_size, "seed": number, "shuffle_buffer": rng.randint(1, 60)}
    by_rank = [orders(shards, rank=rank, **options) for rank in range(world_size)]
    assert_an_epoch_is_shared_out(shards, world_size, batch_size, by_rank)
    for rank, expected in enumerate(by_rank):
        start = rng.randrange(len(expected))
        assert orders(shards, start, len(expected), rank=rank, **options) == expected[start:]
        if rank == 0:
            assert orders(shards, start, len(expected), **options, num_workers=rng.randint(1, 3)) == expected[start:]


@pytest.mark.parametrize("layout", ["one shard", "a prime total"])
def test_from_any_of_fifty_stops_the_rest_of_the_order_is_the_same(laid_out, layout):
    shards, options = laid_out(*LAYOUTS[layout]), {"rank": 1, "world_size": 2}
    steps = shards.total // 6
    end = max(60, 4 * steps)
    unbroken = orders(shards, 0, end, **options)
    epoch_ends = {steps * epoch + near for epoch in (1, 2, 3) for near in (-1, 0, 1)}
    stops = sorted(
        epoch_ends | set(random.Random(0).sample(sorted(set(range(end)) - epoch_ends), 50 - len(epoch_ends)))
    )
    assert len(stops) == 50
    for stop in stops:
        assert orders(shards, stop, end, **options) == unbroken[stop:]
    pieces = []
    for number, (start, stop) in enumerate(zip([0, *stops], [*stops, end], strict=True)):
        pieces += (
            orders(shards, start, stop, **options, num_workers=(0, 1, 0, 0, 2)[number % 5]) if stop > start else []
        )
    assert pieces == unbroken


def of_a_step(shards, start, end, ranks, **options):
    """Return what all ranks draw together for steps start to end, a list each, of 12 samples a step."""
    size = {"batch_size": 12 // ranks, "world_size": ranks} | options
    by_rank = (orders(shards, start, end, rank=rank, **size) for rank in range(ranks))
    return [list(chain(*parts)) for parts in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("bucket", [1, 3])
@pytest.mark.parametrize(("begun", "now"), [(2, 1), (1, 2), (2, 4), (4, 2), (2, 3), (3, 2), (4, 3), (1, 6)])
def test_other_ranks_draw_for_every_step_what_those_that_began_would_have(laid_out, begun, now, bucket):
    shards, end = laid_out(*LAYOUTS["a prime total"]), 20
    kept = {"bucket_batches": bucket}
    undisturbed = of_a_step(shards, 0, end, begun, **kept)
    assert undisturbed != of_a_step(shards, 0, end, now, **kept)
    for start in (0, 3, 13):
        found = of_a_step(shards, start, end, now, order_ranks=begun, num_workers=start % 2, **kept)
        assert found == undisturbed[start:]


def test_an_order_of_ranks_that_cannot_have_drawn_such_steps_is_refused(laid_out):
    with pytest.raises(ValueError, match="3 samples on each of 2 ranks do not divide among 4"):
        orders(laid_out(*LAYOUTS["one shard"]), world_size=2, order_ranks=4)
