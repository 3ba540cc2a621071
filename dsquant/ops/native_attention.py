"""`quant_attention` in native code: what its kernels on CPU (csrc/) and GPU (gpu/) take, and how their operators are called.

q, k and v are quantized as they are read; where a site has another scale than one, or one a head, they come as images. On CPU a
head of an image is worked on at a time: scores and probabilities stay in the core's caches, and nothing else is written. On
GPUs Triton's kernels hold a block of scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsquant.ops import backends
from dsquant.ops.fake_quantize import QuantArgs, ScaleGradient, backward_into, quantize_dequantize
from dsquant.spec import Levels

TRITON_DIM = {torch.float32: 128, torch.bfloat16: 256}  # the most features of q, k and v that Triton's kernels take
FLOAT = (0.0,) * 7  # the grid of a site that is not quantized
QKV = (0, 1, 3)  # which sites are those of q, k and v


class Attention(NamedTuple):
    """Bundle the inputs of `quant_attention`, whose docstring says what they are."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float | Tensor
    bias: Tensor | None
    mask: Tensor | None
    args: list[QuantArgs | None]


class Gradients(NamedTuple):
    """Bundle what is summed over the batch, to be added to: d scale of q, k, probabilities and v, and the others, float64."""

    of_sites: list[ScaleGradient | None]
    softmax_scale: Tensor | None
    bias: Tensor | None


def choose(of: Attention) -> str:
    """Return the backend that runs. Raises ConfigError where one is forced that does not take these inputs."""
    if not (of.q.numel() and of.k.numel()):
        return backends.TORCH
    device, lacking = of.q.device.type, lacking_everywhere(of)
    if lacking:
        native: tuple[str, ...] = ()
    else:
        lacking = lacking_in_triton(of)
        native = backends.ON_CPU if lacking else backends.NATIVE
    return backends.choose("quant_attention", device, native, lacking)


