"""Passes of the shard step in native code: each reads and writes a byte of a tile once; PyTorch takes a pass an operation.

Their definitions are the tile methods of `shard/weight_quantizers.py`, `shard/regularizers.py` and `shard/oscillation.py` and
torch's fused AdamW. Native code gives the same bits, but for sums over elements (float64), for what torch's AdamW computes
outside its vectors, the last few elements of a tensor, and, where freezing is on, for `code_mean`: each of these may round
once where the definition rounds twice. `flat_*` take all tiles of a flat in one call.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from dsquant.ops import backends


def call(name: str, backend: str, device: str, *arguments: Any) -> None:
    """Run an operator `dsquant::shard_*` by a backend."""
    backends.operator(f"shard_{name}", backend, device)(*arguments, backends.isa(backend))


@dataclass(frozen=True)
class AdamWStep:
    """Hold the numbers of one step of torch.optim.AdamW for one group of parameters; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    def numbers(self) -> tuple[float, ...]:
        """Return decay, beta1, beta2, the root of the second bias correction, eps and the step size, as torch forms them."""
        correction1, correction2 = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        decay = 1 - self.lr * self.weight_decay
        return decay, self.beta1, self.beta2, correction2**0.5, self.eps, self.lr / correction1


def adamw(w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamWStep, backend: str) -> None:
    """Step float32 values that nothing quantizes, each tensor one-dimensional."""
    call("adamw", backend, w.device.type, w, grad, exp_avg, exp_avg_sq, *step.numbers())


@dataclass(frozen=True)
class ScaleAdam:
    """Hold the numbers of one step of the scales' Adam (`quant/state.py`); `rate` is the schedule's factor on their rates."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    floor: float
    step: int

    def numbers(self) -> tuple[float, ...]:
        """Return rate, beta1, beta2, both bias corrections, eps and the floor."""
        corrections = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        return self.rate, self.beta1, self.beta2, *corrections, self.eps, self.floor


def scales(
    values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grads: Tensor, lr: Tensor, before: Tensor, start: int, step: ScaleAdam,
    backend: str,
) -> None:  # fmt: skip
    """Keep the float32 values from `start` on in `before`, as many as it holds, and step them by `QuantState.update`'s Adam."""
    call(
        "scales", backend, values.device.type, values, exp_avg, exp_avg_sq, grads, lr, before, start, *step.numbers(),
    )  # fmt: skip


@dataclass(frozen=True)
class TrackerStep:
    """Hold the numbers of one step of the oscillation tracker; `step` counts from 1.

    f_t = m o_t + (1 - m) f_{t-1} moves in every step, of every weight. A tracker keeps f_t / (1 - m)^k instead, which moves where
    a weight oscillates, by m / (1 - m)^k, and else stays where it is: not even read. k is the step modulo `spell`, and
    before a step where it is 0 all that is kept fades by (1 - m)^spell.

    Attributes:
        threshold: frequency above which weights freeze at this step, or None.
    """

    momentum: float
    step: int
    threshold: float | None = None

    @property
    def spell(self) -> int:
        """Return how many steps pass until all fades, by 2^-40 at most."""
        if not 0 < self.momentum < 1:
            return 1
        return max(1, int(-40 * math.log(2) / math.log1p(-self.momentum)))

    @property
    def left(self) -> float:
        """Return (1 - m)^k: what is kept, times this, is the frequency."""
        return (1 - self.momentum) ** (self.step % self.spell)

    @property
    def gain(self) -> float:
        """Return what an oscillation adds to what is kept."""
        return self.momentum / self.left

    @property
    def fade(self) -> float:
        """Return the factor on all that is kept, before the step."""
        return 1.0 if self.step % self.spell else (1 - self.momentum) ** self.spell

    @property
    def limit(self) -> float | None:
        """Return the threshold on what is kept, or None."""
        return None if self.threshold is None else self.threshold / self.left

    def numbers(self) -> tuple[float, float, float]:
        """Return momentum, gain and limit, -1 for none."""
        return self.momentum, self.gain, -1.0 if self.limit is None else self.limit


class Column(IntEnum):
    """Name the columns of a table of the tiles of a flat, float64 (tiles, 19), which native code reads.

    A tile is `rows * cols` elements from START on, row r of group `(FIRST_GROUP + r) % N_GROUPS` of a weight whose groups lie
    from GROUP on in all scales; its tracker begins at STATE. What bins hold lies from BIN on, N_BINS counts and N_BINS sums a
    group. N_GROUPS of 0: values that nothing quantizes. LATE: the scale is a statistic of what the step leaves.
    FACTOR: that of the gradients of scales.
    """

    START = 0
    ROWS = 1
    COLS = 2
    STATE = 3
    FIRST_GROUP = 4
    N_GROUPS = 5
    GROUP = 6
    BIN = 7
    N_BINS = 8
    WEIGHT = 9
    QMIN = 10
    QMAX = 11
    SHIFT = 12
    LOW = 13
    HIGH = 14
    PLAIN = 15
    LATE = 16
    PULL = 17
    FACTOR = 18


