"""Rotate the inputs of linear layers, and their weights with them: the same function, of inputs that quantize better.

A layer computes `W x = (W R^T) (R x)` for any orthogonal R. With R a Hadamard matrix a feature that stands out is spread over
all others of its block, and what a quantizer sees is close to a normal distribution, whatever it was. From the moment a model is
built, the weights of such layers are W R^T: all stages of a run train, quantize and store these, and a forward pre-hook
rotates the input. Weights that come from elsewhere are rotated once, when they are read.

Source: QuaRot (Ashkboos et al. 2024), section 3, there for inference; signs as below in place of random ones.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from dsquant.errors import ConfigError

MIN_BLOCK, MAX_BLOCK = 16, 256


def rotation_block(features: int) -> int:
    """Return the largest power of 4 up to 256 that divides `features`; 1 or 4 where no useful rotation exists."""
    block = 1
    while block < MAX_BLOCK and features % (4 * block) == 0:
        block *= 4
    return block


@torch.compiler.assume_constant_result  # a graph holds the matrix, not what makes it
def rotation_matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return R^T of one block, `D H / sqrt(block)` (block, block), exact in every float dtype as block is a power of 4.

    H is Sylvester's Hadamard matrix, H_ij = (-1)^popcount(i and j). D has the signs of a bent function, the product of pairs
    of bits of i added up: no Walsh function is close to it, so that neither one feature nor a mean that all share is
    anywhere more than 1 / sqrt(block) of itself after the rotation.
    """
    return _matrix(block, dtype, device)


@cache
def _matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else training could not use what an evaluation has made
        index = torch.arange(block, device="cpu")
        bits = [(index >> k) & 1 for k in range(block.bit_length() - 1)]
        walsh = sum(torch.outer(bit, bit) for bit in bits)
        bent = sum(a * b for a, b in zip(bits[::2], bits[1::2], strict=True))
        signs = 1 - 2 * ((walsh + bent[:, None]) % 2)
        return (signs.double() / block**0.5).to(device, dtype)


def rotate(x: Tensor) -> Tensor:
    """Return `R x` of x (..., features) in its dtype, R of equal blocks along the diagonal; of a weight, W R^T."""
    block = rotation_block(x.shape[-1])
    matrix = rotation_matrix(block, x.dtype, x.device)
    return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def rotate_back(x: Tensor) -> Tensor:
    """Return `R^T x` of x (..., features): what `rotate` was given."""
    block = rotation_block(x.shape[-1])
    matrix = rotation_matrix(block, x.dtype, x.device)
    return (x.unflatten(-1, (-1, block)) @ matrix.t()).flatten(-2)


def rotated_layers(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Linear]:
    """Return the linear layers of a model that any of these globs names.

    Raises ConfigError for a glob that names none, for a width without a rotation, and where a layer's own call is not what
    applies it.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for pattern in patterns:
        chosen = {name: module for name, module in linear.items() if fnmatchcase(name, pattern)}
        if not chosen:
            shown = ", ".join([*linear][:4])
            raise ConfigError(f"model.rotate: {pattern!r} names no linear layer of this model; it has {shown}, ...")
        found |= chosen
    for name, module in found.items():
        if rotation_block(module.in_features) < MIN_BLOCK:
            raise ConfigError(
                f"model.rotate: the input of {name} has {module.in_features} features; a rotation needs a multiple of "
                f"{MIN_BLOCK}"
            )
        if isinstance(model, SwinTransformerV2) and name.endswith(".qkv"):
            raise ConfigError(f"model.rotate: SwinV2 reads the weight of {name} and never calls it; leave it out")
    return found


def insert_rotations(model: nn.Module, patterns: Iterable[str], *, weights: bool) -> None:
    """Have layers rotate their inputs from now on; with `weights`, which then keeps the function, rotate those as well.

    Raises what `rotated_layers` does.
    """
    for module in rotated_layers(model, patterns).values():
        module.register_forward_pre_hook(_rotate_input)
        if weights:
            module.weight.data.copy_(rotate(module.weight.data.double()))


def float_weights(model: nn.Module, patterns: Iterable[str]) -> dict[str, Tensor]:
    """Return the state dict that the same function has without rotations."""
    state = model.state_dict()
    for name in rotated_layers(model, patterns):
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = rotate_back(weight.double()).to(weight.dtype)
    return state


def rotates(module: nn.Module) -> bool:
    """Say whether a layer rotates its input."""
    return _rotate_input in module._forward_pre_hooks.values()


def _rotate_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    return rotate(x), *others
