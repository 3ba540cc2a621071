import multiprocessing
import os
import random
import signal
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from dsquant.data import EvalStream, ShardSet, TrainStream, build_transform, order, write_shards
from dsquant.data import stream as stream_module
from dsquant.data.reading import read_shard
from dsquant.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
PLAIN = {"image_size": 8, "channels": 1, "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}


def plain():
    return build_transform(train=False, augment="none", **PLAIN)


def augmented():
    """Random in all three generators: Python's (timm's erasing), numpy's, torch's (torchvision's crop)."""
    crop = build_transform(train=True, augment="shift", **PLAIN)
    return lambda image: crop(image) + random.random() + np.random.rand() + torch.rand(1)


def train_stream(shards, transform=None, **options):
    options = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 3, "shuffle_buffer": 10} | options
    return TrainStream(shards, transform=transform or plain(), **options)


def eval_stream(shards, **options):
    return EvalStream(shards, transform=plain(), **{"batch_size": 4, "rank": 0, "world_size": 1} | options)


def labels_of(batches):
    return [label for _, labels in batches for label in labels.tolist()]


def assert_same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for (images, labels), (other_images, other_labels) in zip(left, right, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def break_sample(shards, number, **members):
    """Write the set anew with other members in one sample."""

    def samples():
        index = 0
        for url, count in zip(shards.urls, shards.counts, strict=True):
            for record in list(read_shard(url, count)):
                kept = {name: content for name, content in record.items() if not name.startswith("__")}
                yield record["__key__"], kept | members if index == number else kept
                index += 1

    return write_shards(list(samples()), Path(shards.urls[0]).parent, "train", shards.counts[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("count", "per_shard"), [(45, 7), (45, 45), (45, 2)])
def test_ranks_share_an_epoch_in_equal_steps_without_seeing_a_sample_twice(make_set, world_size, count, per_shard):
    shards = make_set(count, per_shard)
    seen = []
    for rank in range(world_size):
        stream = train_stream(shards, rank=rank, world_size=world_size)
        assert stream.batches_per_epoch == count // (4 * world_size)
        batches = list(islice(stream.batches(), stream.batches_per_epoch))
        assert all(images.shape == (4, 1, 8, 8) and images.dtype == torch.float32 for images, _ in batches)
        assert all(labels.shape == (4,) and labels.dtype == torch.int64 for _, labels in batches)
        seen += labels_of(batches)
    assert len(seen) == len(set(seen)) == count // (4 * world_size) * 4 * world_size
    assert set(seen) <= set(range(count))


def test_images_come_with_their_own_labels(make_set, samples):
    originals = dict(enumerate(members["png"] for _, members in samples(45)))
    for images, labels in islice(train_stream(make_set()).batches(), 11):
        for image, label in zip(images, labels.tolist(), strict=True):
            expected, _ = stream_module.decode(
                {"__url__": "", "__key__": "", "png": originals[label], "cls": b"0"}, plain()
            )
            assert torch.equal(image, expected)


@pytest.mark.parametrize("start", [0, 5, 13])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_the_order_is_the_same_for_any_number_of_workers(make_set, start, rank, world_size):
    shards = make_set()
    expected, *others = (
        list(islice(train_stream(shards, augmented(), rank=rank, world_size=world_size, num_workers=workers)
                    .batches(start), 14))
        for workers in (0, 1, 2, 3)
    )  # fmt: skip
    for other in others:
        assert_same(other, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumed_at_batch_k_continues_bit_for_bit(make_set, workers):
    shards = make_set()
    unbroken = list(islice(train_stream(shards, augmented()).batches(), 30))
    for start in (1, 7, 10, 11, 12, 25):
        resumed = train_stream(shards, augmented(), num_workers=workers).batches(start)
        assert_same(islice(resumed, 30 - start), unbroken[start:])


def test_a_resume_decodes_and_opens_nothing_of_the_past(make_set, monkeypatch):
    shards = make_set(48, 4)
    decoded, opened = [], []
    decode = stream_module.decode
    monkeypatch.setattr(stream_module, "decode", lambda row, *rest: decoded.append(row) or decode(row, *rest))
    monkeypatch.setattr(order, "read_shard", lambda url, *rest: opened.append(url) or read_shard(url, *rest))
    stream = train_stream(shards, shuffle_buffer=4)
    next(stream.batches(10))
    assert len(decoded) == 4
    assert len(opened) <= 4


def test_epochs_differ_and_leave_out_different_samples(make_set):
    stream = train_stream(make_set(47, 5), augmented())
    batches = list(islice(stream.batches(), 33))
    epochs = [labels_of(batches[first : first + 11]) for first in (0, 11, 22)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(range(47)) - frozenset(epoch) for epoch in epochs}) > 1
    first, second = ({label: image for images, labels in batches[begin : begin + 11]
                      for label, image in zip(labels.tolist(), images, strict=True)} for begin in (0, 11))  # fmt: skip
    assert not any(torch.equal(first[label], second[label]) for label in set(first) & set(second))


def test_seeds_give_different_orders_and_the_same_seed_the_same(make_set):
    shards = make_set()
    first, again, other = (list(islice(train_stream(shards, seed=seed).batches(), 11)) for seed in (3, 3, 4))
    assert_same(first, again)
    assert labels_of(first) != labels_of(other)


def test_the_shuffle_buffer_mixes_samples_of_a_shard(make_set):
    shards = make_set(40, 40)
    ordered = labels_of(islice(train_stream(shards, shuffle_buffer=1).batches(), 10))
    mixed = labels_of(islice(train_stream(shards, shuffle_buffer=20).batches(), 10))
    assert ordered == list(range(40))
    assert sorted(mixed) == ordered != mixed


@pytest.mark.parametrize("workers", [0, 1])
def test_the_generators_of_the_main_process_are_left_alone(make_set, workers):
    shards = make_set()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    list(islice(train_stream(shards, augmented(), num_workers=workers).batches(), 12))
    list(eval_stream(shards, num_workers=workers).batches())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (7, 0), (50, 0), (1, 1), (2, 3), (3, 2)]
)
def test_every_validation_sample_is_counted_once(make_set, world_size, workers):
    shards = make_set(45, 7)
    counted, lengths = [], set()
    for rank in range(world_size):
        stream = eval_stream(shards, rank=rank, world_size=world_size, num_workers=workers)
        batches = list(stream.batches())
        lengths.add(len(batches))
        assert stream.batches_per_epoch == len(batches)
        for images, labels in batches:
            assert images.shape == (4, 1, 8, 8)
            assert labels.shape == (4,)
            assert not images[labels == -1].any()
        counted += [label for label in labels_of(batches) if label != -1]
    assert lengths == {-(-45 // (4 * world_size))}
    assert sorted(counted) == list(range(45))


def test_a_rank_is_one_of_the_world(make_set):
    for kind in (train_stream, eval_stream):
        with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
            kind(make_set(), rank=2, world_size=2)


def test_too_few_samples_for_a_batch_on_each_rank_is_an_error(make_set):
    with pytest.raises(DataError, match=r"45 training samples do not fill one batch of 16 on each of 3 ranks"):
        train_stream(make_set(), batch_size=16, world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"png": b"no image"}, "cannot decode png"),
        ({"cls": b"cat"}, "cls holds b'cat', not a label"),
        ({"cls": b"-1"}, "cls holds b'-1', not a label"),
    ],
)
def test_a_bad_sample_is_named_once_and_plainly(make_set, workers, members, cause):
    shards = break_sample(make_set(), 17, **members)
    for stream in (train_stream(shards, num_workers=workers), eval_stream(shards, num_workers=workers)):
        with pytest.raises(DataError) as raised:
            list(islice(stream.batches(), 11))
        assert str(raised.value).startswith(f"shard {shards.urls[2]}, sample sample0017: {cause}")
        assert "Traceback" not in str(raised.value)