def lacking_everywhere(of: Attention) -> str:
    """Name what no kernel takes; all want a query to have one softmax scale and one scale of probabilities."""
    q, k, v = of.q, of.k, of.v
    if not (q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        return f"{shapes}: they must share batch and heads, k and v tokens, q and k features"
    given = {"softmax scale": of.softmax_scale}
    if of.args[2] is not None:
        given |= {"scale of probabilities": of.args[2].scale, "offset of probabilities": of.args[2].offset}
    for name, value in given.items():
        if isinstance(value, Tensor) and not _one_a_query(value.shape):
            return f"a {name} of shape {tuple(value.shape)}: it must be the same for all images and keys"
    return ""


def lacking_in_triton(of: Attention) -> str:
    """Name what Triton's kernels alone do not take."""
    q, k, v = of.q, of.k, of.v
    if q.dtype not in TRITON_DIM or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}: they must share float32 or bfloat16"
    if q.shape[2] != k.shape[2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        return f"{shapes}: they must share batch, heads and tokens"
    if max(q.shape[-1], v.shape[-1]) > TRITON_DIM[q.dtype]:
        limits = " and ".join(f"{most} of {dtype}" for dtype, most in TRITON_DIM.items())
        return f"q {tuple(q.shape)} and v {tuple(v.shape)} of {q.dtype}: at most {limits} features"
    return ""


def _one_a_query(shape: torch.Size) -> bool:
    """Say whether what broadcasts to (B, H, N, N) is the same for all images and keys."""
    return shape.numel() == 1 or (shape[-1] == 1 and (len(shape) < 4 or shape[0] == 1))


def _one_a_head(of: Attention, scale: Tensor) -> bool:
    """Say whether what broadcasts to (B, H, N, D) is the same for all of a head."""
    return scale.numel() == 1 or (scale.dim() >= 3 and scale.shape[-3] == scale.numel() == of.q.shape[1])


def through_site(x: Tensor, grad: Tensor, args: QuantArgs | None, sums: ScaleGradient | None, d_x: Tensor) -> None:
    """Write dL/dx of a site to contiguous `d_x`, and add to the sums."""
    if args is None:
        d_x.copy_(grad)
    else:
        backward_into(x, grad, args.scale, args.offset, args.levels, sums, d_x)


def forward(of: Attention, backend: str) -> tuple[Tensor, Tensor | None]:
    """Do what the definition does; return the output, and what `backward` is given of it."""
    if backend == backends.TRITON:
        return backends.operator("quant_attention", backend, of.q.device.type)(*_on_gpu(of))
    batch, heads, queries, _ = of.q.shape
    out = torch.empty(batch, queries, heads, of.v.shape[-1])
    torch.ops.dsquant.quant_attention_cpu(*_on_cpu(of), out, backends.isa(backend))
    return out.transpose(1, 2).to(of.v.dtype), None


def backward(of: Attention, backend: str, kept: Tensor | None, grad: Tensor, sums: Gradients) -> list[Tensor]:
    """Return dL/dq, dL/dk and dL/dv, and add to what is summed over the batch."""
    if backend == backends.TRITON:
        d_qkv, by_head, of_probs, of_softmax, of_bias = _backward_on_gpu(of, backend, kept, grad, sums)
    else:
        d_qkv, by_head, of_probs, of_softmax, of_bias = _backward_on_cpu(of, backend, grad, sums)
    for total, part in ((sums.softmax_scale, of_softmax), (sums.bias, of_bias)):
        if total is not None:
            total += _sum_to(part, total.shape)
    if (probs := sums.of_sites[2]) is not None:
        one = of.args[2].scale.numel() == 1
        if one:
            kinds = 1 if of.args[2].offset is None else 2  # nothing is left of an offset that is not there
            probs.put(of_probs[:kinds].flatten(1).sum(1, keepdim=True, dtype=torch.float64))
        else:
            probs.put(torch.stack([_sum_to(part, of.args[2].scale.shape).view(-1) for part in of_probs]))
    of_all = by_head.sum(1, keepdim=True)
    for i, (x, d_x) in enumerate(zip((of.q, of.k, of.v), d_qkv, strict=True)):
        args, to = of.args[QKV[i]], sums.of_sites[QKV[i]]
        if args is None:
            continue
        if _one_a_head(of, args.scale):
            to.put((of_all if args.scale.numel() == 1 else by_head)[2 * i : 2 * i + 2])
        else:
            d_qkv[i] = torch.empty_like(x, memory_format=torch.contiguous_format)
            backward_into(x, d_x, args.scale, args.offset, args.levels, to, d_qkv[i])
    return d_qkv


def _sum_to(part: Tensor, shape: torch.Size) -> Tensor:
    """Sum what lies along trailing dimensions to a shape that broadcasts to it, in float64."""
    if shape.numel() == 1:
        return part.sum(dtype=torch.float64).view(shape)
    return part.double().sum_to_size(shape[-part.dim() :]).view(shape)


def _of_queries(of: Attention) -> Tensor:
    """Return softmax scale, scale and offset of the probabilities of each query, float32 (3, H, N, 1)."""
    probs = QuantArgs(1.0, None, Levels(0, 1)) if of.args[2] is None else of.args[2]
    rows = torch.empty(3, *of.q.shape[1:3], 1, dtype=torch.float32, device=of.q.device)
    for row, value in zip(rows, (of.softmax_scale, probs.scale, probs.offset), strict=True):
        if isinstance(value, Tensor):
            row.copy_(value.view(value.shape[-3:]))
        else:
            row.fill_(value or 0.0)
    return rows


def _on_cpu(of: Attention) -> tuple:
    """Return what the operators on CPU take: q, k, v, what is added to the scores, scales of heads and queries, grids.

    Of q, k and v with another scale than one a head the images.
    """
    heads, tokens, keys = of.q.shape[1], of.q.shape[2], of.k.shape[2]
    scales, grids, qkv = torch.zeros(3, 2, heads), [], []
    for i, x in enumerate((of.q, of.k, of.v)):
        args, x = of.args[(0, 1, 3)[i]], x.float()
        if args is not None and not _one_a_head(of, args.scale):
            x, args = quantize_dequantize(x, args.scale, args.offset, args.levels), None
        if args is not None:
            scales[i, 0] = args.scale.view(-1)
            if args.offset is not None:
                scales[i, 1] = args.offset.view(-1)
        qkv.append(x)
        grids.append(_grid(args))
    grids.insert(2, _grid(of.args[2]))
    bias = None if of.bias is None else of.bias.float().expand(1, heads, tokens, keys)
    mask = None if of.mask is None else of.mask.float().expand(-1, heads, tokens, keys)
    return *qkv, bias, mask, scales, _of_queries(of), torch.tensor(grids, dtype=torch.float64)


def _grid(args: QuantArgs | None) -> tuple[float, ...]:
    if args is None:
        return FLOAT
    levels = args.levels
    return 1.0, levels.qmin, levels.qmax, levels.shift, levels.low, levels.high, levels.elastic


def _backward_on_cpu(of: Attention, backend: str, grad: Tensor, sums: Gradients) -> tuple:
    """Form gradients: of q, k and v, of their sites' scales and offsets by head (6, H), of those of the probabilities
    (2, B, H, N, 1), of the softmax scale (B, H, N, 1) and the bias (H, N, N).
    """
    batch, heads, queries, _ = of.q.shape
    d_qkv = [torch.empty(x.shape, dtype=torch.float32) for x in (of.q, of.k, of.v)]
    of_heads = torch.empty(batch, heads, 6, dtype=torch.float64)
    of_queries = torch.empty(3, batch, heads, queries, 1, dtype=torch.float64)
    of_bias = None if sums.bias is None else torch.zeros(heads, queries, of.k.shape[2], dtype=torch.float64)
    learned = sums.softmax_scale is not None
    told = *_on_cpu(of), grad.float(), learned, *d_qkv, of_heads, of_queries, of_bias, backends.isa(backend)
    torch.ops.dsquant.quant_attention_cpu_backward(*told)
    d_qkv = [d_x.to(x.dtype) for d_x, x in zip(d_qkv, (of.q, of.k, of.v), strict=True)]
    return d_qkv, of_heads.sum(0).t(), of_queries[1:], of_queries[0], of_bias


def _on_gpu(of: Attention) -> tuple:
    """Return what the operators on GPUs take: q, k, v, what is added to the scores, softmax scale, scales and grids of sites."""
    qkv, scales, grids = [], [], []
    for i, args in enumerate(of.args):
        x = None if i == 2 else (of.q, of.k, of.v)[QKV.index(i)]
        if x is not None and args is not None and not _one_a_head(of, args.scale):
            x, args = quantize_dequantize(x, args.scale, args.offset, args.levels), None
        if x is not None:
            qkv.append(x if x.stride(-1) == 1 else x.contiguous())
        scales += (None, None) if args is None else (_by_head(args.scale), _by_head(args.offset))
        grids += [] if args is None else _grid(args)[1:]
    learned = isinstance(of.softmax_scale, Tensor)
    factor = (_by_head(of.softmax_scale), 0.0) if learned else (None, of.softmax_scale)
    return *qkv, of.bias, of.mask, *factor, scales, grids


def _by_head(value: Tensor | None) -> Tensor | None:
    """Return what broadcasts to (B, H, N, D) and is the same for all images as what broadcasts to (H, N, 1)."""
    return None if value is None else value.contiguous().view(value.shape[-3:])


def _backward_on_gpu(of: Attention, backend: str, kept: Tensor, grad: Tensor, sums: Gradients) -> tuple:
    """Do as `_backward_on_cpu`, given what forward kept."""
    told, (batch, heads, length, _) = _on_gpu(of), of.q.shape
    new = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=of.q.device)  # noqa: E731
    d_qkv = gradients_of_qkv(of.q, of.k, of.v)
    by_head = new(6, heads, dtype=torch.float64)
    of_probs = None if of.args[2] is None else new(2, batch, heads, length, 1)
    of_softmax = None if sums.softmax_scale is None else new(batch, heads, length, 1)
    of_bias = None if sums.bias is None else new(heads, length, length, dtype=torch.float64)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    run = backends.operator("quant_attention_backward", backend, of.q.device.type)
    run(*told, kept, grad, *d_qkv, by_head, of_probs, of_softmax, of_bias)
    return d_qkv, by_head, of_probs, of_softmax, of_bias


