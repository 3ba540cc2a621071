"""Attention through the four quantizers of a block, and where they stand; every family's attention class takes it."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from dsquant.models.sites import Sites
from dsquant.ops.quant_attention import quant_attention
from dsquant.quant.modules import ActivationQuantizer, Mode, become
from dsquant.quant.reparam import QuantQkv


class AttentionSites:
    """Give an attention module quantizers of q, k, probabilities and v. Mixed in before the float class.

    With QKR q is the input of `qkv`, which is quantized there, and k that input times the product of q and k weights.
    """

    qkv: nn.Linear | QuantQkv

    q_quantizer: ActivationQuantizer | None
    k_quantizer: ActivationQuantizer | None
    probs_quantizer: ActivationQuantizer | None
    v_quantizer: ActivationQuantizer | None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | Tensor, *, bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return `quant_attention` of q, k, v (B, H, N, D) with this module's quantizers; calibration sees each site.

        softmax_scale, bias and mask are those of the op.
        """
        sites = self._sites()
        if any(site is not None and site.observer is not None for site in sites):
            return self._observed(q, k, v, softmax_scale, bias, mask)
        args = (None if site is None else site.args(q) for site in sites)
        return quant_attention(q, k, v, softmax_scale, *args, bias=bias, mask=mask)

    def is_float(self, *others: ActivationQuantizer | None) -> bool:
        """Say whether no site of this module, nor any other, does anything: the float class may run as it is."""
        if isinstance(self.qkv, QuantQkv):  # its q and k weights are always quantized, as images are
            return False
        sites = (*self._sites(), *others)
        return all(site is None or (site.mode is Mode.FLOAT and site.observer is None) for site in sites)

    def _sites(self) -> tuple[ActivationQuantizer | None, ...]:
        return self.q_quantizer, self.k_quantizer, self.probs_quantizer, self.v_quantizer

    def _observed(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Form the probabilities for calibration to see; the fused op never holds them whole."""
        q, k, v = _through(self.q_quantizer, q), _through(self.k_quantizer, k), _through(self.v_quantizer, v)
        scores = (q * softmax_scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        if mask is not None:  # image or window i takes row i % len(mask)
            scores = (scores.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        return _through(self.probs_quantizer, scores.softmax(dim=-1)).to(v.dtype) @ v


def split_heads(projected: Tensor | tuple[Tensor, Tensor, Tensor], heads: int, rows: int) -> tuple[Tensor, ...]:
    """Return q, k, v, each (rows, H, N, D), of what `qkv` makes of an input whose sequences are cut into `rows` in all.

    Of a fused projection (B, N', 3 * H * D); or of what `QuantQkv` returns: then q and k (rows, H, N, C) are of the width of
    the input, and q, the input itself, is the same in every head, an expanded view.
    """
    if isinstance(projected, Tensor):
        return _Split.apply(projected, heads, rows)
    x_hat, keys, values = projected
    q = x_hat.reshape(rows, 1, -1, x_hat.shape[-1]).expand(-1, heads, -1, -1)
    k, v = (t.reshape(rows, -1, heads, t.shape[-1] // heads).transpose(1, 2) for t in (keys, values))
    return q, k, v


class _Split(torch.autograd.Function):
    """Split a fused projection into views, as `unbind` does; gradients that lie side by side already are not copied back."""

    @staticmethod
    def forward(ctx, projected, heads, rows):
        ctx.shape = projected.shape
        return (
            projected.reshape(rows, -1, 3, heads, projected.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        )

    @staticmethod
    def backward(ctx, *grads):
        if torch.compiler.is_compiling() or not _side_by_side(grads):
            whole = torch.stack(grads, 2).permute(0, 3, 2, 1, 4)
        else:
            rows, heads, length, dim = grads[0].shape
            whole = grads[0].as_strided((rows, length, 3 * heads * dim), (3 * length * heads * dim, 3 * heads * dim, 1))
        return whole.reshape(ctx.shape), None, None


def _side_by_side(parts: tuple[Tensor, ...]) -> bool:
    """Say whether tensors (B, H, N, D) are the thirds of one (B, N, 3, H, D), in order."""
    _, heads, length, dim = parts[0].shape
    strides = 3 * length * heads * dim, dim, 3 * heads * dim, 1
    starts = {part.data_ptr() - i * heads * dim * part.element_size() for i, part in enumerate(parts)}
    return len(starts) == 1 and all(part.stride() == strides for part in parts)


def _through(site: ActivationQuantizer | None, x: Tensor) -> Tensor:
    return x if site is None else site(x)


def insert_attention(
    name: str, attention: nn.Module, quant_class: type[AttentionSites], sites: Sites, *, tokens: int, length: int,
    projected: int | None = None, one_length: bool = True,
) -> None:  # fmt: skip
    """Quantize an attention with fused `qkv`, `proj` and `num_heads`: inputs, weights, q, k, v and probabilities.

    tokens: of one sample. length: of the sequences attended within, the longest where they differ (`one_length` False,
    which allows q, k, v and probabilities no per_token scales). projected: of those that enter qkv and proj.
    With `qk_reparam` in the policy there are `{name}.qk.weight` and `{name}.qk` in place of q and k.
    """
    heads, projected = attention.num_heads, projected or length
    width, entering = attention.proj.in_features, tokens * attention.qkv.in_features
    per_head = {"heads": heads, "heads_first": True, "tokens": length if one_length else None}
    if sites.policy.qk_reparam:
        sites.reparametrized(name, attention.qkv, features=entering, heads=heads, tokens=projected)
        quantizers = {"q_quantizer": None, "k_quantizer": sites.activation(f"{name}.qk", heads * entering, **per_head)}
    else:
        sites.linear(
            f"{name}.qkv", attention.qkv, features=entering, out_blocks=3, out_heads=heads, tokens=projected
        )  # fmt: skip
        quantizers = {
            f"{part}_quantizer": sites.activation(f"{name}.{part}", tokens * width, **per_head) for part in ("q", "k")
        }
    quantizers["v_quantizer"] = sites.activation(f"{name}.v", tokens * width, **per_head)
    quantizers["probs_quantizer"] = sites.activation(f"{name}.probs", heads * tokens * length, signed=False, **per_head)
    sites.linear(f"{name}.proj", attention.proj, features=tokens * width, heads=heads, tokens=projected)
    become(attention, quant_class, **quantizers)


class QuantMlp(Mlp):
    """Leave the GELU to `fc2` in training on a GPU, whose quantizer takes it in one pass; names are those of timm's Mlp."""

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.fc2.input_quantizer
        if not self.training or x.device.type != "cuda" or quantizer is None or not quantizer.takes_as_is():
            return super().forward(x)
        return self.drop2(self.fc2(self.fc1(x), gelu=True))


def insert_mlp(name: str, mlp: nn.Module, tokens: int, sites: Sites) -> None:
    """Quantize `fc1` and `fc2` of an MLP: a signed input, and a GELU's output, unsigned with a learned offset."""
    sites.linear(f"{name}.fc1", mlp.fc1, features=tokens * mlp.fc1.in_features)
    sites.linear(f"{name}.fc2", mlp.fc2, features=tokens * mlp.fc2.in_features, signed=False, offset=True)
    plain = isinstance(mlp.norm, nn.Identity) and mlp.drop1.p == 0
    if type(mlp) is Mlp and plain and type(mlp.act) is nn.GELU and mlp.act.approximate == "none":
        become(mlp, QuantMlp)
