"""Shards written by several processes, by processes that are killed, and from tables of images."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsquant.data import ShardSet, check_shards, shard_image_folder, shard_image_table, shard_text_table
from dsquant.data.reading import read_shard
from dsquant.data.shard_jobs import write_sources
from dsquant.errors import DataError

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


@pytest.fixture
def pictures(tmp_path):
    """Twenty images in two classes."""
    rng = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "pictures" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ("jpg", "png", "bmp")[number % 3]
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(folder / f"x{number:02d}.{suffix}")
    return tmp_path / "pictures"


def listed(pictures):
    return [(path.relative_to(pictures).as_posix(), path.parent.name) for path in sorted(pictures.glob("*/*"))]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def from_folder(pictures, out, **options):
    return shard_image_folder(pictures, out, samples_per_shard=3, **options)


def from_table(pictures, out, **options):
    (pictures.parent / "list.csv").write_text("image,label\n" + "".join(f"{p},{c}\n" for p, c in listed(pictures)))
    return shard_image_table(pictures.parent / "list.csv", out, root=pictures, samples_per_shard=3, **options)


def from_text(pictures, out, **options):
    (pictures.parent / "text.tsv").write_text("".join(f"{p}\t{c}\n" for p, c in listed(pictures)))
    source = pictures.parent / "text.tsv"
    return shard_text_table(source, out, text_column=0, label_column=1, samples_per_shard=3, **options)


@pytest.mark.parametrize("make", [from_folder, from_table, from_text])
def test_any_number_of_processes_writes_the_same_bytes(pictures, tmp_path, make):
    found = []
    for workers in (1, 2, 5):
        steps = []
        out = tmp_path / f"out{workers}"
        shards = make(pictures, out, workers=workers, progress=lambda *step, steps=steps: steps.append(step))
        assert steps == [(min(3 * n, 20), 20) for n in range(1, 8)]
        assert ShardSet.open(out) == shards
        assert check_shards(out).damage == []
        found.append(bytes_of(out))
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"classes.txt", "index.json", *(f"train-000{n}.tar" for n in range(7))}


def killed_after(command, waiting, shards):
    """Start the tool, and SIGKILL it once so many shards are finished; return when each of them was written."""
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while len(list(waiting.glob("*.tar.json"))) < shards:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return {path.name.removesuffix(".json"): path.with_suffix("").stat().st_mtime_ns for path in waiting.glob("*.json")}


def test_the_tool_goes_on_where_it_was_killed_and_writes_the_bytes_of_an_undisturbed_run(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(80):
        folder = tmp_path / "pictures" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    shard_image_folder(tmp_path / "pictures", tmp_path / "undisturbed", samples_per_shard=2)
    out, finished = tmp_path / "out", {}
    for workers in (2, 1):
        options = ["--samples_per_shard", "2", "--workers", str(workers)]
        command = [sys.executable, str(TOOL), "image_folder", str(tmp_path / "pictures"), str(out), *options]
        before, finished = finished, killed_after(command, out / ".train.partial", len(finished) + 3)
        assert before.items() <= finished.items()
        assert len(before) + 3 <= len(finished) < 40
        with pytest.raises(DataError, match="no shards at"):
            ShardSet.open(out)
    shard_image_folder(tmp_path / "pictures", out, samples_per_shard=2, workers=2)
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")
    assert finished == {name: (out / name).stat().st_mtime_ns for name in finished}


@dataclass(frozen=True)
class Counted:
    """Stand for a sample, and leave a line in a file for each time it is read."""

    number: int
    log: Path
    fails: bool = False

    def identity(self):
        return str(self.number)

    def members(self):
        if self.fails:
            raise DataError(f"sample {self.number} is broken")
        with open(self.log, "a") as file:
            file.write(f"{self.number}\n")
        return {"png": b"x", "cls": str(self.number % 10).encode()}


def write(sources, tmp_path, **options):
    options = {"samples_per_shard": 2, "workers": 1, "progress": lambda done, total: None} | options
    return write_sources(sources, tmp_path / "out", "train", **options)


def test_finished_shards_outlive_an_error_and_only_what_changed_is_made_again(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(DataError, match="sample 5 is broken"):
        write([Counted(n, log, fails=n == 5) for n in range(8)], tmp_path)
    assert log.read_text().split() == ["0", "1", "2", "3", "4"]
    waiting = tmp_path / "out" / ".train.partial"
    whole = (waiting / "train-0000.tar").read_bytes()
    (waiting / "train-0000.tar").write_bytes(whole[:-1] + b"x")  # damaged meanwhile
    log.unlink()
    shards = write([Counted(n if n != 3 else 9, log) for n in range(8)], tmp_path)
    assert log.read_text().split() == ["0", "1", "2", "9", "4", "5", "6", "7"]
    log.unlink()
    with pytest.raises(DataError, match="broken"):
        write([Counted(n, log, fails=n == 7) for n in range(8)], tmp_path)
    log.unlink()
    write([Counted(n, log) for n in range(8)], tmp_path)
    assert log.read_text().split() == ["6", "7"]
    assert [r["cls"] for url in shards.urls for r in read_shard(url, 2)] == [str(n).encode() for n in range(8)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.json", *(f"train-000{n}.tar" for n in range(4))
    ]  # fmt: skip


@dataclass(frozen=True)
class Deadly(Counted):
    def members(self):
        if self.number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().members()


def test_a_process_that_is_killed_is_an_error_and_its_peers_end(tmp_path):
    with pytest.raises(DataError, match="a worker process was killed"):
        write([Deadly(n, tmp_path / "log") for n in range(8)], tmp_path, workers=2)
    assert write([Counted(n, tmp_path / "log") for n in range(8)], tmp_path).total == 8


@pytest.mark.parametrize("options", [{"workers": 0}, {"samples_per_shard": 0}, {"workers": "two"}])
def test_options_that_cannot_be_are_refused(tmp_path, options):
    with pytest.raises(DataError, match=rf"{next(iter(options))} is .*; it must be a whole number of at least 1"):
        write([Counted(0, tmp_path / "log")], tmp_path, **options)


@pytest.mark.parametrize("kind", ["csv", "tsv", "numbered tsv", "jsonl"])
def test_a_table_of_images_becomes_shards(pictures, tmp_path, kind):
    rows, columns = listed(pictures), {"image_column": "image", "label_column": "label"}
    table = pictures / f"list.{kind.split()[-1]}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps({"image": path, "label": name}) + "\n" for path, name in rows))
    else:
        names = [] if kind == "numbered tsv" else [("image", "label")]
        table.write_text("".join((",", "\t")[kind != "csv"].join(row) + "\n" for row in names + rows))
        columns = {"image_column": 0, "label_column": 1} if kind == "numbered tsv" else columns
    shards = shard_image_table(table, tmp_path / "out", samples_per_shard=7, **columns)
    assert shards.counts == (7, 7, 6)
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\n"
    found = [record for url, count in zip(shards.urls, shards.counts, strict=True) for record in read_shard(url, count)]
    jpegs = {(record["jpg"], record["cls"]) for record in found if "jpg" in record}
    expected = {((pictures / p).read_bytes(), b"01"[c == "bee" :][:1]) for p, c in rows if p.endswith(".jpg")}
    assert jpegs == expected
    assert check_shards(tmp_path / "out").labels == {0: 10, 1: 10}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "image,label\nnone.png,1\n",
            r"list.csv, row 1: there is no image .*none.png; correct it, or give the folder as root",
        ),
        ("image,class\nant/x00.jpg,1\n", r"list.csv, row 1: no column 'label'; it has image, class"),
        ("image,label\nant/x00.jpg,\n", r"list.csv, row 1: no column 'label'"),
        ("image,label\n", "holds no rows"),
    ],
)
def test_a_row_that_cannot_be_is_named(pictures, tmp_path, text, error):
    (pictures / "list.csv").write_text(text)
    with pytest.raises(DataError, match=error):
        shard_image_table(pictures / "list.csv", tmp_path / "out")


def test_a_saved_data_set_of_images_becomes_shards(pictures, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    paths = [str(pictures / path) for path, _ in listed(pictures)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bee", "ant"])})
    labels = ["ant" in path for path in paths]
    datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features).save_to_disk(tmp_path / "saved")
    one, two = (shard_image_table(tmp_path / "saved", tmp_path / f"out{w}", workers=w) for w in (1, 2))
    assert Path(one.urls[0]).read_bytes() == Path(two.urls[0]).read_bytes()
    assert (tmp_path / "out1" / "classes.txt").read_text() == "bee\nant\n"
    assert check_shards(tmp_path / "out1").labels == {0: 10, 1: 10}


def test_a_saved_data_set_without_its_package_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "saved").mkdir()
    with pytest.raises(DataError, match="reading a saved data set needs: pip install datasets"):
        shard_image_table(tmp_path / "saved", tmp_path / "out")
