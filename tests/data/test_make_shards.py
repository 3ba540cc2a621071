import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsquant.data import ShardSet, check_shards, shard_image_folder
from dsquant.data.reading import read_shard
from dsquant.errors import DataError

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


@pytest.fixture
def pictures(tmp_path):
    """Three classes of four images in as many formats."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for suffix in ("jpg", "PNG", "webp", "bmp"):
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(folder / f"x.{suffix}")
    return tmp_path / "pictures"


@pytest.fixture
def tool(capsys):
    """Run the tool in this process: (exit status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("make_shards_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        status = module.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def records(shards):
    for url, count in zip(shards.urls, shards.counts, strict=True):
        yield from read_shard(url, count)


def test_an_image_folder_becomes_shuffled_shards_with_class_names(pictures, tmp_path):
    seen = []
    shards = shard_image_folder(
        pictures, tmp_path / "out", samples_per_shard=5, progress=lambda done, total: seen.append((done, total))
    )
    assert shards.counts == (5, 5, 2)
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\ncow\n"
    found = list(records(shards))
    labels = [int(record["cls"]) for record in found]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4 != labels
    assert check_shards(tmp_path / "out").labels == {0: 4, 1: 4, 2: 4}
    jpegs = {(record["jpg"], record["cls"]) for record in found if "jpg" in record}
    assert jpegs == {((pictures / name / "x.jpg").read_bytes(), str(label).encode())
                     for label, name in enumerate(("ant", "bee", "cow"))}  # fmt: skip
    again = shard_image_folder(pictures, tmp_path / "again", samples_per_shard=5)
    other = shard_image_folder(pictures, tmp_path / "other", samples_per_shard=5, seed=1)
    assert [Path(url).read_bytes() for url in again.urls] == [Path(url).read_bytes() for url in shards.urls]
    assert [record["cls"] for record in records(other)] != [record["cls"] for record in records(shards)]


def test_a_validation_set_beside_must_have_the_same_classes(pictures, tmp_path):
    shard_image_folder(pictures, tmp_path / "out")
    assert shard_image_folder(pictures, tmp_path / "out", prefix="val").total == 12
    (pictures / "dog").mkdir()
    (pictures / "ant" / "x.jpg").rename(pictures / "dog" / "x.jpg")
    with pytest.raises(DataError, match=r"classes.txt lists other classes than the 4 folders found"):
        shard_image_folder(pictures, tmp_path / "out", prefix="val")


def test_a_file_that_is_no_image_is_named_and_nothing_is_written(pictures, tmp_path):
    (pictures / "bee" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bee/broken.jpg: cannot be read as an image"):
        shard_image_folder(pictures, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classes.txt"]


def test_the_tool_makes_indexes_and_checks_shards(tool, pictures, tmp_path):
    made = tool("image_folder", "--src", pictures, "--out", tmp_path / "out", "--samples_per_shard", 5)
    assert made[:2] == (0, f"12 samples in 3 shards under {tmp_path}/out\n")
    (tmp_path / "out" / "index.json").unlink()
    assert tool("index", "--shards", tmp_path / "out")[:2] == (0, "12 samples in 3 shards indexed\n")
    status, said, _ = tool("check", "--shards", f"{tmp_path}/out/train-*.tar")
    assert status == 0
    assert said.splitlines()[:2] == ["12 samples in 3 shards, 3 labels, all readable", "label 0: 4"]


def test_the_check_finds_a_damaged_image(tool, pictures, tmp_path):
    shards = shard_image_folder(pictures, tmp_path / "out")
    with tarfile.open(shards.urls[0]) as tar:
        image = next(member for member in tar if member.name.endswith(".jpg"))
    with open(shards.urls[0], "r+b") as file:
        file.seek(image.offset_data)
        file.write(bytes(20))
    status, said, complaint = tool("check", "--shards", tmp_path / "out")
    assert (status, said) == (1, "")
    assert f"shard {shards.urls[0]}, sample {image.name[:-4]}: cannot decode jpg" in complaint


def test_the_tool_ends_with_one_message_and_no_traceback(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "check", "--shards", str(tmp_path / "nowhere")]
    failed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("no shards at")
    assert len(failed.stderr.splitlines()) == 1


def test_a_checked_set_is_the_one_that_training_opens(pictures, tmp_path):
    written = shard_image_folder(pictures, tmp_path / "out", samples_per_shard=4)
    assert ShardSet.open(tmp_path / "out") == written
