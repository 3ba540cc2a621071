"""Native code for what `flat_step.py` does not step: flats that nothing quantizes, and images after any other optimizer."""

import torch
from torch import Tensor

from dsquant.ops import backends, shard_step
from dsquant.shard.weight_quantizers import ShardedWeight

VARIANTS = ("amsgrad", "maximize", "capturable", "differentiable")  # of AdamW, that native code does not have


def can_step(inner: torch.optim.Optimizer, flats: list[Tensor]) -> bool:
    """Say whether native code can take the inner optimizer's step of these flats."""
    devices = {flat.device.type for flat in flats}
    return (
        type(inner) is torch.optim.AdamW
        and all(group["fused"] for group in inner.param_groups)  # others round elsewhere
        and not any(group[name] for group in inner.param_groups for name in VARIANTS)
        and all(flat.grad.dtype is torch.float32 for flat in flats)
        and all(backends.choose("shard_step", device) != backends.TORCH for device in devices)
    )


def next_step(inner: torch.optim.AdamW, flat: Tensor, group: dict) -> tuple[dict, shard_step.AdamWStep]:
    """Count a step of a flat; return its state, as AdamW itself would have begun it, and the numbers of the step."""
    state = inner.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    if not state["step"].is_cpu:
        state["step"] = state["step"].cpu()  # the host needs it; torch's own fused step keeps it on the device
    count = state["step"].numpy()  # the same memory
    count += 1
    return state, shard_step.AdamWStep(
        float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], int(count)
    )


def write_image(weight: ShardedWeight, latent: Tensor, tracking: shard_step.TrackerStep) -> None:
    """Keep this rank's part of a weight in `latent`, put its image in its place, and record a step of the tracker."""
    values = weight.fragment.values
    latent.copy_(values)
    shard_step.flat_image(
        latent, values, vars(weight.tracker), weight.scales(), weight.centres(), weight.own_table, tracking,
        torch.zeros(0, dtype=torch.float64, device=latent.device), weight.backend,
    )  # fmt: skip


@torch.no_grad()
def step_float(inner: torch.optim.AdamW) -> None:
    """Step all that an AdamW has, nothing of which is quantized.

    Float stages step so, too: torch's code rounds the last elements of a tensor otherwise, so that ZeRO stages, which cut
    tensors in different places, would part.
    """
    for group in inner.param_groups:
        for flat in group["params"]:
            if flat.grad is not None:
                state, numbers = next_step(inner, flat, group)
                parts = (flat.data, flat.grad, state["exp_avg"], state["exp_avg_sq"])
                backend = backends.choose("shard_step", flat.device.type)
                shard_step.adamw(*(part.view(-1) for part in parts), numbers, backend)
