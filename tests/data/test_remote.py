"""Shards over http, from a server that fails in every way, and the folder that keeps them."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from filelock import FileLock

from dsquant.data import EvalStream, ShardCache, ShardSet, TrainStream, remote
from dsquant.data.reading import read_shard
from dsquant.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
SHARD = "/train-0001.tar"


class Handler(SimpleHTTPRequestHandler):
    """Serve a folder, ranges included; the next fault of a path is taken from `server.faults[path]`.

    Faults: a status, ("cut", bytes), "no ranges", "silent", ("garble", byte), ("grow", bytes), "endless" (without a length).
    """

    def log_message(self, *args):
        pass

    def do_GET(self):
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        faults = self.server.faults.get(self.path, [])
        kind, number = (
            (fault if isinstance(fault, tuple) else (fault, 0)) if (fault := faults and faults.pop(0)) else ("", 0)
        )
        if kind == "silent":
            self.server.over.wait(20)
            return
        path = Path(self.directory + self.path)
        if isinstance(kind, int) or not path.exists():
            self.send_error(kind or 404)
            return
        content = bytearray(path.read_bytes() + (bytes(number) if kind == "grow" else b""))
        if kind == "garble":
            content[number] ^= 0xFF
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and kind != "no ranges" else 0
        self.send_response(206 if first else 200)
        if kind != "endless":
            self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first : first + number] if kind in ("cut", "endless") else content[first:])


@pytest.fixture
def server(make_set, tmp_path, monkeypatch):
    """Serve six shards of five samples; .address is their pattern, .shards the set as it lies on the disk."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    shards = make_set(30, 5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "set")))
    server.daemon_threads = True
    server.faults, server.requests, server.over, server.shards = {}, [], Event(), shards
    server.address = f"http://127.0.0.1:{server.server_port}/train-{{0000..0005}}.tar"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def requested(server):
    return Counter(path for path, _ in server.requests if path.endswith(".tar"))


def contents(shards, index, cache=None):
    return [(r["__key__"], r["png"], r["cls"]) for r in read_shard(*shards.row(index), cache)]


def as_it_is(image):
    return torch.zeros(1)


def labels_of(shards, epochs=1, **options):
    options = {"batch_size": 5, "rank": 0, "world_size": 1, "seed": 1} | options
    stream = TrainStream(shards, transform=as_it_is, **options)
    return [
        label for _, labels in islice(stream.batches(), epochs * stream.batches_per_epoch) for label in labels.tolist()
    ]


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([("cut", 700), ("cut", 0), ("cut", 1234)], [None, "bytes=700-", "bytes=700-", "bytes=1934-"]),
        ([("cut", 700), "no ranges"], [None, "bytes=700-"]),
        ([503, ("cut", 3000), 429], [None, None, "bytes=3000-", "bytes=3000-"]),
        ([500, 502, 504, 408, 425], [None] * 6),
    ],
)
def test_a_transfer_that_fails_or_is_cut_goes_on_where_it_ended(server, faults, ranges):
    shards = ShardSet.open(server.address)
    server.faults[SHARD] = faults
    assert contents(shards, 1) == contents(server.shards, 1)
    assert [wanted for path, wanted in server.requests if path == SHARD] == ranges


def test_a_silent_server_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    shards = ShardSet.open(server.address)
    server.faults[SHARD] = ["silent", "silent"]
    assert contents(shards, 1) == contents(server.shards, 1)
    assert requested(server) == {SHARD: 3}


