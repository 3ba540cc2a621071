"""Every kind of damage to shards: an error where none is allowed; named, counted and worked around where some is."""

import gzip
import io
import logging
import os
import re
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsquant.data import EvalStream, ShardSet, TrainStream, build_transform, write_shards
from dsquant.data.damage import damage_report
from dsquant.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
PER_SHARD, COUNT = 6, 24
DAMAGED = range(6, 12)  # the samples of the second shard
ALL = set(DAMAGED)


def jpeg(number):
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format="JPEG")
    return stream.getvalue()


def members(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]


def rewrite(path, content):
    with tarfile.open(path, "w") as tar:
        for name, data in content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def change(name, data):
    """Give sample 8 other bytes in one member, or with None take that member away."""

    def damage(path):
        kept = [(n, data if n == f"sample0008.{name}" else old) for n, old in members(path)]
        rewrite(path, [(n, content) for n, content in kept if content is not None])

    return damage


def header(name, offset=0):
    """Find where the header of a member begins."""

    def of(path):
        with tarfile.open(path) as tar:
            return tar.getmember(name).offset + offset

    return of


def cut(place):
    return lambda path: os.truncate(path, place(path))


def overwrite(place, data):
    def damage(path):
        offset = place(path)
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def absurd_size(path):
    """Make the header of a member claim 4 GB, with a checksum that is right."""
    member = tarfile.TarInfo("sample0008.png")
    member.size = 4 << 30
    overwrite(header("sample0008.png"), member.tobuf(tarfile.USTAR_FORMAT)[:512])(path)


def with_bad_crc(path):
    png = bytearray(dict(members(path))["sample0008.png"])
    png[29] ^= 1  # of the checksum of IHDR
    change("png", bytes(png))(path)


def with_changed_pixels(path):
    png = bytearray(dict(members(path))["sample0008.png"])
    png[png.index(b"IDAT") + 12] ^= 0xFF
    change("png", bytes(png))(path)


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def append(path):
    path.write_bytes(path.read_bytes() + bytes(1024))


def double(path):
    """Put the label of sample 8 in twice."""
    content = members(path)
    at = [name for name, _ in content].index("sample0008.cls")
    rewrite(path, content[: at + 1] + content[at:])


