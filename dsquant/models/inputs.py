"""Call image and text models alike: a tensor of images, or a dict of tensors that become keyword arguments."""

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
    return model_outputs(model, inputs)[0]


def model_outputs(model: nn.Module, inputs: Inputs, *, hidden: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a model's logits and, with `hidden`, a text model's embedding output and each layer's output, (B, N, C)."""
    if isinstance(inputs, Tensor):
        found = model(inputs)
        return (found if isinstance(found, Tensor) else found.logits), ()  # transformers' models give an object
    found = model(**inputs, output_hidden_states=hidden)
    return found.logits, found.hidden_states if hidden else ()
