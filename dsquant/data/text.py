"""Sentences with a class or a score: from tables to shards, and from a sample of a shard to the tokens of a model.

A sample has the members `json`, {"text": ..., "text_pair": ...}, the second only where there are two sentences, and `cls`, a
class (0, 1, ...), or `score`, a number to regress on.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsquant.data.shards import FIX, LABEL_MEMBER, SCORE_MEMBER, TEXT_MEMBER
from dsquant.errors import ConfigError, DataError

Tokens = dict[str, Tensor]


class Tokenize:
    """Turn one or two sentences into int64 input_ids, attention_mask and, where the model has them, token_type_ids, 1-D.

    tokenizer: folder of a transformers tokenizer. They are cut to max_length tokens, the longer sentence first, and padded to
    it, or with `pad_to` "longest" left for `stack` to pad. replace: what is done to input_ids then.
    """

    def __init__(
        self, tokenizer: str | Path, max_length: int, pad_to: str = "max_length",
        replace: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        self.tokenizer = load_tokenizer(tokenizer)
        self.max_length, self.pad_to, self.replace = max_length, pad_to, replace
        self.padding = {"input_ids": self.tokenizer.pad_token_id}  # other tensors are padded with zeros

    def __call__(self, sample: dict[str, str]) -> Tokens:
        found = self.tokenizer(
            sample["text"],
            sample.get("text_pair"),
            truncation=True,
            max_length=self.max_length,
            padding="max_length" if self.pad_to == "max_length" else False,
            return_attention_mask=True,
        )
        tokens = {name: torch.tensor(ids, dtype=torch.int64) for name, ids in found.items()}
        return tokens | {"input_ids": self.replace(tokens["input_ids"])} if self.replace else tokens

    def stack(self, rows: list[tuple[Tokens, int | float]]) -> tuple[Tokens, Tensor]:
        """Return a batch: tensors (B, N), N that of the longest row, and labels int64 (B,), or float32 for scores."""
        tokens, labels = zip(*rows, strict=True)
        batch = {
            name: pad_sequence([row[name] for row in tokens], batch_first=True, padding_value=self.padding.get(name, 0))
            for name in tokens[0]
        }
        return batch, torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a folder, a hub name, or a run. Raises ConfigError where there is none that can pad."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of a worker
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {folder}: {str(error).splitlines()[0]}; set data.tokenizer") from None
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer at {folder} has no padding token; dsquant needs one")
    return tokenizer


def copy_tokenizer(location: str, folder: Path) -> Path:
    """Put the tokenizer of a model into a folder of the run, whole or not at all, and return the folder.

    One there already is kept: a resumed run reads what it began with.
    """
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        load_tokenizer(location).save_pretrained(str(partial))
        partial.rename(folder)
    return folder


def decode_text(record: dict[str, Any], transform: Callable[[dict[str, str]], Any]) -> tuple[Any, int | float]:
    """Read the sentences and the label of a record, and transform the first; raise DataError naming shard, key and cause."""
    where = f"shard {record['__url__']}, sample {record['__key__']}"
    try:
        sample = json.loads(record[TEXT_MEMBER])
    except (KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: no readable {TEXT_MEMBER} member ({type(error).__name__}: {error}); {FIX}") from None
    texts = [sample.get("text"), sample.get("text_pair", "")] if isinstance(sample, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {TEXT_MEMBER} must hold a text, and may hold a text_pair, both strings; {FIX}")
    label = _label(record, where)
    try:
        return transform(sample), label
    except Exception as error:  # tokenizers raise their own on text that is no valid Unicode
        raise DataError(f"{where}: cannot tokenize it ({type(error).__name__}: {error}); {FIX}") from error


def _label(record: dict[str, Any], where: str) -> int | float:
    member = LABEL_MEMBER if LABEL_MEMBER in record else SCORE_MEMBER
    try:
        label = int(record[member]) if member == LABEL_MEMBER else float(record[member])
    except ValueError:
        label = -1 if member == LABEL_MEMBER else math.nan
    if (member == LABEL_MEMBER and not 0 <= label < 1 << 63) or not math.isfinite(label):
        raise DataError(f"{where}: {member} holds {record[member][:20]!r}, which is no label; {FIX}")
    return label
