"""Calls of each op, to be checked and timed by every backend on a device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dsquant.ops import backends, shard_step
from dsquant.ops.fake_quantize import QuantArgs, ScaleGradient, backward_into, quantize_dequantize
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import PackedMatrix, packed_matrix, run
from dsquant.ops.quant_attention import quant_attention
from dsquant.ops.quant_linear import WeightGrid, quant_linear
from dsquant.ops.shard_step import Column
from dsquant.ops.timing import captured, interleaved
from dsquant.spec import Levels

FLOAT_BYTES = 4
SHORT = 1 << 27  # bytes that a GPU moves in tens of microseconds


@dataclass(frozen=True)
class Case:
    """Say what is run for an op.

    Attributes:
        op, label: what it is.
        shape: of the operands.
        bytes_moved: read and written, each operand once.
        run: gives the results by a backend, one or several.
        tolerance: of each result, as a share of its largest value.
        native: backends that have code for it.
        fresh: makes what `run` is given beside the backend, and may change: anew each time, and not timed.
        peers: what others offer for it, in float.
    """

    op: str
    label: str
    shape: str
    bytes_moved: int
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    tolerance: float = 0.0
    native: tuple[str, ...] = backends.NATIVE
    fresh: Callable[[], tuple] = tuple
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    def backends(self, device: str) -> list[str]:
        """Return the definition and the native code for a device, available or not."""
        here = backends.ON_CPU if device == "cpu" else backends.ON_GPU
        return [backends.TORCH, *(name for name in self.native if name in here)]

    def results(self, backend: str) -> tuple[Tensor, ...]:
        """Run the case by a backend."""
        found = self.run(backend, *self.fresh())
        return (found,) if isinstance(found, Tensor) else found

    def error(self, backend: str, expected: tuple[Tensor, ...]) -> float:
        """Return how far a backend is from the definition's results, as a share of the largest value of each."""
        pairs = zip(self.results(backend), expected, strict=True)
        return max(
            float((found.double() - wanted).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
            for found, wanted in pairs
        )

    def timed(self, names: list[str], device: str, repeats: int) -> dict[str, float]:
        """Return the median seconds of each of some backends, and of peers, taking turns; on a GPU of their kernels alone."""
        given = {name: self.fresh() for name in names}
        runs = {name: (lambda name=name: self.run(name, *given[name])) for name in names} | dict(self.peers)
        if device != "cpu":
            times = 4 if self.bytes_moved > SHORT else 20  # in a graph, whose start takes microseconds
            seconds = interleaved({name: captured(run, times=times) for name, run in runs.items()}, repeats)
            return {name: taken / times for name, taken in seconds.items()}
        before = {name: (lambda name=name: given.update({name: self.fresh()})) for name in names}
        return interleaved(runs, repeats, before=before)


@torch.no_grad()
def disagreements(device: str) -> list[str]:
    """Run every case by each backend that can; name those that are further from the definition than tolerated."""
    found = []
    for case in all_cases(device):
        expected = case.results(backends.TORCH)
        for backend in case.backends(device)[1:]:
            if backends.availability(backend).available and not case.error(backend, expected) <= case.tolerance:
                found.append(f"{case.op} ({case.label}) by {backend}")
    return found


def all_cases(device: str) -> list[Case]:
    """Return the cases of every op on a device type, float32, the sizes those of a ViT."""
    packed = [case for rows in (197, 1) for case in packed_linear_cases(rows, device)]
    trained = fake_quantize_cases(device) + quant_linear_cases(device) + attention_cases(device)
    return trained + shard_step_cases(device) + packed


def _randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


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
    shape, dtype = ((8, 197, 768), torch.float32) if device == "cpu" else ((256, 197, 768), torch.bfloat16)
    x, grad = _randn(2, *shape, device=device).to(dtype)
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
        size = x.numel() * x.element_size()
        cases.append(Case(label=f"forward, {name}", bytes_moved=2 * size, run=forward, **of))
        cases.append(Case(label=f"backward, {name}", bytes_moved=3 * size, run=backward, **of))
    return cases + gelu_cases(shape, grad)


# Inputs whose GELU is far from where codes meet, and from where gradients end, on a grid of 0.4 from -0.1: rounding moves none.
OFF_BOUNDARIES = (-3.0, -0.5, 0.0, 0.3, 0.45, 0.6, 0.9, 1.1, 2.5)


def gelu_cases(shape: tuple[int, ...], grad: Tensor) -> list[Case]:
    """Return the passes of a GELU with the quantizer behind it, which `quant_linear` takes in training; on GPUs they are one."""
    device, levels = grad.device, Levels(0, 3)
    scale, offset = torch.tensor([0.4], device=device), torch.tensor([-0.1], device=device)
    inputs = torch.tensor(OFF_BOUNDARIES, device=device)
    chosen = torch.randint(len(inputs), shape, device=device, generator=torch.Generator(device).manual_seed(0))
    x = inputs[chosen].to(grad.dtype)

    def forward(backend: str) -> Tensor:
        with backends.forced(backend):
            return quantize_dequantize(x, scale, offset, levels, gelu=True)

    def backward(backend: str) -> tuple[Tensor, ...]:
        d_x, x_hat, sums = torch.empty_like(x), torch.empty_like(x), ScaleGradient(scale, offset)
        with backends.forced(backend):
            backward_into(x, grad, scale, offset, levels, sums, d_x, x_hat, gelu=True)
        return d_x, x_hat, sums.parts

    of = {"op": "fake_quantize", "shape": " x ".join(map(str, shape)), "tolerance": 0.01}
    size = x.numel() * x.element_size()
    return [
        Case(label="forward, of a GELU", bytes_moved=2 * size, run=forward, **of),
        Case(label="backward, of a GELU, with its image", bytes_moved=4 * size, run=backward, **of),
    ]


def quant_linear_cases(device: str) -> list[Case]:
    """Return the forward of `quant_linear` on a weight that is an image, for a batch: in float32; on GPUs in bfloat16."""
    batch, dtype = (16, torch.float32) if device == "cpu" else (64, torch.bfloat16)
    shape = (batch, 197, 768)
    levels, scale = Levels(-2, 1), torch.full((768,), 0.05, device=device)
    codes = torch.randint(-2, 2, (768, 768), generator=torch.Generator().manual_seed(0))
    weight = (codes * 0.05).to(device, dtype)
    x, in_scale = _randn(*shape, device=device).to(dtype), torch.tensor([0.03], device=device)
    grid = WeightGrid(scale, levels)

    def forward(backend: str) -> Tensor:
        with backends.forced(f"quant_linear={backend}"):  # who quantizes for the definition is left to auto
            return quant_linear(x, weight, None, in_scale, None, Levels(-128, 127), 1.0, grid).float()

    size = (2 * x.numel() + weight.numel()) * x.element_size()
    peers = {} if device == "cpu" else {"torch linear": lambda: F.linear(x, weight).float()}
    label, tolerance = f"forward, {str(dtype).removeprefix('torch.')}", 1e-5 if device == "cpu" else 0.01
    return [Case("quant_linear", label, " x ".join(map(str, (*shape, 768))), size, forward, tolerance, peers=peers)]


def attention_cases(device: str) -> list[Case]:
    """Return forward and backward of `quant_attention` at 2 bits, of a ViT; on GPUs of Swin's windows too, beside torch's own."""
    if device == "cpu":
        return [_attention_case("forward and backward", (4, 3, 197, 64), device, torch.float32)]
    shapes = {"forward and backward": (256, 6, 197, 64), "forward and backward, 128 tokens": (256, 12, 128, 64),
              "forward and backward, windows": (4096, 3, 49, 32)}  # fmt: skip
    return [_attention_case(label, shape, device, torch.bfloat16) for label, shape in shapes.items()]


def _attention_case(label: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Case:
    batch, heads, length, dim = shape
    leaves = [t.to(dtype).requires_grad_() for t in _randn(3, *shape, device=device)]
    grad = _randn(*shape, device=device, seed=1).to(dtype)
    signed = QuantArgs(torch.tensor([0.7], device=device), None, Levels(-2, 1))
    probs = QuantArgs(torch.tensor([2.2 / length], device=device), None, Levels(0, 3))
    added, mask, learned = None, None, list(leaves)
    if "windows" in label:
        added = _randn(1, heads, length, length, device=device).to(dtype).requires_grad_()
        mask = torch.where(_randn(64, 1, length, length, device=device) > 1, -100.0, 0.0).to(dtype)
        learned.append(added)

    def both(backend: str) -> tuple[Tensor, ...]:
        with backends.forced(f"quant_attention={backend}"), torch.enable_grad():
            out = quant_attention(*leaves, dim**-0.5, signed, signed, probs, signed, bias=added, mask=mask)
            return torch.autograd.grad(out, learned, grad)

    def in_float() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            scores = added
            if mask is not None:  # as timm adds it
                scores = (added + mask.repeat(batch // len(mask), 1, 1, 1)).contiguous()
            out = F.scaled_dot_product_attention(*leaves, attn_mask=scores)
            return torch.autograd.grad(out, learned, grad)

    size = 8 * grad.numel() * grad.element_size()
    # A probability within rounding of a boundary between two codes may fall to either side, and moves a few gradients.
    tolerance, peers = (0.05, {}) if device == "cpu" else (0.1, {"torch sdpa": in_float})
    return Case("quant_attention", label, " x ".join(map(str, shape)), size, both, tolerance, peers=peers)


def shard_step_cases(device: str) -> list[Case]:
    """Return the passes of the shard step over 2-bit weights: a whole step, and what bins hold alone; and that of images
    that come later; each written out.
    """
    levels, size, pull, share = Levels(-2, 1), 768, 0.01, 0.5
    n_weights = 4 if device == "cpu" else 24
    rows = n_weights * size  # of all weights, a scale a row
    w, grad, m, v, often = _randn(5, rows, size, device=device) * 0.05
    groups, scale = torch.arange(rows, device=device), torch.full((rows,), 0.05, device=device)
    column, after = scale[:, None], 1.01 * scale
    codes = (w / column).clamp(levels.qmin, levels.qmax).round().to(torch.int8)
    inside = (w / column >= levels.low) & (w / column <= levels.high)
    adamw, tracking = shard_step.AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.05, 10), shard_step.TrackerStep(0.01, 10)
    tiles = torch.zeros(n_weights, len(Column), dtype=torch.float64)
    for weight, tile in enumerate(tiles):
        tile[Column.WEIGHT], tile[Column.GROUP], tile[Column.BIN] = weight, weight * size, 8 * weight * size
        tile[Column.START] = tile[Column.STATE] = weight * size * size
        tile[Column.ROWS] = tile[Column.COLS] = tile[Column.N_GROUPS] = size
        tile[Column.QMIN], tile[Column.QMAX], tile[Column.LOW], tile[Column.HIGH] = -2, 1, -2, 1
        tile[Column.N_BINS], tile[Column.PULL], tile[Column.FACTOR] = 4, pull, share
    late = tiles.clone()
    late[:, Column.LATE] = 1

    def of_bins(values: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Return (rows, 8): how many values each bin of a row holds, and their sums."""
        parts = ((values / scale[:, None]).clamp(levels.low, levels.high) * 2**22).round().double().view(-1)
        index = groups[:, None] * 8 + codes.long() - levels.qmin
        found = torch.zeros(8 * rows, dtype=torch.float64, device=device)
        found.index_add_(0, index.view(-1), torch.ones_like(parts))
        return found.index_add_(0, index.view(-1) + 4, parts).view(rows, 8)

    held = of_bins(w, codes, scale)

    def recorded(own: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """Return codes, direction and frequency of a tracker once codes went from `before` to `own`."""
        delta = (own > before).to(torch.int8) - (own < before).to(torch.int8)
        frequency = often.abs().add((delta * codes.sign() == -1).float(), alpha=tracking.gain)
        return own, torch.where(delta != 0, delta, codes.sign()), frequency

    def of_tracker(tracker: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        return tracker["codes"], tracker["direction"], tracker["frequency"]

    def new_bins() -> tuple[Tensor]:
        return (torch.zeros_like(held),)

    def start() -> tuple:
        """Return latents, both moments, room for images, tracker, and room for what the step finds of scales and bins."""
        tracker = dict(codes=codes.clone(), direction=codes.sign(), frequency=often.abs(), code_mean=None, frozen=None)
        sums = torch.zeros(1, rows, dtype=torch.float64, device=device)
        return w.clone(), m.clone(), v.square(), torch.empty_like(w), tracker, sums, *new_bins()

    def by_definition(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        decay, beta1, beta2, correction, eps, size_of_step = adamw.numbers()
        counts, totals = held.view(rows, 2, 4).unbind(1)
        index = codes.long() - levels.qmin
        mean = (totals / counts.clamp(min=1) * (column.double() / 2**22)).float().gather(1, index)
        factor = torch.where(counts > 1, 2 * pull / (counts - 1).clamp(min=1), 0.0).float().gather(1, index)
        g = torch.where(inside, grad + 2 * pull * (w - codes * column) + (w - mean) * factor, 0.0)
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        values = w * decay - size_of_step * first / (second.sqrt() / correction + eps)
        own = (values / after[:, None]).clamp(levels.qmin, levels.qmax).round()
        d_scale = (grad * torch.where(inside, codes - w / column, codes.float())).double().sum(1, keepdim=True).T
        found = share * d_scale, of_bins(values, own, after)
        return values, first, second, own * after[:, None], *recorded(own.to(torch.int8), codes), *found

    def step(backend: str, *given) -> tuple[Tensor, ...]:
        values, first, second, shown, tracker, sums, bins = given
        if backend == backends.TORCH:
            return by_definition(first, second)
        shard_step.flat_step(
            values, grad, first, second, shown, tracker, scale, after, None, held, pull, tiles, adamw, tracking, None, sums,
            bins, backend,
        )  # fmt: skip
        return values, first, second, shown, *of_tracker(tracker), sums, bins

    def bins(backend: str, found: Tensor) -> Tensor:
        if backend == backends.TORCH:
            return of_bins(w, codes, scale)
        shard_step.flat_bins(w, codes, scale, None, tiles, found, backend)
        return found

    def start_late() -> tuple:
        values, *_, shown, tracker, _, found = start()
        tracker["codes"] = 1 - codes.abs()
        return values, shown, tracker, found

    def image(
        backend: str, values: Tensor, shown: Tensor, tracker: dict[str, Tensor | None], found: Tensor
    ) -> tuple[Tensor, ...]:
        if backend == backends.TORCH:
            return codes * column, *recorded(codes, tracker["codes"]), of_bins(w, codes, scale)
        shard_step.flat_image(values, shown, tracker, scale, None, late, tracking, found, backend)
        return shown, *of_tracker(tracker), found

    of = {"op": "shard_step", "shape": f"{n_weights} x {size} x {size}"}
    # Bytes a weight, but those of the tracker that move where a code changes; and what each is given.
    moved = {step: (33, start), image: (13, start_late), bins: (5, new_bins)}
    return [
        Case(label=f.__name__, bytes_moved=n * rows * size, run=f, tolerance=1e-6, fresh=fresh, **of)
        for f, (n, fresh) in moved.items()
    ]