def replace_by(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


# name -> what is done to the shard, samples that are lost, the error where nothing may be, and whether opening finds it.
# Where opening does not find it, the index knows the new size, as one written after the damage would.
OPENING, READING = True, False
KINDS = {
    "truncated in a header": (cut(header("sample0008.cls", 100)), {7, 8, 9, 10, 11}, r"\d+ bytes, but .* says", OPENING),
    "truncated in an image": (cut(header("sample0008.png", 520)), {8, 9, 10, 11}, "unexpected end of data", READING),
    "truncated in a label": (cut(header("sample0008.cls", 512)), {7, 8, 9, 10, 11}, "unexpected end of data", READING),
    "cut between members": (cut(header("sample0008.png")), {8, 9, 10, 11}, "3 samples where 6 were counted", READING),
    "cut between samples": (cut(header("sample0008.cls")), {7, 8, 9, 10, 11}, "2 samples where 6 were", READING),
    "zeros in the middle": (
        overwrite(header("sample0009.cls"), bytes(1024)), {8, 9, 10, 11}, "3 samples where 6 were counted", READING,
    ),
    "garbage in a header": (
        overwrite(header("sample0009.png"), b"\xff" * 300), {9, 10, 11}, "4 samples where 6 were counted", READING,
    ),
    "garbage in the first header": (overwrite(lambda path: 0, b"\xff" * 300), ALL, "after 0 of 6 samples", READING),
    "a member of absurd size": (absurd_size, {8, 9, 10, 11}, "unexpected end of data, after 2 of 6", READING),
    "an empty file": (cut(lambda path: 0), ALL, "0 bytes, but .* says", OPENING),
    "an empty file that is indexed": (cut(lambda path: 0), ALL, "after 0 of 6 samples", READING),
    "not a tar": (lambda path: path.write_bytes(b"no tar at all" * 500), ALL, "after 0 of 6 samples", READING),
    "compressed": (compress, {11}, r"\d+ bytes, but .* says", OPENING),
    "bytes after its end": (append, {11}, r"\d+ bytes, but .* says", OPENING),
    "more samples than counted": (
        lambda path: rewrite(path, [*members(path), ("x.png", b""), ("x.cls", b"0")]), {11},
        "more than 6 samples where 6 were counted", READING,
    ),
    "fewer samples than counted": (
        lambda path: rewrite(path, members(path)[:-2]), {10, 11}, "5 samples where 6 were counted", READING,
    ),
    "no image": (change("png", None), {8}, "sample sample0008: no image .* member, only cls", READING),
    "no label": (change("cls", None), {8}, "sample sample0008: no cls member, only png", READING),
    "a label twice": (double, {8}, "sample sample0008: sample0008.cls: duplicate file name", READING),
    "a label that is a word": (change("cls", b"cat"), {8}, "sample sample0008: cls holds b'cat', not a label", READING),
    "an empty label": (change("cls", b""), {8}, "sample0008: cls holds b'', not a label", READING),
    "a negative label": (change("cls", b"-1"), {8}, "sample0008: cls holds b'-1', not a label", READING),
    "a label beyond 64 bits": (change("cls", b"9" * 20), {8}, "sample0008: cls holds b'9{20}', not a label", READING),
    "an image of no bytes": (change("png", b""), {8}, "sample0008: cannot decode png", READING),
    "a truncated JPEG": (change("png", jpeg(8)[:-40]), {8}, "sample0008: cannot decode png .*truncated", READING),
    "a PNG with a bad checksum": (with_bad_crc, {8}, "sample0008: cannot decode png", READING),
    "a PNG with changed pixels": (with_changed_pixels, {8}, "sample0008: cannot decode png", READING),
    "a directory in its place": (replace_by(Path.mkdir), ALL, r"\d+ bytes, but .* says", OPENING),
    "missing": (Path.unlink, ALL, "index.json lists train-0001.tar, which is missing", OPENING),
    "a link to itself": (replace_by(lambda path: path.symlink_to(path)), ALL, "lists train-0001.tar, which", OPENING),
    "a disk that fails": (replace_by(lambda path: path.symlink_to("/proc/self/mem")), ALL, "0 bytes, but", OPENING),
    "a disk that fails later": (  # what lies at 0 of a process's memory cannot be read, by root neither
        replace_by(lambda path: path.symlink_to("/proc/self/mem")), ALL, r"Input/output error.*, after 0 of 6", READING,
    ),
}  # fmt: skip


def transform():
    look = {"image_size": 8, "channels": 1, "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}
    return build_transform(train=True, augment="shift", **look)


def train_stream(shards, **options):
    chosen = {"transform": transform(), "batch_size": 4, "rank": 0, "world_size": 1, "seed": 3, "shuffle_buffer": 8}
    return TrainStream(shards, **chosen | options)


def labels_of(batches):
    return [label for _, labels in batches for label in labels.tolist()]


@pytest.fixture
def damaged_set(make_set):
    """Return `make(kind)`: the folder of a set of four shards whose second is damaged."""

    def make(kind):
        damage, lost, error, found_by = KINDS[kind]
        written = make_set(COUNT, PER_SHARD)
        path = Path(written.urls[1])
        damage(path)
        index = path.with_name("index.json")
        if found_by is READING:  # the tools would find most of these damages when they write an index
            said = f'"filesize": {written.sizes[1]}'
            entries = index.read_text().split("},")
            entries[1] = entries[1].replace(said, f'"filesize": {path.stat().st_size}')
            index.write_text("},".join(entries))
        return path.parent, lost, error

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_where_none_is_allowed(damaged_set, kind):
    folder, _, error = damaged_set(kind)
    expected = re.compile(rf"shard \S*train-0001.tar.*{error}|{error}")
    if KINDS[kind][3] is OPENING:
        with pytest.raises(DataError, match=expected):
            ShardSet.open(folder)
        return
    shards = ShardSet.open(folder)
    for stream in (train_stream(shards), EvalStream(shards, transform=transform(), batch_size=4, rank=0, world_size=1)):
        with pytest.raises(DataError, match=expected) as raised:
            list(islice(stream.batches(), 6))
        assert str(raised.value).startswith(f"shard {shards.urls[1]}")


@pytest.mark.parametrize("kind", KINDS)
def test_allowed_damage_is_named_and_counted_and_all_other_samples_are_delivered(damaged_set, kind, caplog):
    folder, lost, _ = damaged_set(kind)
    shards = ShardSet.open(folder, damaged=True)
    stream = train_stream(shards, max_damaged=len(lost))
    batches = list(islice(stream.batches(), 2 * stream.batches_per_epoch))
    assert all(images.shape == (4, 1, 8, 8) and torch.isfinite(images).all() for images, _ in batches)
    for epoch in (batches[:6], batches[6:]):
        seen = labels_of(epoch)
        assert len(seen) == COUNT
        assert set(seen) == set(range(COUNT)) - lost
    assert set(stream.damage.found) == {(shards.urls[1], number - DAMAGED[0]) for number in lost}
    (entry,) = damage_report([stream.damage.found, {}, stream.damage.found])
    assert (entry["shard"], entry["samples"]) == (shards.urls[1], sorted(number - DAMAGED[0] for number in lost))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum(int(re.search(r"(\d+) damaged sample", line).group(1)) for line in warned) == len(lost)
    assert all(line.startswith("rank 0, worker 0: ") and line.endswith(entry["cause"]) for line in warned)


@pytest.mark.parametrize("kind", ["truncated in an image", "a label that is a word", "missing"])
def test_one_sample_more_than_allowed_is_an_error_that_names_it_and_the_limit(damaged_set, kind):
    folder, lost, _ = damaged_set(kind)
    shards = ShardSet.open(folder, damaged=True)
    stream = train_stream(shards, max_damaged=len(lost) - 1) if len(lost) > 1 else train_stream(shards)
    with pytest.raises(DataError) as raised:
        list(islice(stream.batches(), 6))
    assert str(raised.value).startswith(f"shard {shards.urls[1]}")
    assert len(stream.damage.found) == len(lost) - 1
    assert (f"Another {len(lost) - 1} damaged samples were skipped" in str(raised.value)) == (len(lost) > 1)
    with pytest.raises(DataError, match=r"train-0001\.tar"):
        list(EvalStream(shards, transform=transform(), batch_size=4, rank=0, world_size=1).batches())


@pytest.mark.parametrize("kind", ["truncated in an image", "truncated in a label", "a truncated JPEG", "missing"])
def test_damage_changes_neither_steps_nor_order_for_any_number_of_ranks_workers_and_resumes(damaged_set, kind):
    folder, lost, _ = damaged_set(kind)
    shards, intact = ShardSet.open(folder, damaged=True), set(range(COUNT)) - lost
    for world_size in (1, 2):
        epoch = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "batch_size": 3, "max_damaged": 6}
            whole = train_stream(shards, **options)
            expected = list(islice(whole.batches(), 10))
            assert whole.batches_per_epoch == COUNT // (3 * world_size)
            epoch += labels_of(expected[: whole.batches_per_epoch])
            for start, workers in ((0, 2), (3, 0), (5, 3), (9, 0)):
                again = list(islice(train_stream(shards, **options, num_workers=workers).batches(start), 10 - start))
                assert len(again) == len(expected[start:])
                for (images, labels), (same, as_before) in zip(again, expected[start:], strict=True):
                    assert torch.equal(images, same)
                    assert torch.equal(labels, as_before)
        assert set(epoch) == intact


def test_a_replacement_is_augmented_anew(damaged_set):
    folder, _, _ = damaged_set("no image")
    shards = ShardSet.open(folder, damaged=True)
    views = []
    for images, labels in islice(train_stream(shards, max_damaged=1).batches(), 12):
        for label in {label for label in labels.tolist() if labels.tolist().count(label) > 1}:
            views += [[image for image, other in zip(images, labels.tolist(), strict=True) if other == label]]
    assert len(views) == 2  # once an epoch
    assert any(not torch.equal(first, second) for first, second in views)


def test_a_set_without_a_readable_sample_is_an_error(make_set):
    shards = make_set(8, 4)
    for url in shards.urls:
        os.truncate(url, 0)
    with pytest.raises(DataError, match=r"shard .*train-000\d.tar: .*after 0 of 4 samples"):
        next(train_stream(ShardSet.open(Path(shards.urls[0]).parent, damaged=True), max_damaged=100).batches())


def test_bytes_that_the_disk_does_not_give_cost_their_sample_alone(make_set, monkeypatch):
    shards = make_set(COUNT, PER_SHARD)
    extract = tarfile.TarFile.extractfile

    def failing(tar, member):
        if member.name == "sample0008.cls":
            raise OSError(5, "Input/output error")
        return extract(tar, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", failing)
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"train-0001.tar, sample sample0008: \[Errno 5\] Input/output error"):
            list(islice(train_stream(shards, num_workers=workers).batches(), 6))
        stream = train_stream(shards, max_damaged=1, num_workers=workers)
        assert set(labels_of(islice(stream.batches(), 6))) == set(range(COUNT)) - {8}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_in_an_epoch_is_worked_around(make_set, workers):
    shards = make_set(48, 2)
    stream = train_stream(shards, max_damaged=48, num_workers=workers, shuffle_buffer=1)
    batches = stream.batches()
    seen = list(islice(batches, 3))
    for url in shards.urls[::2]:
        os.unlink(url)
    seen += list(islice(batches, 21))
    gone = {4 * shard + half for shard in range(12) for half in (0, 1)}
    assert all(images.shape == (4, 1, 8, 8) for images, _ in seen)
    assert set(labels_of(seen[12:])) == set(range(48)) - gone
    assert {shard for shard, _ in stream.damage.found} == set(shards.urls[::2])
    with pytest.raises(DataError, match="No such file"):
        list(islice(train_stream(shards, num_workers=workers).batches(), 12))


TEXTS = {
    "no JSON": (b"{no json", "no readable json member"),
    "no object": (b"[1, 2]", "json must hold a text"),
    "no UTF-8": (b'{"text": "\xff"}', "no readable json member"),
    "endless brackets": (b"[" * 100_000, "no readable json member"),
    "a text that cannot be tokenized": (b'{"text": "broken"}', "cannot tokenize it .ValueError: no token."),
}


class Letters:
    """Stand for a tokenizer: the length of a text is its token."""

    def __call__(self, sample):
        if sample["text"] == "broken":
            raise ValueError("no token")
        return torch.tensor([len(sample["text"])])


@pytest.mark.parametrize("kind", TEXTS)
def test_damaged_text_is_named_or_worked_around_in_buckets_too(tmp_path, kind):
    content, error = TEXTS[kind]
    samples = [(f"s{i:02d}", {"json": b'{"text": "%s"}' % (b"x" * i), "cls": b"%d" % i}) for i in range(16)]
    samples[5] = ("s05", {"json": content, "cls": b"5"})
    shards = write_shards(samples, tmp_path, "train", 8)
    for bucket_batches in (1, 2):
        options = {"transform": Letters(), "bucket_batches": bucket_batches}
        with pytest.raises(DataError, match=f"train-0000.tar, sample s05: {error}"):
            list(islice(train_stream(shards, **options).batches(), 4))
        stream = train_stream(shards, **options, max_damaged=1)
        batches = list(islice(stream.batches(), 8))
        assert set(labels_of(batches[:4])) == set(labels_of(batches[4:])) == set(range(16)) - {5}
        assert set(stream.damage.found) == {(shards.urls[0], 5)}


def test_every_byte_of_a_shard_may_be_hit_and_nothing_but_a_data_error_comes_of_it(make_set):
    """Overwrite a block at random places: samples are either those of the whole shard or named, for any worker the same."""
    shards = make_set(12, 6)
    path = Path(shards.urls[0])
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(int(os.environ.get("DSQ_DAMAGES", "40"))):
        place, length = int(rng.integers(len(whole))), int(rng.integers(1, 600))
        path.write_bytes(whole[:place] + rng.bytes(length) + whole[place + length :][: len(whole)])
        stream = train_stream(shards, max_damaged=12)
        batches = [labels.tolist() for _, labels in islice(stream.batches(), 3)]
        by_worker = [list(islice(stream._worker_batches(0, worker, 3), 1)) for worker in range(3)]
        assert [batch[1].tolist() for ((batch, *_),) in by_worker] == batches
        lost = {(damage.shard, damage.number) for ((*_, damages),) in by_worker for damage in damages}
        assert lost == set(stream.damage.found)
        seen = {label for batch in batches for label in batch}
        named = {number for _, number in stream.damage.found}
        assert set(range(6, 12)) <= seen, zlib.crc32(path.read_bytes())
        assert len(set(range(6)) - seen) <= len(named)
