"""Stream WebDataset shards: the same steps on every rank, the same order for any number of workers."""

from dsquant.data.checking import check_shards
from dsquant.data.damage import damage_report
from dsquant.data.digits import make_digits
from dsquant.data.image_folder import shard_image_folder
from dsquant.data.image_table import shard_image_table
from dsquant.data.shard_cache import ShardCache
from dsquant.data.shard_writing import write_index, write_shards
from dsquant.data.shards import ShardSet
from dsquant.data.soft_labels import StoredCrops, read_settings
from dsquant.data.stream import EvalStream, TrainStream
from dsquant.data.text import Tokenize, copy_tokenizer, load_tokenizer
from dsquant.data.text_table import shard_text_table
from dsquant.data.token_replacement import ReplaceTokens, similar_tokens, write_similar_tokens
from dsquant.data.transforms import build_transform

__all__ = [
    "EvalStream",
    "ReplaceTokens",
    "ShardCache",
    "ShardSet",
    "StoredCrops",
    "Tokenize",
    "TrainStream",
    "build_transform",
    "check_shards",
    "copy_tokenizer",
    "damage_report",
    "load_tokenizer",
    "make_digits",
    "read_settings",
    "shard_image_folder",
    "shard_image_table",
    "shard_text_table",
    "similar_tokens",
    "write_index",
    "write_shards",
    "write_similar_tokens",
]