def test_workers_end_as_soon_as_one_has_met_an_error(make_set):
    shards, others = break_sample(make_set(), 17, cls=b"cat"), set(multiprocessing.active_children())
    with pytest.raises(DataError, match="sample0017") as raised:
        list(eval_stream(shards, num_workers=2).batches())
    assert raised.tb is not None  # it holds the frames that held the workers
    assert set(multiprocessing.active_children()) <= others


def test_a_damaged_image_is_named(make_set, samples):
    _, members = list(samples(18))[17]
    shards = break_sample(make_set(), 17, png=members["png"][:60])
    with pytest.raises(DataError, match="sample0017: cannot decode png"):
        list(eval_stream(shards).batches())


def test_a_transform_that_fails_names_the_sample(make_set):
    rgb = build_transform(train=False, augment="none", **PLAIN | {"channels": 3})
    stream = EvalStream(make_set(), transform=lambda image: rgb(image)[7], batch_size=4, rank=0, world_size=1)
    with pytest.raises(DataError, match=r"sample0000: cannot transform the L image of size \(8, 8\) \(IndexError"):
        list(stream.batches())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", ["in data", "in a header", "between members", "nothing"])
def test_a_tar_truncated_while_streaming_is_named(make_set, workers, kept):
    shards = make_set()
    with tarfile.open(shards.urls[3]) as tar:
        member = tar.getmembers()[7]
    size = {"in data": member.offset_data + 1, "in a header": member.offset + 100, "between members": member.offset}
    os.truncate(shards.urls[3], size.get(kept, 0))
    for stream in (train_stream(shards, num_workers=workers), eval_stream(shards, num_workers=workers)):
        with pytest.raises(DataError) as raised:
            list(islice(stream.batches(), 11))
        message = str(raised.value)
        assert message.startswith(f"shard {shards.urls[3]}: ")
        assert "tools/make_shards.py" in message
        assert "<" not in message
        assert "member" not in message


