"""One flat, replicated float32 tensor for all scales and offsets of a model, outside ZeRO, with its own small optimizer.

DeepSpeed would cast scales to bf16, decay them, revert those initialised late and mix their hyper-parameters; none of
that touches a tensor it does not own. Gradients arrive in float64, summed over all ranks, and are rounded once.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dsquant.errors import CheckpointError
from dsquant.spec import SCALE_FLOOR, ActivationSite, WeightSite

ADAM_EPS = 1e-8
BIASES = frozenset({"before", "after"})  # one value a feature, where scale and offset have one a group


@dataclass(frozen=True)
class Entry:
    """Locate one site's values of one role in the flat state."""

    name: str
    role: str
    start: int
    numel: int

    @property
    def key(self) -> str:
        return f"{self.name}:{self.role}"

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.numel)


class QuantState:
    """Hold every scale and offset, their gradients and their Adam moments.

    Layout: activation scales and offsets first (their gradients come from autograd on every rank), then weight scales (their
    gradients are what a shard step found, and step them in the next one). Learning rates are per value: base * site
    multiplier, and in relative mode * the scale at calibration, so that one step moves any scale by the same share of itself.
    """

    def __init__(
        self, weights: list[WeightSite], activations: list[ActivationSite], device: torch.device | str = "cpu",
        optimizer: str = "adam",
    ):  # fmt: skip
        self.optimizer = optimizer
        self.entries: dict[str, Entry] = {}
        self._multipliers: list[float] = []
        for site in activations:
            for role, numel in site.values.items():
                self._add(site.name, role, numel, site.spec.lr_scale)
        self.n_activation = len(self._multipliers)
        for site in weights:
            for role in site.roles:
                self._add(site.name, role, site.grouping.n_groups, site.spec.lr_scale)
        size = len(self._multipliers)
        self.values, self.grads, self.exp_avg, self.exp_avg_sq, self.lr = (
            torch.zeros(size, dtype=torch.float32, device=device) for _ in range(5)
        )
        self.step_count = 0
        self._is_scale = torch.zeros(size, dtype=torch.bool, device=device)
        for entry in self.entries.values():
            self._is_scale[entry.slice] = entry.role == "scale"

    def _add(self, name: str, role: str, numel: int, multiplier: float) -> None:
        entry = Entry(name, role, len(self._multipliers), numel)
        self.entries[entry.key] = entry
        self._multipliers += [multiplier] * numel

    def get(self, name: str, role: str = "scale") -> Tensor | None:
        """Return the view (n_groups,) of a site's values, or None where the site has no such role."""
        entry = self.entries.get(f"{name}:{role}")
        return None if entry is None else self.values[entry.slice]

    def leaf(self, name: str, role: str = "scale") -> Tensor | None:
        """Return an autograd leaf that shares its storage with the flat values and its gradient with the flat gradient."""
        entry = self.entries.get(f"{name}:{role}")
        if entry is None:
            return None
        leaf = self.values[entry.slice].detach().requires_grad_()
        leaf.grad = self.grads[entry.slice]
        return leaf

    def set_learning_rates(self, base: float, mode: str) -> None:
        """Fix each value's learning rate; in relative mode offsets and biases move with the scale of their own site."""
        multipliers = torch.tensor(self._multipliers, dtype=torch.float32, device=self.values.device)
        self.lr = base * multipliers
        if mode == "relative":
            for entry in self.entries.values():
                scale = self.get(entry.name)
                self.lr[entry.slice] *= scale.mean() if entry.role in BIASES else scale

    def take_activation_grads(self, world_size: int) -> Tensor:
        """Return the activation part of the gradients divided by world_size, float64, ready to be summed over ranks."""
        return self.grads[: self.n_activation].double() / world_size

    def update(
        self, where: slice | Tensor, lr_factor: float, betas: tuple[float, float], eps: float = ADAM_EPS
    ) -> None:
        """Step the values at `where` with the summed gradients there; no weight decay, scales stay positive.

        adam: value -= lr * lr_factor * m_hat / (sqrt(v_hat) + eps), in float64, and what is kept rounded once, so that no
        device and no instruction set has bits of its own. sgd, where gradient scales have an effect: m = beta1 * m + g,
        value -= lr * lr_factor * m. Call `begin_step` once before the updates of a step.
        """
        beta1, beta2 = betas
        grad = self.grads[where]
        if self.optimizer == "sgd":
            self.exp_avg[where] = m = self.exp_avg[where].mul(beta1).add_(grad)
            self._put(where, self.values[where] - self.lr[where] * lr_factor * m)
            return
        grad = grad.double()
        m = self.exp_avg[where].double().mul_(beta1).add_(grad, alpha=1 - beta1).float()
        v = self.exp_avg_sq[where].double().mul_(beta2).addcmul_(grad, grad, value=1 - beta2).float()
        self.exp_avg[where], self.exp_avg_sq[where] = m, v
        m_hat, v_hat = m.double() / (1 - beta1**self.step_count), v.double() / (1 - beta2**self.step_count)
        away = self.lr[where].double() * lr_factor * m_hat / (v_hat.sqrt() + eps)
        self._put(where, (self.values[where] - away).float())

    def _put(self, where: slice | Tensor, new: Tensor) -> None:
        self.values[where] = torch.where(self._is_scale[where], new.clamp(min=SCALE_FLOOR), new)

    def begin_step(self) -> None:
        """Count a step, for the bias correction of every update in it."""
        self.step_count += 1

    def zero_grad(self) -> None:
        """Clear the gradients of activation scales in place: autograd's leaves share them. Those of weight scales wait."""
        self.grads[: self.n_activation].zero_()

    def digest(self) -> str:
        """Return a hash of every value, equal on all ranks exactly when the states are."""
        return hashlib.sha256(self.values.cpu().numpy().tobytes()).hexdigest()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, each value keyed by `site:role`, moments included."""
        tensors = {
            f"{key}/{part}": tensor[entry.slice].clone().cpu()
            for key, entry in self.entries.items()
            for part, tensor in self._parts(entry).items()
        }
        return {**tensors, "step_count": torch.tensor(self.step_count)}

    def _parts(self, entry: Entry) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of an entry; of weights also gradients, which the next step takes."""
        found = {"value": self.values, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "lr": self.lr}
        return found | ({"grad": self.grads} if entry.start >= self.n_activation else {})

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises CheckpointError naming a site that differs."""
        expected = {f"{key}/{part}" for key, entry in self.entries.items() for part in self._parts(entry)} | {
            "step_count"
        }
        if odd := sorted(expected ^ set(tensors)):
            raise CheckpointError(f"quantizer state of another model or policy: {odd[0]!r} is on one side only")
        for key, entry in self.entries.items():
            for part, tensor in self._parts(entry).items():
                saved = tensors[f"{key}/{part}"]
                if saved.numel() != entry.numel:
                    raise CheckpointError(f"{key}: checkpoint has {saved.numel()} groups, this run {entry.numel}")
                tensor[entry.slice] = saved.to(tensor.device)
        self.step_count = int(tensors["step_count"])
