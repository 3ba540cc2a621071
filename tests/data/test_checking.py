"""The check of shards names everything that is damaged, in every shard."""

import json
import re
from pathlib import Path

import pytest

from dsquant.data import ShardSet, check_shards
from dsquant.errors import DataError
from tests.data.test_damage import DAMAGED, KINDS, PER_SHARD, change, cut, header, members, overwrite, rewrite
from tests.data.test_make_shards import tool  # noqa: F401  # a fixture


@pytest.fixture
def four_shards(make_set):
    return make_set(24, PER_SHARD)


# Of these an index alone tells.
UNTOLD = {"missing", "bytes after its end", "fewer samples than counted"}


@pytest.mark.parametrize(("kind", "indexed"), [(k, i) for k in KINDS for i in (True, False) if i or k not in UNTOLD])
def test_every_kind_of_damage_is_found_and_nothing_else_is(four_shards, kind, indexed):
    damage, lost, *_ = KINDS[kind]
    path = Path(four_shards.urls[1])
    damage(path)
    if not indexed:
        path.with_name("index.json").unlink()
    verdict = check_shards(path.parent)
    assert verdict.shards == 4
    assert verdict.damage
    assert all(line.startswith(f"shard {path}") for line in verdict.damage)
    read = set(verdict.labels)
    assert read & set(range(24)) - set(DAMAGED) == set(range(24)) - set(DAMAGED)
    assert not indexed or set(range(24)) - read <= lost


@pytest.mark.parametrize("workers", [1, 3])
def test_all_damages_of_all_shards_are_named_in_order(four_shards, workers):
    paths = [Path(url) for url in four_shards.urls]
    content = members(paths[0])
    rewrite(paths[0], [(n, b"no" if n in ("sample0001.cls", "sample0004.png") else data) for n, data in content])
    cut(header("sample0009.cls"))(paths[1])
    overwrite(header("sample0020.cls", 512), b"21")(paths[3])
    verdict = check_shards(paths[0].parent, workers=workers)
    expected = [
        r"train-0000.tar, sample sample0001: cls holds b'no'", r"train-0000.tar, sample sample0004: cannot decode png",
        r"train-0000.tar: its bytes are not those", r"train-0001.tar: 3 samples where 6 were counted",
        r"train-0003.tar: its bytes are not those",
    ]  # fmt: skip
    assert len(verdict.damage) == len(expected)
    for line, pattern in zip(verdict.damage, expected, strict=True):
        assert re.search(pattern, line)
    assert (verdict.labels[21], 20 in verdict.labels) == (2, False)


def test_a_label_that_has_changed_into_another_is_found_by_its_hash_alone(four_shards):
    path = Path(four_shards.urls[1])
    overwrite(header("sample0010.cls", 512), b"11")(path)
    (line,) = check_shards(path.parent).damage
    assert line.startswith(f"shard {path}: its bytes are not those that its index holds the hash of")
    index = path.with_name("index.json")
    old = json.loads(index.read_text())
    for entry in old["shardlist"]:
        del entry["blake2b"]  # as earlier versions wrote it
    index.write_text(json.dumps(old))
    assert ShardSet.open(path.parent).counts == four_shards.counts
    assert check_shards(path.parent).damage == []


def test_a_key_that_a_shard_has_twice_is_found(four_shards):
    path = Path(four_shards.urls[1])
    content = members(path)
    rewrite(path, content[:-2] + content[:2])
    assert any("sample sample0006: its key occurs twice" in line for line in check_shards(path.parent).damage)


def test_the_tool_lists_all_damages_and_fails(four_shards, tool):  # noqa: F811
    folder = Path(four_shards.urls[0]).parent
    change("cls", b"cat")(Path(four_shards.urls[1]))
    cut(lambda path: 100)(Path(four_shards.urls[2]))
    status, said, complaint = tool("check", "--shards", folder, "--workers", 2)
    lines = complaint.strip().splitlines()
    assert (status, said) == (1, "")
    assert [bool(re.search(r"000[12]\.tar", line)) for line in lines[-4:]] == [True, True, True, False]
    assert lines[-1] == "3 damages in 4 shards"


def test_shards_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no shards at"):
        check_shards(tmp_path)
