"""Which tokens of a batch are padding, for whoever looks at activations: they must not count.

The mask is set for the duration of a forward pass rather than handed through the model, whose modules are upstream's.
In training no mask is needed: padded keys have probability 0, padded queries reach no loss, and so neither has a part in
the gradient of any scale.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dsquant.errors import TrainingError
from dsquant.quant.modules import ActivationQuantizer

_real: Tensor | None = None


@contextmanager
def real_tokens(batch: Tensor | dict[str, Tensor]) -> Iterator[None]:
    """Take the `attention_mask` (B, N) of a batch, 1 at real tokens, for the forward passes within; images have none."""
    global _real
    before = _real
    _real = batch.get("attention_mask") if isinstance(batch, dict) else None
    try:
        yield
    finally:
        _real = before


def real_positions(x: Tensor) -> Tensor | None:
    """Return a bool tensor (B, N), true at real tokens of x (B, N, C), or None where x has no padding."""
    return None if _real is None or x.dim() == 2 else _real.to(x.device).bool()


def real_elements(quantizer: ActivationQuantizer, x: Tensor) -> Tensor | None:
    """Return a bool tensor that broadcasts to x, true at elements of real tokens, or None where x has no padding.

    (B, N, C) is masked along N, (B, H, N, D) along N, probabilities (B, H, N, N) along queries and keys; (B, C), the
    input of a pooler or of a head, is of one real token a sample. Raises TrainingError for an x of another length.
    """
    if _real is None or x.dim() == 2:
        return None
    real = _real.to(x.device).bool()
    tokens = x.shape[-2]
    if real.shape != (x.shape[0], tokens):
        raise TrainingError(
            f"{quantizer.site.name}: a batch of {tuple(x.shape)} and an attention_mask of {tuple(real.shape)}"
        )
    if not quantizer.heads_first:
        return real[:, :, None]
    queries = real[:, None, :, None]
    return queries & real[:, None, None, :] if quantizer.keys_last else queries