def flat_bins(
    w: Tensor, codes: Tensor, scale: Tensor, centre: Tensor | None, tiles: Tensor, bins: Tensor, backend: str
) -> None:  # fmt: skip
    """Put into float64 `bins` what each bin of a flat's groups holds: how many weights, and the sum of v = w / scale in parts of
    2^-22, clipped (see `regularizers.in_parts`). codes are those of the quantized elements alone.
    """
    call("flat_bins", backend, w.device.type, w, codes, scale, centre, tiles, bins)


def flat_step(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, image: Tensor, tracker: dict[str, Tensor | None],
    before: Tensor, after: Tensor, centre: Tensor | None, held: Tensor, spread: float, tiles: Tensor, adamw: AdamWStep,
    tracking: TrackerStep, norms: Tensor | None, sums: Tensor, bins: Tensor, backend: str,
) -> None:  # fmt: skip
    """Step a flat by AdamW in one pass: leave its image beside it, record its codes, and put what the next step asks for into
    `sums` and `bins`; late tiles by AdamW alone.

    The gradient of latents is that of their image where it passes, plus that of the regularizers: PULL of (w_hat - w)^2, and the
    variance of bins. Sums and bins of groups that have nothing in the flat stay as they are.

    Args:
        image: float32 like the flat, which may be `grad` itself; what nothing quantizes is copied to it.
        before, after: float32 (n_groups,) scales of the image that the forward pass used, and of the next.
        held: float64, what the bins hold over all shards, for a variance term of factor `spread`.
        norms: float64 (n_weights, 2), or None.
        sums: float64 (1, n_groups), d scale times FACTOR, or (2, n_groups), also |w| before the step.
        bins: float64 like `held`: what they hold after the step, of this flat alone.
    """
    call(
        "flat_step", backend, w.device.type, w, grad, exp_avg, exp_avg_sq, image, *tracker.values(), before, after, centre,
        held, spread, tiles, *adamw.numbers(), *tracking.numbers(), norms, sums, bins,
    )  # fmt: skip


def flat_moments(w: Tensor, tiles: Tensor, sums: Tensor, backend: str) -> None:
    """Put into float64 `sums` (n_groups, 3) those of |w|, w and w^2 of a flat's late tiles."""
    call("flat_moments", backend, w.device.type, w, tiles, sums)


def flat_image(
    w: Tensor, image: Tensor, tracker: dict[str, Tensor | None], scale: Tensor, centre: Tensor | None, tiles: Tensor,
    tracking: TrackerStep, bins: Tensor, backend: str,
) -> None:  # fmt: skip
    """Leave the images of a flat's late tiles in `image`, record their new codes, and put what their bins hold into `bins`."""
    call(
        "flat_image",
        backend,
        w.device.type,
        w,
        image,
        *tracker.values(),
        scale,
        centre,
        tiles,
        *tracking.numbers(),
        bins,
    )


# The schemas are here and their kernels in csrc/, attached when the library is loaded.
_LIBRARY = torch.library.Library("dsquant", "FRAGMENT")
_TRACKER = "Tensor(w!) codes, Tensor(x!) direction, Tensor(y!) frequency, Tensor(z!)? code_mean, Tensor(u!)? frozen"
_ADAMW = "float decay, float beta1, float beta2, float correction, float eps, float step"
for _schema in (
    f"shard_adamw(Tensor(a!) w, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_ADAMW}, int isa) -> ()",
    "shard_scales(Tensor(a!) values, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grads, Tensor lr, Tensor(d!) before, "
    "int start, float rate, float beta1, float beta2, float correction1, float correction2, float eps, float floor, int isa) "
    "-> ()",
    "shard_flat_bins(Tensor w, Tensor codes, Tensor scale, Tensor? centre, Tensor tiles, Tensor(a!) bins, int isa) -> ()",
    f"shard_flat_step(Tensor(a!) w, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) image, {_TRACKER}, "
    f"Tensor before, Tensor after, Tensor? centre, Tensor held, float spread, Tensor tiles, {_ADAMW}, float momentum, "
    "float gain, float threshold, Tensor(e!)? norms, Tensor(f!) sums, Tensor(g!) bins, int isa) -> ()",
    "shard_flat_moments(Tensor w, Tensor tiles, Tensor(a!) sums, int isa) -> ()",
    f"shard_flat_image(Tensor(a!) w, Tensor(b!) image, {_TRACKER}, Tensor scale, Tensor? centre, Tensor tiles, float momentum, "
    "float gain, float threshold, Tensor(c!) bins, int isa) -> ()",
):
    _LIBRARY.define(_schema)
    torch.library.register_fake("dsquant::" + _schema.partition("(")[0], lambda *_: None, lib=_LIBRARY)
