"""Keys of attention through the quantized product of q and k weights (OFQ's QKR), and v, from one fused weight.

The scores of head h are (W_q x_i) . (W_k x_j) = x_i . (W_qk x_j) with W_qk = W_q^T W_k (C, C): quantizing the product has one
rounding where quantizing both factors has two, and a step of W_q no longer moves every score that W_k's codes are set for.

No parameter holds the product, so no shard could: it is formed from the latents in every forward pass, in float64 and
rounded once, so that its codes depend on no device, number of threads or ZeRO stage. Backward forms it again: what is kept is
the input, which attention keeps anyway, and the weight.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.ops.fake_quantize import near_boundary, quantize
from dsquant.spec import SCALE_FLOOR, Levels


class ProductArgs(NamedTuple):
    """Bundle how a product (H * C, C) is quantized.

    n_groups: scales, each of an equal run of rows. levels: the grid. centred: codes are decided around the mean of the group
    (BWN). reach: the gradient of an entry passes only within so many steps of a boundary between two codes (CGA), or None.
    """

    n_groups: int
    levels: Levels
    centred: bool = False
    reach: float | None = None


def qk_product(weight: Tensor, heads: int) -> Tensor:
    """Return W_q^T W_k of each head, float32 (H * C, C), from a fused q, k, v weight (3 * H * D, C) of any float dtype."""
    q, k = _factors(weight.double(), heads)
    return (q.transpose(1, 2) @ k).float().flatten(0, 1)


def _factors(weight: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return q and k weights, each (H, D, C)."""
    size = weight.shape[0] // 3
    return weight[:size].unflatten(0, (heads, -1)), weight[size : 2 * size].unflatten(0, (heads, -1))


def quantize_product(product: Tensor, args: ProductArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return float32 codes (n_groups, elements), scale (n_groups,) = 2 mean|w| / 2^(b-1), and mean where codes need one.

    Sums in float64, as those of weights on shards are. StatsQ: OFQ (Liu et al. 2023); BWN.
    """
    rows = product.view(args.n_groups, -1)
    half = (args.levels.qmax - args.levels.qmin + 1) / 2
    scale = (2 * rows.abs().mean(1, dtype=torch.float64) / half).float().clamp_(min=SCALE_FLOOR)
    centre = rows.mean(1, dtype=torch.float64).float() if args.centred else None
    column = None if centre is None else centre.unsqueeze(1)
    return quantize(rows, scale.unsqueeze(1), column, args.levels), scale, centre


def _image(weight: Tensor, heads: int, args: ProductArgs) -> tuple[Tensor, Tensor | None]:
    """Return w_hat (H * C, C) in the dtype of the weight, and which entries pass a gradient (None: all)."""
    product = qk_product(weight, heads)
    codes, scale, centre = quantize_product(product, args)
    free = None
    if args.reach is not None:
        rows = product.view_as(codes)
        v = (rows if centre is None else rows - centre.unsqueeze(1)) / scale.unsqueeze(1)
        free = near_boundary(v, args.levels, args.reach).view_as(product)
    return codes.add_(args.levels.shift).mul_(scale.unsqueeze(1)).view_as(product).to(weight.dtype), free


def keys_and_values(x: Tensor, image: Tensor, v_weight: Tensor, v_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys (..., H * C) = W_qk x and values (..., H * D): the arithmetic of training and of a packed model alike."""
    return F.linear(x, image), F.linear(x, v_weight, v_bias)


class _QkLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, heads, args):
        ctx.save_for_backward(x, weight)
        ctx.heads, ctx.args, ctx.has_bias = heads, args, bias is not None
        first = weight.shape[0] // 3 * 2
        return keys_and_values(
            x, _image(weight, heads, args)[0], weight[first:], None if bias is None else bias[first:]
        )

    @staticmethod
    def backward(ctx, d_keys, d_values):
        x, weight = ctx.saved_tensors
        image, free = _image(weight, ctx.heads, ctx.args)
        first = weight.shape[0] // 3 * 2
        d_x = (d_keys @ image).add_(d_values @ weight[first:])
        rows, of_keys, of_values = (t.reshape(-1, t.shape[-1]) for t in (x, d_keys, d_values))
        d_product = (of_keys.t() @ rows).float()
        if free is not None:
            d_product.mul_(free)
        q, k = _factors(weight.float(), ctx.heads)
        d_product = d_product.unflatten(0, (ctx.heads, -1))
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        d_q, d_k = _factors(d_weight, ctx.heads)
        d_q.copy_(k @ d_product.transpose(1, 2))
        d_k.copy_(q @ d_product)
        d_weight[first:] = of_values.t() @ rows
        d_bias = None
        if ctx.has_bias:
            d_bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
            d_bias[first:] = of_values.sum(0)
        return d_x, d_weight, d_bias, None, None


def qk_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, args: ProductArgs
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return keys x W_qk_hat^T (..., H * C) and values x W_v^T + b_v (..., H * D) of a fused q, k, v layer's input.

    Args:
        x: the layer's quantized input (..., C), float32 or bfloat16; with scores x_i . keys_j it is attention's query too.
        weight: (3 * H * D, C): q and k rows are latents, v rows whatever the layer is to multiply by (their image).
        bias: (3 * H * D,) or None; of q and k it has no part, and its gradient there is zero.
        heads: H.
        args: how the product is quantized.

    Straight-through: the gradient of w_hat is that of the product, W_q^h gets W_k^h dW^T and W_k^h gets W_q^h dW; scales are
    statistics and get none. With `args.reach` only entries near a boundary pass it (OFQ, CGA).
    Saves x and the weight itself, no view of it, so that ZeRO 3 can let go of it between forward and backward.
    Source: OFQ (Liu et al. 2023), query-key reparameterization.
    """
    return _QkLinear.apply(x, weight, bias, heads, args)
