"""Small shards whose labels number the samples, so that a label says which sample was read."""

import io

import numpy as np
import pytest
from PIL import Image

from dsquant.data import write_shards


def png(number, size=8):
    rng = np.random.default_rng(number)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def numbered_samples(count):
    for number in range(count):
        yield f"sample{number:04d}", {"png": png(number), "cls": str(number).encode()}


@pytest.fixture
def make_set(tmp_path):
    def make(count=45, samples_per_shard=7, folder="set", prefix="train"):
        return write_shards(numbered_samples(count), tmp_path / folder, prefix, samples_per_shard)

    return make


@pytest.fixture
def samples():
    return numbered_samples