def test_attempts_are_bounded_and_wait_longer_each_time(server, monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    shards = ShardSet.open(server.address)
    server.faults[SHARD] = [("cut", 10)] * 9
    with pytest.raises(
        DataError, match=r"shard http\S*0001.tar: the server closed after 60 of \d+ bytes, the last of 6"
    ):
        contents(shards, 1)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert requested(server) == {SHARD: 6}


@pytest.mark.parametrize(
    ("faults", "error", "requests"),
    [
        ([404], "HTTP 404 Not Found", 1),
        ([403], "HTTP 403 Forbidden", 1),
        ([503] * 6, "HTTP Error 503: Service Unavailable, the last of 6 attempts", 6),
        ([("cut", 700), ("grow", 512)], r"\d+ bytes long at first, then \d+: it changed while it was read", 2),
        ([("endless", 6000)], "truncated|unexpected end|samples where 5 were counted", 1),
    ],
)
def test_a_shard_that_cannot_be_had_is_an_error_or_counts_as_damage(server, faults, error, requests):
    shards = ShardSet.open(server.address)
    server.faults[SHARD] = list(faults)
    with pytest.raises(DataError, match=rf"shard {shards.urls[1]}: .*({error})"):
        labels_of(shards)
    assert requested(server)[SHARD] == requests
    server.faults[SHARD] = list(faults)
    assert set(labels_of(shards, max_damaged=5)) >= set(range(30)) - set(range(5, 10))
    server.faults[SHARD] = list(faults)
    with pytest.raises(DataError, match=error):
        list(EvalStream(shards, transform=as_it_is, batch_size=5, rank=0, world_size=1).batches())


def test_an_index_that_cannot_be_had_is_named(server):
    server.faults["/index.json"] = [404]
    with pytest.raises(DataError, match=r"no usable shard index at http\S*index.json \(TransferError: HTTP 404"):
        ShardSet.open(server.address)
    server.faults["/index.json"] = [503, ("cut", 100)]
    assert ShardSet.open(server.address).counts == server.shards.counts


@pytest.fixture
def cached(server, tmp_path):
    """Return `open(shards)`: the remote set, with a cache of so many shards."""

    def open_set(shards=6):
        room = sum(sorted(server.shards.sizes)[-shards:])
        return ShardSet.open(server.address, cache=ShardCache(tmp_path / "cache", room))

    return open_set


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_epoch_of_cached_shards_makes_no_requests(server, cached, workers):
    shards = cached()
    assert labels_of(shards, 2, num_workers=workers) == labels_of(server.shards, 2)
    assert requested(server) == {f"/train-000{number}.tar": 1 for number in range(6)}
    again = cached()
    server.requests.clear()
    assert labels_of(again, 3, num_workers=workers) == labels_of(server.shards, 3)
    assert requested(server) == {}


def epoch_of_rank(shards, rank, results):
    results.put(labels_of(shards, 2, rank=rank, world_size=2, batch_size=3, num_workers=2))


def test_ranks_and_their_workers_share_one_download_of_each_shard(server, cached):
    shards, context = cached(), multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=epoch_of_rank, args=(shards, rank, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    seen = [label for _ in ranks for label in results.get(timeout=60)]
    for rank in ranks:
        rank.join()
    assert sorted(seen) == sorted(2 * list(range(30)))
    assert requested(server) == {f"/train-000{number}.tar": 1 for number in range(6)}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_never_holds_more_than_its_limit(server, cached, tmp_path, workers):
    shards, sizes, over = cached(2), [], Event()

    def watch():
        while not over.wait(0.002):
            with FileLock(
                shards.cache.folder / ".lock"
            ):  # else a shard counts that gives way to one that counts as well
                sizes.append(shards.cache._used())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        assert labels_of(shards, 3, num_workers=workers) == labels_of(server.shards, 3)
    finally:
        over.set()
        watcher.join()
    assert 0 < max(sizes) <= shards.cache.max_bytes


def test_a_shard_that_gets_its_name_while_the_cache_is_counted_counts_once(cached, monkeypatch):
    cache = cached(2).cache
    names = [cache.folder / ".a.tar.partial", cache.folder / "a.tar"]
    names[0].write_bytes(bytes(1000))
    stat = Path.stat

    def renamed_first(path, **options):
        if path in names:
            with suppress(FileNotFoundError):
                os.rename(*names)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", renamed_first)
    assert cache._used() == 1000


def test_a_link_to_nothing_in_the_folder_of_the_cache_stops_nobody(server, cached):
    shards = cached(2)
    (shards.cache.folder / "lost.tar.link").symlink_to("nowhere")
    assert labels_of(shards, 1) == labels_of(server.shards, 1)


def test_the_least_recently_used_shard_makes_room(server, cached, tmp_path):
    shards = cached(2)
    for index in (0, 1, 0, 2, 0, 1):
        contents(shards, index, shards.cache)
        time.sleep(0.02)
    assert requested(server) == {"/train-0000.tar": 1, "/train-0001.tar": 2, "/train-0002.tar": 1}


def test_a_shard_that_is_removed_while_it_is_read_is_read_to_its_end(server, cached):
    shards = cached(1)
    reading = read_shard(*shards.row(0), shards.cache)
    first = next(reading)
    contents(shards, 1, shards.cache)
    assert [first["cls"], *(record["cls"] for record in reading)] == [b"0", b"1", b"2", b"3", b"4"]


def test_what_arrives_is_held_against_size_and_hash_and_asked_for_again(server, cached):
    shards = cached()
    server.faults[SHARD] = [("garble", 700), ("grow", 512), ("endless", 3000)]
    assert contents(shards, 1, shards.cache) == contents(server.shards, 1)
    assert requested(server) == {SHARD: 4}
    server.faults["/train-0002.tar"] = [("garble", 700)] * 9
    with pytest.raises(DataError, match=r"0002.tar: what came has another hash than the index says"):
        contents(shards, 2, shards.cache)
    assert requested(server)["/train-0002.tar"] == remote.ATTEMPTS
    assert labels_of(shards) == labels_of(server.shards)
    server.faults["/train-0003.tar"] = [404]
    os.unlink(next((shards.cache.folder).glob("*-train-0003.tar")))
    with pytest.raises(DataError, match=r"0003.tar: HTTP 404 Not Found"):
        contents(shards, 3, shards.cache)
    assert not list(shards.cache.folder.glob(".*.partial"))


def test_two_sets_with_the_same_names_are_kept_apart(server, cached, tmp_path):
    shards = cached()
    contents(shards, 0, shards.cache)
    other = ShardSet.open(server.address.replace("127.0.0.1", "localhost"), cache=shards.cache)
    assert contents(other, 0, other.cache) == contents(server.shards, 0)
    assert requested(server) == {"/train-0000.tar": 2}


def test_the_next_shard_is_fetched_while_one_is_read(server, cached):
    shards = cached()
    stream = EvalStream(shards, transform=as_it_is, batch_size=1, rank=0, world_size=1)
    next(stream.batches())
    ends = time.monotonic() + 20
    while len(list(shards.cache.folder.glob("*.tar"))) < 2 and time.monotonic() < ends:
        time.sleep(0.01)
    assert requested(server) == {"/train-0000.tar": 1, "/train-0001.tar": 1}


def test_a_download_that_was_killed_is_made_again_and_its_room_is_given_back(server, cached):
    shards, context = cached(1), multiprocessing.get_context("fork")
    server.faults[SHARD] = ["silent"]
    killed = context.Process(target=contents, args=(shards, 1, shards.cache))
    killed.start()
    while not requested(server):
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert len(list(shards.cache.folder.glob(".*-train-0001.tar.partial"))) == 1
    assert contents(shards, 0, shards.cache) == contents(server.shards, 0)
    assert contents(shards, 1, shards.cache) == contents(server.shards, 1)
    assert [path.name[-14:] for path in shards.cache.folder.iterdir() if not path.name.startswith(".")] == [SHARD[1:]]


def test_a_cache_that_cannot_hold_a_shard_or_does_not_know_its_size_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=r"train-000\d.tar has \d+ bytes and data.cache_gib allows 100; raise it"):
        ShardSet.open(server.address, cache=ShardCache(tmp_path / "cache", 100))
    index = tmp_path / "set" / "index.json"
    entries = json.loads(index.read_text())
    for entry in entries["shardlist"]:
        del entry["filesize"], entry["blake2b"]
    index.write_text(json.dumps(entries))
    assert labels_of(ShardSet.open(server.address)) == labels_of(server.shards)
    with pytest.raises(DataError, match=r"index does not tell the size of \S*0000.tar; write it anew with"):
        ShardSet.open(server.address, cache=ShardCache(tmp_path / "cache", 1 << 20))


def test_pipes_are_kept_too_and_their_exit_status_counts(server, tmp_path):
    cache, tries = ShardCache(tmp_path / "cache", 1 << 20), tmp_path / "tries"
    shards = ShardSet.open(f"pipe:cat {tmp_path}/set/train-{{0000..0005}}.tar", cache=cache)
    for _ in range(2):
        assert contents(shards, 1, cache) == contents(server.shards, 1)
    assert len(list(cache.folder.glob("*.tar"))) == 1
    failing = f"{shards.urls[2]}; echo >> {tries}; exit 3"
    with pytest.raises(DataError, match="exit 3"):
        list(read_shard(failing, 5, shards.sizes[2], shards.hashes[2], cache))
    assert len(tries.read_text()) == remote.ATTEMPTS
