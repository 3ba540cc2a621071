"""Stream WebDataset shards: the same steps on every rank, the same order for any number of workers."""

from dsquant.data.digits import make_digits
from dsquant.data.image_folder import shard_image_folder
from dsquant.data.shards import ShardSet, write_index, write_shards
from dsquant.data.soft_labels import StoredCrops, read_settings
from dsquant.data.stream import EvalStream, TrainStream, verify
from dsquant.data.transforms import build_transform

__all__ = [
    "EvalStream",
    "ShardSet",
    "StoredCrops",
    "TrainStream",
    "build_transform",
    "make_digits",
    "read_settings",
    "shard_image_folder",
    "verify",
    "write_index",
    "write_shards",
]
