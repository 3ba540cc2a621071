import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from dsquant.data import ShardSet, write_index, write_shards
from dsquant.data import shards as shards_module
from dsquant.errors import DataError


def drop_index(shards):
    folder = Path(shards.urls[0]).parent
    (folder / "index.json").unlink()
    return folder


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_folder_a_glob_and_a_brace_pattern_find_the_same_shards(make_set, tmp_path):
    written = make_set(45, 7)
    for location in (tmp_path / "set", f"{tmp_path}/set/train-*.tar", f"{tmp_path}/set/train-{{0000..0006}}.tar"):
        found = ShardSet.open(location)
        assert found == written
        assert (found.counts, found.total, len(found)) == ((7,) * 6 + (3,), 45, 7)


def test_relative_locations_become_absolute_addresses(make_set, tmp_path, monkeypatch):
    written = make_set()
    monkeypatch.chdir(tmp_path)
    assert ShardSet.open("set/train-{0000..0006}.tar") == ShardSet.open("set") == written


def test_scanned_counts_are_those_that_webdataset_reads(tmp_path, make_set):
    folder = drop_index(make_set(20, 6))
    label = [("cls", b"1")]
    odd = [("__meta__/note.txt", b""), ("noextension", b"x")]
    for key in ("a/one", "a/two", "b/one"):
        odd += [(f"{key}.{suffix}", content) for suffix, content in [("JPG", b"j"), ("seg.png", b"s"), *label]]
    write_tar(folder / "train-0004.tar", odd)
    found = ShardSet.open(folder)
    for url, count in zip(found.urls, found.counts, strict=True):
        assert count == len(list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False)))
    assert found.counts == (6, 6, 6, 2, 3)


def test_counts_are_scanned_once_and_again_after_a_change(make_set, tmp_path, samples, monkeypatch):
    folder = drop_index(make_set(20, 5))
    scanned = []
    count = shards_module.count_samples
    monkeypatch.setattr(shards_module, "count_samples", lambda path: scanned.append(Path(path).name) or count(path))
    cache = tmp_path / "cache"
    assert ShardSet.open(folder, cache).counts == ShardSet.open(folder, cache).counts == (5, 5, 5, 5)
    assert scanned == [f"train-000{number}.tar" for number in range(4)]
    scanned.clear()
    write_shards(samples(8), tmp_path / "other", "train", 8)
    os.replace(tmp_path / "other" / "train-0000.tar", folder / "train-0002.tar")
    assert ShardSet.open(folder, cache).counts == (5, 5, 8, 5)
    assert scanned == ["train-0002.tar"]
    scanned.clear()
    status = os.stat(folder / "train-0001.tar")
    os.utime(folder / "train-0001.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert ShardSet.open(folder, cache).total == 23
    assert scanned == ["train-0001.tar"]
    for file in cache.iterdir():
        file.write_text("{half a file")
    assert ShardSet.open(folder, cache).total == 23


@pytest.mark.parametrize("kept", ["in data", "in a header", "between members", "nothing"])
def test_a_truncated_tar_is_named_with_the_place_and_the_fix(make_set, kept):
    folder = drop_index(make_set(20, 10))
    path = folder / "train-0001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[7]
    size = {"in data": member.offset_data + 1, "in a header": member.offset + 100, "between members": member.offset}
    os.truncate(path, size.get(kept, 0))
    with pytest.raises(DataError) as raised:
        ShardSet.open(folder)
    message = str(raised.value)
    assert str(path) in message
    assert f"of {size.get(kept, 0)};" in message
    assert "tools/make_shards.py" in message


def test_a_corrupt_header_is_named_with_its_byte(make_set):
    folder = drop_index(make_set(20, 10))
    path = folder / "train-0000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[5].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    with pytest.raises(DataError, match=f"train-0000.tar: corrupt header, at byte {offset} of"):
        ShardSet.open(folder)


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "train-0000.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DataError, match=r"train-0000\.tar: .*at byte 0 of 1600"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize(
    ("members", "missing"),
    [([("x.png", b"i")], "no cls member, only png"), ([("x.cls", b"1"), ("x.txt", b"t")], "no image")],
)
def test_a_missing_member_names_shard_and_sample(tmp_path, members, missing):
    write_tar(tmp_path / "train-0000.tar", members)
    with pytest.raises(DataError, match=rf"train-0000.tar, sample x: {missing}"):
        ShardSet.open(tmp_path)


