"""Other sentences out of those there are: tokens give way to some of like meaning, and a teacher says what that makes of them.

Sentences of a small data set leave most of a vocabulary out. Where embeddings are quantized, rows that no sentence reads keep
the error that quantization made, and validation reads them. Source: TinyBERT (Jiao et al. 2020), the augmentation of its
task-specific distillation, where a masked language model and GloVe say which words are alike, and sentences are written out.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from dsquant.files import write_atomically

NEIGHBOURS = 15  # as many candidates as TinyBERT has
KINDS = ("##", "Ġ", "▁")  # tokens that go on with a word in WordPiece, and that begin one in other tokenizers
ROWS = 256  # of similarities at a time


@torch.no_grad()
def similar_tokens(embeddings: Tensor, tokens: Sequence[str], fixed: set[int], neighbours: int = NEIGHBOURS) -> Tensor:
    """Return the tokens whose embeddings have the largest cosines with that of each token, int32 (V, neighbours).

    embeddings (V, C); tokens: V names. A token that begins a word has neighbours that do, one that goes on with a word those.
    `fixed` (special tokens) are neighbours of none, and their own; so is a token where it has no more.
    """
    directions = F.normalize(embeddings.float(), dim=1)
    count, own = len(tokens), torch.arange(len(tokens), device=embeddings.device)
    kind = torch.tensor([token.startswith(KINDS) for token in tokens], device=own.device)
    free = torch.ones(count, dtype=torch.bool, device=own.device)
    free[sorted(fixed)] = False
    table = own[:, None].repeat(1, neighbours)
    for rows in own.split(ROWS):
        cosines = directions[rows] @ directions.T
        cosines[~(free & (kind == kind[rows, None]) & (own != rows[:, None]))] = -torch.inf
        best = cosines.topk(min(neighbours, count), dim=1)
        found = free[rows, None] & best.values.isfinite()
        table[rows, : best.indices.shape[1]] = torch.where(found, best.indices, rows[:, None])
    return table.int().cpu()


def write_similar_tokens(table: Tensor, path: Path) -> None:
    """Write what `similar_tokens` returns."""
    write_atomically(path, save({"similar_tokens": table}))


class ReplaceTokens:
    """Replace each token of a sentence with probability `share` by one of its neighbours, drawn evenly by torch's generator.

    table: the file of `write_similar_tokens`.
    """

    def __init__(self, table: Path, share: float):
        self.table, self.share = load_file(table)["similar_tokens"], share

    def __call__(self, ids: Tensor) -> Tensor:
        """Return int64 (N,) for int64 (N,)."""
        replaced = torch.rand(ids.shape) < self.share
        others = self.table[ids, torch.randint(self.table.shape[1], ids.shape)]
        return torch.where(replaced, others.long(), ids)
