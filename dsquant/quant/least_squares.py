"""Refit linear layers to quantized inputs before training: what a layer puts out should be what it puts out in float.

Both models, float and quantized, run side by side in one pass, as two halves of one batch. Where the pass meets a linear layer,
its weight and bias are changed by the D of least squared error

    D = argmin sum_tokens |y - (W + D) x_hat|^2 + r |D|^2,    D^T = (X_hat^T X_hat + r I)^-1 X_hat^T (Y - X_hat W^T),

y being what the float model has there, x_hat the quantized input of the quantized one, which carries the errors of all layers
before it, their quantized weights included; 1 in x_hat stands for the bias. The quantized half then goes on with the image of
W + D. What is left is what no linear map undoes. Sums are over the tokens of all ranks.

Convolutions and embeddings stay float in this pass. Source: least squares with asymmetric inputs, as in GPTAQ (Li et al.
2025) and layer-wise reconstruction since AdaRound (Nagel et al. 2020); here the weight itself moves, as training goes on.
"""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsquant.errors import TrainingError
from dsquant.quant.calibrate import fit_to
from dsquant.quant.modules import ActivationQuantizer, Mode, QuantLinear
from dsquant.quant.padding import real_positions, real_tokens
from dsquant.quant.state import QuantState

Inputs = Tensor | dict[str, Tensor]
RIDGE = 0.01  # r, of the mean of the diagonal of X_hat^T X_hat
ROWS = 1 << 14  # tokens that are summed in float32 before their sum is added up in float64


@torch.no_grad()
def refit(
    model: nn.Module, quantizers: dict[str, ActivationQuantizer], state: QuantState, bind: Callable[[], None],
    forward: Callable[[Inputs], object], samples: Inputs, image: Callable[[str, Tensor], Tensor], init: str = "mse",
    given: Set[str] = frozenset(),
) -> dict[str, Tensor]:  # fmt: skip
    """Return what to add to weights and biases, by parameter name, float32 and the same on every rank.

    The model holds float weights, and does so after it. Activation quantizers are fitted on the way, where the pass meets them,
    to be fitted again by `calibrate` to what the refitted weights give.

    Args:
        quantizers, state, bind, init, given: as `calibrate` takes them.
        forward: runs the model in evaluation mode.
        samples: one batch, (B, ...) or a dict of such tensors with an `attention_mask`.
        image: makes w_hat of a parameter, by its name, and the latent (float32).

    Raises TrainingError naming a layer whose inputs or outputs are not finite.
    """
    bind()
    pair = _Pair(quantizers, partial(fit_to, state=state, init=init, given=given), image)
    with pair.inside(model), real_tokens(samples):
        forward(_doubled(samples))
    return pair.found


def least_squares(x_hat: Tensor, residual: Tensor, *, constant: bool) -> Tensor:
    """Return D (out, in), with `constant` (out, in + 1), for x_hat (tokens, in) and residual (tokens, out), over all ranks."""
    width = x_hat.shape[1] + constant
    sums = torch.zeros(width, width + residual.shape[1], dtype=torch.float64, device=x_hat.device)
    for x, r in zip(x_hat.split(ROWS), residual.split(ROWS), strict=True):
        x = torch.cat([x.float(), x.new_ones(len(x), 1, dtype=torch.float32)], 1) if constant else x.float()
        sums += (x.t() @ torch.cat([x, r.float()], 1)).double()
    if dist.is_initialized():
        dist.all_reduce(sums)
    gram, right = sums[:, :width], sums[:, width:]
    gram.diagonal().add_((RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny))
    solved = torch.linalg.solve(gram, right).t().contiguous()
    if dist.is_initialized():
        dist.broadcast(solved, 0)  # whatever ranks round otherwise
    return solved


class _Pair:
    """Run a model on two halves of a batch, the first in float, the second quantized, refitting what it meets."""

    def __init__(self, quantizers, fit, image):
        self.names = {quantizer: name for name, quantizer in quantizers.items()}
        self.fit, self.image = fit, image
        self.found: dict[str, Tensor] = {}
        self._fitted: set[str] = set()
        self._images: dict[str, tuple[Tensor, Tensor | None]] = {}

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Take the place of every linear layer and of every other activation site."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        try:
            for quantizer in self.names:
                quantizer.mode, quantizer.observer = Mode.FLOAT, _ignore  # attention with an observer forms every site
                quantizer.forward = self._site(quantizer)
            for name, module in layers.items():
                module.forward = self._layer(name, module)
            yield
        finally:
            for module in (*self.names, *layers.values()):
                del module.forward
            for quantizer in self.names:
                quantizer.observer = None

    def _site(self, quantizer: ActivationQuantizer) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            of_float, x = x.chunk(2)
            return torch.cat([of_float, self._quantized(quantizer, x)])

        return forward

    def _layer(self, name: str, module: QuantLinear) -> Callable[..., Tensor]:
        def forward(x: Tensor, bias: Tensor | None = None) -> Tensor:
            bias, own = (module.bias, True) if bias is None else (bias, False)
            of_float, x = x.chunk(2)
            y = F.linear(of_float, module.weight, bias)
            if module.input_quantizer is not None:
                x = self._quantized(module.input_quantizer, x)
            if name not in self._images:  # a layer that is applied again keeps what it has
                self._refit(name, module, x, y, bias, constant=own and bias is not None)
            image, more = self._images[name]
            return torch.cat([y, F.linear(x, image, bias if more is None else bias + more)])

        return forward

    def _quantized(self, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
        name = self.names[quantizer]
        if name not in self._fitted:
            self._fitted.add(name)
            self.fit(name, quantizer, x=x)
        quantizer.mode = Mode.QUANTIZE
        x_hat = ActivationQuantizer.forward(quantizer, quantizer.shifted(x))
        quantizer.mode = Mode.FLOAT
        return quantizer.moved(x_hat)

    def _refit(self, name: str, module: QuantLinear, x_hat: Tensor, y: Tensor, bias: Tensor | None, *, constant: bool):
        residual = y.float() - F.linear(x_hat.float(), module.weight.float(), None if bias is None else bias.float())
        real = real_positions(x_hat)
        rows = (t.flatten(0, -2) if real is None else t[real] for t in (x_hat, residual))
        change = least_squares(*rows, constant=constant).float()
        if not bool(change.isfinite().all()):
            raise TrainingError(f"calibration: {name} saw a value that is not finite; check the weights and the images")
        weight, more = (change[:, :-1], change[:, -1]) if constant else (change, None)
        self.found[f"{name}.weight"] = weight
        if more is not None:
            self.found[f"{name}.bias"] = more
        image = self.image(f"{name}.weight", module.weight.float() + weight)
        self._images[name] = image.to(x_hat.dtype), None if more is None else more.to(x_hat.dtype)


def _ignore(_x: Tensor) -> None:
    """Observe nothing."""


def _doubled(samples: Inputs) -> Inputs:
    if isinstance(samples, dict):
        return {name: torch.cat([tensor, tensor]) for name, tensor in samples.items()}
    return torch.cat([samples, samples])
