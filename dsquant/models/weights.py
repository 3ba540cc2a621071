"""Float models that no rank holds whole: a skeleton without values, and sources that give each rank its part of a weight.

ZeRO 3 cuts a weight of n elements into equal parts, rank r owning [r * part, (r + 1) * part), the last ranks less. A source
is asked for the weights in one order on every rank. `checkpoint.CheckpointWeights` is a third one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsquant.config import ModelConfig
from dsquant.errors import CheckpointError, DsquantError
from dsquant.models.registry import build_model, check_fit
from dsquant.models.rotation import rotate, rotated_layers
from dsquant.models.sret import SReT


class Weights(Protocol):
    """Give a rank its part of each weight of a model."""

    def part(self, name: str, numel: int, part: int) -> Tensor:
        """Return this rank's part of a weight of `numel` elements, 1-D float32, at most `part` long; every rank calls this."""

    def buffers(self) -> dict[str, Tensor]:
        """Return the saved buffers of the model; every rank calls this."""


class _Uninitialized(TorchFunctionMode):
    """Skip what would write into parameters: memory that is reserved and never touched takes no place."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        target = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init names it
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if writes and isinstance(target, nn.Parameter):
            return target
        return func(*args, **(kwargs or {}))


def skeleton(config: ModelConfig) -> nn.Module:
    """Build a model with all its modules, shapes and buffers, its parameters being memory that nobody has written to."""
    with _Uninitialized():
        return build_model(config.model_copy(update={"pretrained": False, "checkpoint": None}))


def open_weights(config: ModelConfig, seed: int) -> Weights:
    """Return the source of a model's first weights: its safetensors file, else what `build_model` makes after this seed.

    Every rank calls this. Raises what `build_model` does, on every rank.
    """
    file = config.checkpoint or ""
    model = skeleton(config)
    if file.endswith(".safetensors") and not isinstance(model, SReT):  # whose authors' files have other names
        return FileWeights(file, model, config.rotate)
    return HostWeights(config, seed)


def slice_bounds(numel: int, part: int) -> tuple[int, int]:
    """Return where this rank's part of a weight starts, and its length, 0 for a rank that has none."""
    start = dist.get_rank() * part
    return start, max(0, min(part, numel - start))


class FileWeights:
    """Read each rank's own slices from a safetensors file, and rotate those of layers that `patterns` name.

    Raises CheckpointError unless the file fits the model exactly.
    """

    def __init__(self, path: str, model: nn.Module, patterns: Sequence[str] = ()):
        if not Path(path).is_file():
            raise CheckpointError(f"model.checkpoint {path} does not exist")
        self._file = safe_open(path, "pt")
        self._shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        check_fit(model, self._shapes, path)
        self._rotated = {f"{name}.weight" for name in rotated_layers(model, patterns)}
        self._buffers = [name for name in model.state_dict() if name not in dict(model.named_parameters())]

    def part(self, name: str, numel: int, part: int) -> Tensor:
        start, length = slice_bounds(numel, part)
        if not length:
            return torch.empty(0)
        row = numel // self._shapes[name][0]  # a file is sliced along the first dimension
        first = start // row
        rows = self._file.get_slice(name)[first : -(-(start + length) // row)]
        if name in self._rotated:
            rows = rotate(rows.double())
        return rows.reshape(-1)[start - first * row :][:length].float()

    def buffers(self) -> dict[str, Tensor]:
        return {name: self._file.get_tensor(name) for name in self._buffers}


class HostWeights:
    """Build the whole model in the host memory of rank 0 and scatter it, one weight at a time.

    Random weights are those of the plain initializer in its own order, which only a whole model goes through; upstream's
    loaders convert what they read. The model is freed with this object.
    """

    def __init__(self, config: ModelConfig, seed: int):
        model, failure = None, [None]
        if dist.get_rank() == 0:
            torch.manual_seed(seed)
            try:
                model = build_model(config)
            except DsquantError as error:
                failure = [error]
        dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        self._values = {name: p.detach() for name, p in model.named_parameters()} if model is not None else {}
        self._own_buffers = model.state_dict() if model is not None else {}

    def part(self, name: str, numel: int, part: int) -> Tensor:
        device = _device()
        mine, world = torch.empty(part, device=device), dist.get_world_size()
        parts = None
        if dist.get_rank() == 0:
            flat = self._values[name].reshape(-1).float().to(device)
            parts = list(F.pad(flat, (0, part * world - numel)).split(part))
        dist.scatter(mine, parts, src=0)
        return mine[: slice_bounds(numel, part)[1]]

    def buffers(self) -> dict[str, Tensor]:
        found = [{name: tensor for name, tensor in self._own_buffers.items() if name not in self._values}]
        dist.broadcast_object_list(found)
        return found[0]


def _device() -> torch.device:
    """Return where the process group takes tensors from."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
