"""Call image and text models alike: a tensor of images, or a dict of tensors that become keyword arguments."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dsquant.models.sret import NonLinearProjection, RecursiveBlock

Inputs = Tensor | dict[str, Tensor]
BLOCKS = (Block, SwinTransformerBlock, SwinTransformerV2Block, RecursiveBlock, NonLinearProjection)


def move(inputs: Inputs, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """Return inputs on a device; floating tensors take the dtype, token ids and masks keep theirs."""
    if isinstance(inputs, dict):
        return {name: move(tensor, device, dtype) for name, tensor in inputs.items()}
    return inputs.to(device, dtype if inputs.is_floating_point() else None, non_blocking=True)


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return a model's logits (B, classes)."""
    return model_outputs(model, inputs)[0]


def model_outputs(model: nn.Module, inputs: Inputs, *, hidden: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a model's logits and, with `hidden`, its hidden states in the order of computation.

    Of a text model the embedding output and each layer's output, (B, N, C); of an image model the output of each block, every
    time it is applied, (B, N, C) or (B, H, W, C).
    """
    if isinstance(inputs, Tensor):
        if not hidden:
            found = model(inputs)
            return (found if isinstance(found, Tensor) else found.logits), ()  # transformers' models give an object
        with _block_outputs(model) as outputs:
            logits = model(inputs)
        return logits, tuple(outputs)
    found = model(**inputs, output_hidden_states=hidden)
    return found.logits, found.hidden_states if hidden else ()


@contextmanager
def _block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the blocks of an image model put out while it runs."""
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for module in model.modules()
        if isinstance(module, BLOCKS)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
