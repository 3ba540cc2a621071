"""What a training step of a stage needs, found without memory or time: its weights, and its activations on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsquant.config import SOFT_LABELS, RunConfig, StageConfig, load_config
from dsquant.engine import checkpoint_activations
from dsquant.errors import ConfigError
from dsquant.losses import block_loss, hidden_loss, stage_loss
from dsquant.memory import LiveBytes
from dsquant.models import Sites, insert_sites, model_outputs, move, skeleton, stop_dropout
from dsquant.quant.state import QuantState
from dsquant.spec import WeightSite


@dataclass(frozen=True)
class Job:
    """Name a stage of a recipe and the samples of a micro-batch on one rank."""

    config: RunConfig
    name: str
    micro_batch: int

    @property
    def stage(self) -> StageConfig:
        return self.config.stages[self.name]

    @property
    def taught(self) -> bool:
        """Say whether a teacher runs beside the model."""
        return self.stage.distill is not None and self.stage.distill.teacher != SOFT_LABELS


def open_job(
    recipe: str, overrides: dict[str, Any], ranks: int, stage: str | None = None, micro_batch: int | None = None
) -> Job:
    """Return a stage of a recipe (default: its first quantized one) on so many ranks. Raises ConfigError.

    `micro_batch` replaces the samples of a rank and accumulation step that the recipe's batch_size leaves.
    """
    config = load_config(recipe, overrides)
    name = stage or next((n for n, s in config.stages.items() if s.quant is not None), next(iter(config.stages)))
    if name not in config.stages:
        raise ConfigError(f"{recipe} has no stage {name!r}; it has {', '.join(config.stages)}")
    parts = ranks * config.stages[name].gradient_accumulation
    if micro_batch is None:
        micro_batch, left = divmod(config.stages[name].batch_size, parts)
        if left or not micro_batch:
            raise ConfigError(
                f"stages.{name}.batch_size {config.stages[name].batch_size} does not divide into {parts} micro-batches"
            )
    changed = config.stages[name].model_copy(update={"batch_size": micro_batch * parts})
    return Job(config.model_copy(update={"stages": config.stages | {name: changed}}), name, micro_batch)


def example_batch(job: Job, device: torch.device | str, seed: int = 0) -> tuple[Any, Tensor]:
    """Return random inputs of a micro-batch, images or tokens without padding, and random labels."""
    data, n, classes = job.config.data, job.micro_batch, job.config.model.num_classes
    torch.manual_seed(seed)
    labels = torch.randn(n) if classes == 1 else torch.randint(0, classes, (n,))
    if data.task == "image":
        return torch.randn(n, data.channels, data.image_size, data.image_size).to(device), labels.to(device)
    tokens = torch.randint(0, 1000, (n, data.max_length))
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)


def training_loss(
    job: Job, model: nn.Module, inputs: Any, labels: Tensor, taught: tuple[Tensor, tuple] | None
) -> Tensor:
    """Return the loss of a micro-batch as the training loop forms it; `taught`: logits and hidden states of the teacher."""
    distill = job.stage.distill if taught is not None else None
    weight = distill.hidden if distill else 0.0
    logits, hidden = model_outputs(model, inputs, hidden=weight > 0)
    loss = stage_loss(logits, labels, taught and taught[0], distill, job.stage.label_smoothing)
    if weight:
        text = isinstance(inputs, dict)
        loss = loss + weight * (
            hidden_loss(hidden, taught[1], inputs["attention_mask"]) if text else block_loss(hidden, taught[1])
        )
    return loss


@dataclass(frozen=True)
class Footprint:
    """Hold what a stage's model and one micro-batch take; weights in elements, all else in bytes.

    parameters: elements of each weight. quantized: elements of all that are on shards. sums: float64 numbers that a shard step
    finds, of which ranks add up most. saved: kept for backward after the forward pass, distinct storages, parameters excluded.
    working: the most alive at once in forward and backward, `saved` included, without parameters and all but the newest
    gradient. growing: the same with every gradient staying.
    """

    parameters: tuple[int, ...]
    quantized: int
    sums: int
    buffers: int
    saved: int
    working: int
    growing: int


def footprint(job: Job, dtype: torch.dtype) -> Footprint:
    """Walk a stage's model through one micro-batch on the meta device, where nothing is computed and nothing held."""
    saved, working = passes(job, dtype)
    _, growing = passes(job, dtype, release=False)
    model, sites, state = _model(job, dtype, "meta")
    return Footprint(
        parameters=tuple(p.numel() for p in model.parameters()),
        quantized=sum(site.numel for site in sites.weights) if sites else 0,
        sums=state.n_activation + sum(_sums(job, site) for site in sites.weights) if sites else 0,
        buffers=sum(b.nbytes for b in model.buffers()),
        saved=saved, working=working, growing=growing,
    )  # fmt: skip


def _sums(job: Job, site: WeightSite) -> int:
    grid, groups = site.spec.levels, site.grouping.n_groups
    bins = (grid.qmax - grid.qmin + 1) if job.stage.quant.obr.weight > 0 else 0
    return groups * ((2 if job.stage.quant.grad_scale == "mdq" else 1) + 2 * bins)


def _model(job: Job, dtype: torch.dtype, device: str) -> tuple[nn.Module, Sites | None, QuantState | None]:
    model, sites, state = skeleton(job.config.model), None, None
    quant = job.stage.quant
    if quant is not None:
        sites = insert_sites(model, quant.policy(), quant.grad_scale)
        state = QuantState(sites.weights, sites.activations, device)
        state.values.fill_(0.1)
        sites.bind(state)
    if not job.stage.dropout:
        stop_dropout(model)
    if job.stage.activation_checkpointing:
        checkpoint_activations(model)
    return model.to(device, dtype).train(), sites, state


def passes(job: Job, dtype: torch.dtype, *, release: bool = True, device: str = "meta") -> tuple[int, int]:
    """Return the bytes that a forward pass saves, and the most alive in forward and backward; `release` gradients at once."""
    model, _, _ = _model(job, dtype, device)
    inputs, labels = example_batch(job, device)
    live = LiveBytes()
    for p in model.parameters():
        live.know(p)
        if release:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    own, storages = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with live:
        inputs, taught = move(inputs, device, dtype), None
        if job.taught:
            with torch.no_grad():
                taught = model_outputs(model, inputs, hidden=job.stage.distill.hidden > 0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = training_loss(job, model, inputs, labels, taught)
        loss.backward()
    return sum(storages.values()), live.peak
