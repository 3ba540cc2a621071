import io
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dsquant.data import make_digits
from dsquant.data.reading import read_shard
from dsquant.errors import DataError


def read(shards):
    for url, count in zip(shards.urls, shards.counts, strict=True):
        for record in read_shard(url, count):
            yield np.asarray(Image.open(io.BytesIO(record["png"]))), int(record["cls"])


def test_the_shards_hold_every_digit_once_and_lossless(tmp_path):
    train, val = make_digits(tmp_path)
    assert (len(train), train.total, len(val), val.total) == (4, 1437, 2, 360)
    digits = load_digits()
    expected = sorted((image.astype(int).tobytes(), int(label))
                      for image, label in zip(digits.images, digits.target, strict=True))  # fmt: skip
    found = [(np.rint(image * (16 / 255)).astype(int).tobytes(), label)
             for shards in (train, val) for image, label in read(shards)]  # fmt: skip
    assert sorted(found) == expected
    assert max(image.max() for image, _ in read(val)) == 255


def test_the_split_is_stratified(tmp_path):
    counts = [np.bincount([label for _, label in read(shards)], minlength=10) for shards in make_digits(tmp_path)]
    assert np.abs(counts[0] / 1437 - counts[1] / 360).max() < 0.004


def test_a_second_call_finds_the_set_and_a_broken_one_is_written_anew(tmp_path):
    written = make_digits(tmp_path)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert make_digits(tmp_path) == written
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in before} == before
    (tmp_path / "val" / "index.json").unlink()
    (tmp_path / "val" / "val-0001.tar").unlink()
    assert make_digits(tmp_path) == written
    assert {path: path.read_bytes() for path in before} == {path: content for path, (_, content) in before.items()}


def test_without_scikit_learn_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        make_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []
