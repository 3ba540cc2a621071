"""Calls of each op, to be checked and timed by every backend on a device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsquant.ops import backends, shard_step
from dsquant.ops.fake_quantize import QuantArgs, ScaleGradient, backward_into, quantize_dequantize
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import PackedMatrix, packed_matrix, run
from dsquant.ops.quant_attention import quant_attention
from dsquant.spec import Levels

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Case:
    """Say what is run for an op.

    Attributes:
        op, label: what it is.
        shape: of the operands.
        bytes_moved: read and written, each operand once.
        run: gives a result by a backend.
        tolerance: of the result, as a share of its largest value.
        native: backends that have code for it.
    """

    op: str
    label: str
    shape: str
    bytes_moved: int
    run: Callable[[str], Tensor]
    tolerance: float = 0.0
    native: tuple[str, ...] = backends.NATIVE

    def backends(self, device: str) -> list[str]:
        """Return the definition and the native code for a device, available or not."""
        here = backends.ON_CPU if device == "cpu" else backends.ON_GPU
        return [backends.TORCH, *(name for name in self.native if name in here)]

    def error(self, backend: str, expected: Tensor) -> float:
        """Return how far a backend is from the definition's result, as a share of its largest value."""
        return float((self.run(backend) - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def disagreements(device: str) -> list[str]:
    """Run every case by each backend that can; name those that are further from the definition than tolerated."""
    found = []
    for case in all_cases(device):
        expected = case.run(backends.TORCH)
        for backend in case.backends(device)[1:]:
            if backends.availability(backend).available and not case.error(backend, expected) <= case.tolerance:
                found.append(f"{case.op} ({case.label}) by {backend}")
    return found


def all_cases(device: str) -> list[Case]:
    """Return the cases of every op on a device type, float32, the sizes those of a ViT."""
    packed = [case for rows in (197, 1) for case in packed_linear_cases(rows, device)]
    return fake_quantize_cases(device) + attention_cases(device) + shard_step_cases(device) + packed


def _randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _packed_weight(n_bits: int, device: str) -> PackedMatrix:
    half, generator = 2 ** (n_bits - 1), torch.Generator().manual_seed(0)
    codes = torch.randint(-half, half, (768, 768), generator=generator).to(torch.int8)
    return packed_matrix(pack(codes, n_bits).to(device), _randn(768, device=device).abs() + 0.1, n_bits, 768)


def packed_linear_cases(rows: int, device: str) -> list[Case]:
    """Return the cases of `packed_linear` for x of `rows` rows: integers, and float; and those that CUDA C++ takes by bits."""
    x, eight = _randn(rows, 768, device=device, seed=1), Levels(-128, 127)
    kinds = {"x of 8 bits, one scale": (2, eight, 0.03), "float x": (2, None, None)}
    by_bits = {"W1A1": (1, Levels(-1, 0, 0.5), 1.0), "W1A2": (1, Levels(-2, 1), 0.5), "W2A2": (2, Levels(-2, 1), 0.5)}
    cases = []
    for label, (n_bits, levels, scale) in (kinds | by_bits).items():
        weight = _packed_weight(n_bits, device)
        quant = None if levels is None else QuantArgs(torch.tensor([scale], device=device), None, levels)
        case = Case(
            "packed_linear",
            f"{label}; M {rows}",
            f"{rows} x 768 x 768",
            weight.words.numel() * 4 + 2 * x.numel() * FLOAT_BYTES,
            lambda b, weight=weight, quant=quant: run(b, x, weight, None, quant),
            tolerance=0.0 if quant else 1e-5,
            native=(*backends.NATIVE, backends.CUDA) if label in by_bits else backends.NATIVE,
        )
        cases.append(case)
    return cases


def fake_quantize_cases(device: str) -> list[Case]:
    """Return the cases of the two passes that fake_quantize, quant_linear and quant_attention share."""
    shape = (8, 197, 768)
    x, grad = _randn(2, *shape, device=device)
    cases = []
    for name, scale in {"one scale": torch.tensor([0.5]), "a scale a token": torch.full((197, 1), 0.5)}.items():
        scale = scale.to(device)

        def forward(backend: str, scale: Tensor = scale) -> Tensor:
            with backends.forced(backend):
                return quantize_dequantize(x, scale, None, Levels(-2, 1))

        def backward(backend: str, scale: Tensor = scale) -> Tensor:
            d_x = torch.empty_like(x)
            with backends.forced(backend):
                backward_into(x, grad, scale, None, Levels(-2, 1), ScaleGradient(scale, None), d_x)
            return d_x

        of = {"op": "fake_quantize", "shape": " x ".join(map(str, shape))}
        size = x.numel() * FLOAT_BYTES
        cases.append(Case(label=f"forward, {name}", bytes_moved=2 * size, run=forward, **of))
        cases.append(Case(label=f"backward, {name}", bytes_moved=3 * size, run=backward, **of))
    return cases


def attention_cases(device: str) -> list[Case]:
    """Return forward and backward of `quant_attention` at 2 bits."""
    shape = (4, 3, 197, 64)
    leaves = [t.requires_grad_() for t in _randn(3, *shape, device=device)]
    grad = _randn(*shape, device=device, seed=1)
    signed = QuantArgs(torch.tensor([0.7], device=device), None, Levels(-2, 1))
    probs = QuantArgs(torch.tensor([0.011], device=device), None, Levels(0, 3))

    def both(backend: str) -> Tensor:
        with backends.forced(backend), torch.enable_grad():
            out = quant_attention(*leaves, 0.125, signed, signed, probs, signed)
            return torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, grad)])

    size = 8 * grad.numel() * FLOAT_BYTES
    # A probability within rounding of a boundary between two codes may fall to either side, and moves a few gradients.
    return [Case("quant_attention", "forward and backward", " x ".join(map(str, shape)), size, both, tolerance=0.05)]


def shard_step_cases(device: str) -> list[Case]:
    """Return the three passes of the shard step on a weight of 768 x 768, a scale a row, 2 bits; each written out for torch."""
    levels, rows, cols, pull = Levels(-2, 1), 768, 768, 0.01
    w, grad, m, v, often, kept = _randn(6, rows, cols, device=device) * 0.05
    groups, scale = torch.arange(rows, device=device), torch.full((rows,), 0.05, device=device)
    column = scale[:, None]
    codes = (w / column).clamp(levels.qmin, levels.qmax).round().to(torch.int8)
    inside = (w / column >= levels.low) & (w / column <= levels.high)
    adamw = shard_step.AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.05, 10)

    def view(backend: str, values: Tensor) -> shard_step.TileView:
        return shard_step.TileView(values, groups, scale, None, levels, backend)

    def gather(backend: str) -> Tensor:
        sums, bins = (torch.zeros(2, n * rows, dtype=torch.float64, device=device) for n in (1, 4))
        if backend != backends.TORCH:
            shard_step.gather(view(backend, w), grad, codes, None, False, sums, bins)
            return torch.cat([sums.flatten(), bins.flatten()])
        of_scale = grad * torch.where(inside, codes - w / column, codes.float())
        index = (groups[:, None] * 4 + codes.long() - levels.qmin).view(-1)
        bins[0].index_add_(0, index, torch.ones(rows * cols, dtype=torch.float64, device=device))
        bins[1].index_add_(0, index, w.clamp(levels.low * column, levels.high * column).double().view(-1))
        return torch.cat([of_scale.double().sum(1), w.abs().double().sum(1), bins.flatten()])

    def update(backend: str) -> Tensor:
        values, first, second = w.clone(), m.clone(), v.square()
        if backend != backends.TORCH:
            shard_step.update(view(backend, values), grad, first, second, codes, None, pull, None, adamw, None)
            return torch.cat([values, first, second])
        decay, beta1, beta2, correction, eps, step = adamw.numbers()
        g = torch.where(inside, grad + 2 * pull * (w - codes * column), 0.0)
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        values.mul_(decay).sub_(step * first / (second.sqrt() / correction + eps))
        return torch.cat([values, first, second])

    def image(backend: str) -> Tensor:
        values, own, direction, latent, frequency = w.clone(), 1 - codes.abs(), codes.sign(), kept.clone(), often.abs()
        if backend != backends.TORCH:
            shard_step.image(view(backend, values), latent, own, direction, frequency, None, None, 0.01, None)
            return torch.cat([values, latent, frequency, own.float(), direction.float()])
        delta = (codes > own).to(torch.int8) - (codes < own).to(torch.int8)
        frequency.mul_(0.99).add_((delta * direction == -1).float(), alpha=0.01)
        direction = torch.where(delta != 0, delta, direction)
        return torch.cat([codes * column, w, frequency, codes.float(), direction.float()])

    sizes, of = {gather: 9, update: 29, image: 22}, {"op": "shard_step", "shape": f"{rows} x {cols}"}
    return [Case(label=f.__name__, bytes_moved=n * rows * cols, run=f, tolerance=1e-6, **of) for f, n in sizes.items()]