def test_a_shard_that_vanished_or_grew_is_named(make_set):
    shards = make_set()
    fewer = ShardSet(shards.urls, (7, 7, 6, 7, 7, 7, 3))
    with pytest.raises(DataError, match=r"train-0002.tar: more than 6 samples where 6 were counted"):
        list(eval_stream(fewer).batches())
    os.unlink(shards.urls[2])
    with pytest.raises(DataError, match=r"train-0002.tar: \[Errno 2\] No such file"):
        list(eval_stream(shards).batches())


def test_pipes_may_be_left_before_their_end(make_set, tmp_path):
    local = make_set(45, 45)
    piped = ShardSet.open(f"pipe:cat {tmp_path}/set/train-{{0000..0000}}.tar")
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "num_workers": 1}
        assert_same(eval_stream(piped, **options).batches(), eval_stream(local, **options).batches())


def report_worker(image):
    """Give what a worker process does about signals, its threads, and its number, as an image."""
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    return torch.tensor([[[*map(int, handlers), torch.get_num_threads(), get_worker_info().id]]], dtype=torch.float32)


def test_workers_leave_signals_to_the_parent_and_use_one_thread(make_set):
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        stream = train_stream(make_set(), report_worker, num_workers=2)
        rows = torch.cat([images.reshape(-1, 5) for images, _ in islice(stream.batches(3), 4)]).int().tolist()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    ignored, default = int(signal.SIG_IGN), int(signal.SIG_DFL)
    assert rows == [[default, ignored, ignored, 1, worker] for worker in (0, 1, 0, 1) for _ in range(4)]


@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"the CIFAR-10 shards are not at {CIFAR}")
def test_the_cifar10_shards_stream_as_they_are(tmp_path):
    shards = ShardSet.open(f"{CIFAR}/train-*.tar", cache_dir=tmp_path)
    assert (len(shards), shards.total) == (20, 50_000)
    assert ShardSet.open(f"{CIFAR}/train-{{0000..0019}}.tar", cache_dir=tmp_path) == shards
    transform = build_transform(
        image_size=32, channels=3, train=True, augment="flip_crop", mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26),
        interpolation="bicubic", crop_pct=1.0,
    )  # fmt: skip
    options = {"transform": transform, "batch_size": 64, "rank": 1, "world_size": 8, "seed": 0}
    expected, workers = (
        list(islice(TrainStream(shards, **options, num_workers=number).batches(40), 3)) for number in (0, 2)
    )
    assert_same(workers, expected)
    assert expected[0][0].shape == (64, 3, 32, 32)
    assert set(labels_of(expected)) == set(range(10))
    test = ShardSet.open(f"{CIFAR}/test-000[01].tar", cache_dir=tmp_path)
    last = EvalStream(test, transform=transform, batch_size=100, rank=49, world_size=50)
    assert [(labels != -1).sum().item() for _, labels in last.batches()] == [100]