def gradients_of_qkv(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return new tensors like q, k and v: of one shape, as parts of one tensor, as the layer before has written them."""
    batch, heads, length, dim = q.shape
    if q.shape == k.shape == v.shape:
        return list(q.new_empty(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0))
    return [x.new_empty(batch, length, heads, x.shape[-1]).transpose(1, 2) for x in (q, k, v)]


# The schemas are here and their kernels in csrc/ and gpu/, attached when native code is loaded: tracing needs no compiler.
_LIBRARY = torch.library.Library("dsquant", "FRAGMENT")
_ON_GPU = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? factor, float softmax_scale, Tensor?[] scales, "
    "float[] grids"
)
_ON_CPU = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor heads, Tensor queries, Tensor grids"
_LIBRARY.define(f"quant_attention({_ON_GPU}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"quant_attention_backward({_ON_GPU}, Tensor kept, Tensor grad, Tensor(a!) d_q, Tensor(b!) d_k, Tensor(c!) d_v, "
    "Tensor(d!) d_sites, Tensor(e!)? d_probs, Tensor(f!)? d_factor, Tensor(g!)? d_bias) -> ()"
)
_LIBRARY.define(f"quant_attention_cpu({_ON_CPU}, Tensor(a!) out, int isa) -> ()")
_LIBRARY.define(
    f"quant_attention_cpu_backward({_ON_CPU}, Tensor grad, bool with_softmax_scale, Tensor(a!) d_q, Tensor(b!) d_k, "
    "Tensor(c!) d_v, Tensor(d!) d_heads, Tensor(e!) d_queries, Tensor(f!)? d_bias, int isa) -> ()"
)


@torch.library.register_fake("dsquant::quant_attention", lib=_LIBRARY)
def _(q, k, v, *_):
    batch, heads, length, dim = v.shape
    kept = v.new_empty(2, batch, heads, length, dtype=torch.float32)
    return v.new_empty(batch, length, heads, dim).transpose(1, 2), kept


def _nothing(*_):
    return None


for _name in ("quant_attention_backward", "quant_attention_cpu", "quant_attention_cpu_backward"):
    torch.library.register_fake(f"dsquant::{_name}", _nothing, lib=_LIBRARY)
