"""Call image and text models alike: a tensor of images, or a dict of tensors that become keyword arguments."""

from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | dict[str, Tensor]


def move(inputs: Inputs, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """Return inputs on a device; floating tensors take the dtype, token ids and masks keep theirs."""
    if isinstance(inputs, dict):
        return {name: move(tensor, device, dtype) for name, tensor in inputs.items()}
    return inputs.to(device, dtype if inputs.is_floating_point() else None, non_blocking=True)


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return a model's logits (B, classes)."""
    return _output(model, inputs) if isinstance(inputs, Tensor) else _output(model, inputs).logits


def logits_and_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a text model's logits, its embedding output and the output of each layer, (B, N, C)."""
    found = _output(model, inputs, output_hidden_states=True)
    return found.logits, found.hidden_states


def _output(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs, **options)