def test_missing_folders_and_patterns_without_a_match_are_named(make_set, tmp_path):
    make_set()
    with pytest.raises(DataError, match=r"the folder .*/nowhere does not exist"):
        ShardSet.open(tmp_path / "nowhere" / "train-*.tar")
    with pytest.raises(DataError, match=r"no shards at .*/absent"):
        ShardSet.open(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no shards at .*/val-\*\.tar: that folder has no such file"):
        ShardSet.open(tmp_path / "set" / "val-*.tar")
    with pytest.raises(DataError, match=r"no shards at .*train-0007\.tar"):
        ShardSet.open(f"{tmp_path}/set/train-{{0000..0009}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no shards at"):
        ShardSet.open(tmp_path / "empty")


def test_a_folder_of_two_sets_asks_which_one(make_set, tmp_path):
    make_set(10, 5, prefix="train")
    make_set(6, 3, prefix="val")
    with pytest.raises(DataError, match=r"several sets of shards \(train, val\)"):
        ShardSet.open(tmp_path / "set")
    assert ShardSet.open(tmp_path / "set" / "train-*.tar").counts == (5, 5)
    assert ShardSet.open(tmp_path / "set" / "val-*.tar").counts == (3, 3)


def test_an_index_tells_a_missing_and_a_changed_shard(make_set, tmp_path):
    shards = make_set(20, 5)
    os.rename(shards.urls[3], tmp_path / "aside")
    with pytest.raises(DataError, match=r"index.json lists train-0003.tar, which is missing"):
        ShardSet.open(tmp_path / "set")
    os.rename(tmp_path / "aside", shards.urls[3])
    os.truncate(shards.urls[2], 700)
    with pytest.raises(DataError, match=r"train-0002.tar: 700 bytes, but .*index.json says"):
        ShardSet.open(tmp_path / "set")


def test_equal_samples_make_equal_bytes(make_set):
    for first, second in zip(make_set(folder="a").urls, make_set(folder="b").urls, strict=True):
        assert Path(first).read_bytes() == Path(second).read_bytes()
    with tarfile.open(first) as tar:
        assert {(member.mtime, member.uid, member.gid) for member in tar} == {(0, 0, 0)}


def test_a_failing_source_leaves_no_half_written_set(tmp_path, samples):
    def failing():
        yield from samples(12)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(failing(), tmp_path / "new", "train", 5)
    assert list((tmp_path / "new").iterdir()) == []
    before = write_shards(samples(9), tmp_path / "old", "train", 5)
    contents = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(failing(), tmp_path / "old", "train", 3)
    assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == contents
    assert ShardSet.open(tmp_path / "old") == before


def test_a_writer_killed_while_it_puts_shards_in_place_leaves_no_set(tmp_path, samples, monkeypatch):
    replace, calls = os.replace, []

    def killed(source, target):
        if str(target).endswith("0001.tar"):
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(samples(9), tmp_path / "set", "train", 3)
    monkeypatch.undo()
    assert (tmp_path / "set" / "train-0000.tar").exists()
    with pytest.raises(DataError, match="half-written"):
        ShardSet.open(tmp_path / "set")
    assert write_shards(samples(9), tmp_path / "set", "train", 3) == ShardSet.open(tmp_path / "set")


def test_a_smaller_set_replaces_a_larger_one_whole(tmp_path, samples):
    write_shards(samples(20), tmp_path, "train", 5)
    (tmp_path / ".train-0003.tar.partial").write_bytes(b"of a writer that was killed")
    write_shards(samples(20), tmp_path, "val", 20)
    written = write_shards(samples(10), tmp_path, "train", 5)
    assert ShardSet.open(tmp_path / "train-*.tar") == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json", "train-0000.tar", "train-0001.tar", "val-0000.tar"
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["a.b", "", "__meta__"])
def test_keys_that_webdataset_would_split_or_skip_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="sample key"):
        write_shards([(key, {"png": b"i", "cls": b"0"})], tmp_path, "train", 5)


def test_repeated_keys_missing_members_and_empty_sources_are_refused(tmp_path):
    sample = ("a", {"png": b"i", "cls": b"0"})
    with pytest.raises(DataError, match="occurs twice"):
        write_shards([sample, sample], tmp_path, "train", 5)
    with pytest.raises(DataError, match="sample b: no cls member"):
        write_shards([("b", {"png": b"i"})], tmp_path, "train", 5)
    with pytest.raises(DataError, match="no samples"):
        write_shards([], tmp_path, "train", 5)
    assert list(tmp_path.iterdir()) == []


def test_remote_shards_take_their_counts_from_the_index_beside_them(make_set, tmp_path):
    written = make_set(20, 6)
    pattern = f"pipe:cat {tmp_path}/set/train-{{0000..0003}}.tar"
    found = ShardSet.open(pattern)
    assert found.counts == written.counts
    assert found.urls[1] == f"pipe:cat {written.urls[1]}"
    os.rename(tmp_path / "set" / "index.json", tmp_path / "elsewhere.json")
    assert ShardSet.open(pattern, index=str(tmp_path / "elsewhere.json")) == found
    with pytest.raises(DataError, match=r"no usable shard index at pipe:cat .*make_shards.py index"):
        ShardSet.open(pattern)
    with pytest.raises(DataError, match=r"does not list pipe:cat .*train-0004.tar"):
        ShardSet.open(f"pipe:cat {tmp_path}/set/train-{{0000..0004}}.tar", index=str(tmp_path / "elsewhere.json"))


def test_http_shards_are_read_with_their_index(make_set, tmp_path):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    from dsquant.data.reading import read_shard

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    written = make_set(10, 5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "set")))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/train-{{0000..0001}}.tar"
        found = ShardSet.open(address)
        assert found.counts == written.counts
        assert len(list(read_shard(found.urls[1], 5))) == 5
        with pytest.raises(DataError, match=r"train-0002.tar"):
            list(read_shard(f"http://127.0.0.1:{server.server_port}/train-0002.tar", 5))
    finally:
        server.shutdown()
        server.server_close()


def test_write_index_describes_shards_that_came_without_one(make_set, tmp_path):
    written = make_set(20, 6)
    folder = drop_index(written)
    assert write_index(folder) == ShardSet.open(folder) == written
    entries = json.loads((folder / "index.json").read_text())["shardlist"]
    assert [(entry["url"], entry["nsamples"]) for entry in entries] == [
        (f"train-000{number}.tar", count) for number, count in enumerate((6, 6, 6, 2))
    ]
