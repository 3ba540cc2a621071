"""The benchmark of the data stream runs every case on the same images, and divides what it has measured."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dsquant.benchmarks.loader import ALONE, OURS, _lines, _starts, loader
from dsquant.data import write_shards

CASES = {OURS, "webdataset", "torchvision ImageFolder", ALONE}


@pytest.fixture
def pictures(tmp_path):
    def samples():
        for number in range(8):
            stream = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, format="JPEG")
            yield f"s{number}", {"jpg": stream.getvalue(), "cls": str(number % 3).encode()}

    return write_shards(samples(), tmp_path / "set", "train", 4)


def test_it_prints_and_writes_a_line_for_each_case(pictures, tmp_path, capsys):
    loader(str(tmp_path / "set"), batch=2, workers=1, batches=2, turns=1, out=str(tmp_path / "lines"))
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "lines").read_text()
    lines = {line["case"]: line for line in map(json.loads, printed.splitlines())}
    assert lines.keys() == CASES
    assert lines[OURS]["wall_speed_over"].keys() == CASES - {OURS, ALONE}
    assert lines[ALONE]["wall_speed_over_alone"] == 1.0
    assert all(line["images"] == 8 and line["images_per_second"] > 0 for line in lines.values())


def test_every_case_delivers_batches_of_the_same_images(pictures, tmp_path):
    (tmp_path / "files").mkdir()
    for start in _starts(pictures, tmp_path / "files", 4, 1, 8).values():
        stream = start()
        batches = [next(stream) for _ in range(4)]
        assert all(images.shape == (4, 3, 224, 224) for images, _ in batches)
        assert {label for _, labels in batches for label in labels.tolist()} == {0, 1, 2}


def test_ratios_are_medians_over_turns():
    taken = {name: [(2.0, 4.0), (4.0, 4.0), (9.0, 4.0)] for name in CASES} | {
        OURS: [(1.0, 8.0), (4.0, 8.0), (3.0, 8.0)]
    }
    ours = next(line for line in _lines(taken, 100, 8, 2) if line["case"] == OURS)
    assert (ours["wall_speed_over_alone"], ours["cpu_speed_over_alone"]) == (2.0, 0.5)
    assert ours["wall_speed_over"] == {"webdataset": 2.0, "torchvision ImageFolder": 2.0}
    assert (ours["images_per_second"], ours["cpu_ms_per_image"]) == (33.3, 80.0)
