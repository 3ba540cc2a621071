"""DeepSpeed with weights quantized on its shards: one object that a training loop drives.

The engine owns `deepspeed.initialize`, the optimizer, the quantizer state and the shard quantization. A float stage is
the same engine with nothing attached, so that both run the same loop.
"""

import logging
import os
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for one, and warn, in every process

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsquant.config import QuantConfig, RunConfig, StageConfig, merge_ds_config
from dsquant.errors import ConfigError, TrainingError
from dsquant.launcher import adopt_launcher, device_index
from dsquant.models.inputs import Inputs, logits_of, model_outputs, move
from dsquant.models.registry import insert_sites, stop_dropout
from dsquant.models.sites import Sites
from dsquant.models.weights import Weights
from dsquant.quant.calibrate import put_together
from dsquant.quant.least_squares import refit
from dsquant.quant.state import BIASES, QuantState
from dsquant.shard.fragments import ShardMap, map_shards, partition
from dsquant.shard.optimizer import ShardOptimizer, ShardQuantization
from dsquant.shard.whole_weights import images_of

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "radam": torch.optim.RAdam,
    "nadam": torch.optim.NAdam,
}


@dataclass
class World:
    """Describe this process among its peers."""

    rank: int
    size: int
    device: torch.device
    bf16: bool = False

    def use_threads(self, cpu_threads: int | None) -> None:
        """Give a rank that trains on a CPU its threads; ranks that each take all cores would wait for one another."""
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or self.size)
            torch.set_num_threads(cpu_threads or max(1, len(os.sched_getaffinity(0)) // ranks))

    def use_precision(self, precision: str) -> None:
        """Choose "bf16", "fp32", or with "auto" bf16 on an accelerator and fp32 on a CPU."""
        self.bf16 = self.device.type != "cpu" if precision == "auto" else precision == "bf16"


def init_world() -> World:
    """Join the process group that the launcher describes (`launcher.py`), or a group of one without a launcher."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # ours is tested, by us
    adopt_launcher(os.environ)
    accelerator = get_accelerator()
    gpu = accelerator.device_name() != "cpu"
    if gpu:
        index = device_index(int(os.environ["LOCAL_RANK"]), accelerator.device_count())
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed reads the number of the device from it
        accelerator.set_device(index)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name() if gpu else "gloo")
        _unlink_shared_buffer()
    return World(dist.get_rank(), dist.get_world_size(), torch.device(accelerator.current_device_name()))


def _unlink_shared_buffer() -> None:
    """Remove the name of the buffer that DeepSpeed reduces through on a CPU: 69 MB a rank in /dev/shm, and it leaves them there.

    After the barrier every rank has mapped the buffers of all, which live on without a name until the last process ends,
    however it ends.
    """
    dist.barrier()
    env = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", os.getuid(), *env, dist.get_rank())))
    Path("/dev/shm", name).unlink(missing_ok=True)


def _cast_constants(model: nn.Module) -> None:
    """Cast what a model adds to, or multiplies by, bf16 and no checkpoint holds: masks and coordinates of Swin's windows.

    DeepSpeed casts parameters alone; statistics of BatchNorm, which checkpoints hold, stay float32.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.bfloat16()


def micro_batch_size(stage: StageConfig, world_size: int) -> int:
    """Return images per rank and accumulation step. Raises ConfigError where the global batch does not divide."""
    parts = world_size * stage.gradient_accumulation
    if stage.batch_size % parts:
        raise ConfigError(
            f"batch_size {stage.batch_size} is not divisible by {world_size} ranks x "
            f"{stage.gradient_accumulation} accumulation steps"
        )
    return stage.batch_size // parts


def owned_ds_settings(stage: StageConfig, world: World) -> dict[str, Any]:
    """Return what the recipe decides of a DeepSpeed configuration. Raises ConfigError where the batch does not divide."""
    return {
        "train_batch_size": stage.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(stage, world.size),
        "gradient_accumulation_steps": stage.gradient_accumulation,
        "gradient_clipping": stage.gradient_clipping,
        "bf16": {"enabled": world.bf16},
        # ZeRO 3 would replace F.linear in this whole process by a product and a sum that round separately.
        "zero_optimization": {"memory_efficient_linear": False},
    }


def param_groups(model: nn.Module, weight_decay: float, vector_lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Split parameters: matrices decay; vectors and what the model itself names (pos_embed, cls_token) do not.

    The latter's learning rate is `vector_lr_scale` times that of matrices: `lr_scale` of each group, as timm names it.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    decay, rest = [], []
    for name, p in model.named_parameters():
        ndim = len(getattr(p, "ds_shape", p.shape))
        (rest if ndim < 2 or name in exempt else decay).append(p)
    return [
        {"params": decay, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": rest, "weight_decay": 0.0, "lr_scale": vector_lr_scale},
    ]


def make_optimizer(model: nn.Module, stage: StageConfig) -> ShardOptimizer:
    """Build the stage's torch optimizer inside a ShardOptimizer."""
    options: dict[str, Any] = {"lr": stage.lr}
    options |= {"momentum": stage.momentum} if stage.optimizer == "sgd" else {"betas": stage.betas}
    groups = param_groups(model, stage.weight_decay, stage.vector_lr_scale)
    return ShardOptimizer(OPTIMIZERS[stage.optimizer](groups, **options))


class Engine:
    """Train one stage.

    Args:
        model: a float model with its starting weights, or under ZeRO 3 its `skeleton`; quantization sites are inserted in place
            for a quantized stage.
        run, stage: the recipe.
        ds_config: ZeRO, precision and communication; settings that the recipe owns must agree with it.
        world: from `init_world`.
        total_steps: optimizer steps of the stage, the length of every schedule.
        weights: the starting weights of a skeleton, of which each rank takes its own part.
    """

    def __init__(
        self, model: nn.Module, run: RunConfig, stage: StageConfig, ds_config: dict[str, Any], world: World,
        total_steps: int, weights: Weights | None = None,
    ):  # fmt: skip
        self.stage, self.world, self.total_steps = stage, world, total_steps
        self.quant: QuantConfig | None = stage.quant
        self.sites: Sites | None = None
        if stage.quant is not None:
            self.sites = insert_sites(model, stage.quant.policy(), stage.quant.grad_scale)
        if not stage.dropout:
            stop_dropout(model)
        if stage.activation_checkpointing:
            checkpoint_activations(model)
        self.ds_config = merge_ds_config(ds_config, owned_ds_settings(stage, world))
        exact: dict[str, tuple[int, Tensor]] = {}
        if weights is not None:
            exact = fill(model, weights, self.ds_config, world)
        elif world.bf16:
            exact = {name: (0, p.detach().clone().view(-1)) for name, p in model.named_parameters()}
        self.optimizer = make_optimizer(model, stage)
        self.ds, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.ds_config, dist_init_required=False
        )
        if world.bf16:
            _cast_constants(self.module)
        _unlink_shared_buffer()
        self.shards: ShardMap = map_shards(self.ds)
        self.optimizer.checks_finite = self.shards.in_place
        self._restore_masters(exact)
        self.state: QuantState | None = None
        self.quantization: ShardQuantization | None = None
        self.step_index = self.skipped_in_a_row = 0
        self._statistics: list[Tensor] = []  # BatchNorm's, before the step that is being taken
        if stage.quant is not None:
            self._attach(stage.quant)

    def _attach(self, quant: QuantConfig) -> None:
        """Create the quantizer state and set the weight scales on the shards; activations stay float until calibrated."""
        self.state = QuantState(self.sites.weights, self.sites.activations, self.world.device, quant.scale_optimizer)
        self.quantization = ShardQuantization(self.shards, self.sites.weights, self.state, quant)
        self.quantization.initialize_scales()
        self.quantization.start()
        self.sites.bind_images(self.module, self.state)
        self.optimizer.quantization = self.quantization
        cga = quant.oscillation.cga
        for name, site in self.sites.products.items():
            held = cga.enabled and site.spec.n_bits <= cga.max_bits
            qkv = self.module.get_submodule(name.removesuffix(".weight"))
            qkv.boundary_range = cga.boundary_range if held else None

    def _restore_masters(self, exact: dict[str, tuple[int, Tensor]]) -> None:
        """Give the masters their float32 weights back: DeepSpeed has copied them from the model after its cast to bf16.

        exact: name -> (offset in the weight, values from there on).
        """
        for fragment in (f for fragments in self.shards.fragments for f in fragments):
            if fragment.name in exact:
                offset, values = exact[fragment.name]
                start = fragment.offset - offset
                fragment.values.copy_(values[start : start + fragment.numel])

    @property
    def module(self) -> nn.Module:
        return self.ds.module

    @property
    def zero_stage(self) -> int:
        return self.ds.zero_optimization_stage()

    def refit(self, samples: list[Inputs], init: str, given: Set[str] = frozenset()) -> None:
        """Refit linear layers to quantized inputs (`quant.least_squares`), in evaluation mode, and quantize them anew.

        init, given: as `calibrate` takes them.
        """
        self.quantization.show_latents()
        changes = refit(
            self.module, self.sites.quantizers, self.state, lambda: self.sites.bind(self.state), self.evaluate_logits,
            put_together(samples), self._image, init, given,
        )  # fmt: skip
        self.quantization.move(changes)

    def _image(self, name: str, latent: Tensor) -> Tensor:
        """Return a whole parameter with every site in it quantized."""
        image = latent.clone()
        for site in (site for site in self.sites.weights if site.name == name):
            site.of(image).copy_(images_of([(site, site.of(latent))])[name])
        return image

    def finish_calibration(self) -> None:
        """Start training the scales from their present values; call once they are set on every rank.

        Raises TrainingError unless every rank holds the same state, and unless quantization changed the weights.
        """
        self.sites.bind(self.state)
        self.state.set_learning_rates(self.quant.scale_lr, self.quant.scale_lr_mode)
        self.check_state_agrees()

    def inherit(self, values: dict[str, Tensor]) -> None:
        """Go on with the quantizers of an earlier stage, "site:role" -> values, and quantize the latents by them.

        Raises ConfigError naming the first site or size that the two stages do not share.
        """
        sizes = {key: entry.numel for key, entry in self.state.entries.items()}
        given = {key: tensor.numel() for key, tensor in values.items()}
        if odd := sorted(key for key in sizes.keys() | given.keys() if sizes.get(key) != given.get(key)):
            raise ConfigError(
                f"calibration.inherit: {odd[0]} has {given.get(odd[0], 'no')} values in the stage of init_from and "
                f"{sizes.get(odd[0], 'no')} here; both stages need the same sites"
            )
        for key, entry in self.state.entries.items():
            self.state.values[entry.slice] = values[key].to(self.world.device)
        self.quantization.start()
        self.finish_calibration()

    def inherit_biases(self, values: dict[str, Tensor]) -> set[str]:
        """Take from an earlier stage, "site:role" -> values, the biases of sites that have as many here; return their names."""
        taken = set()
        for key, entry in self.state.entries.items():
            if entry.role in BIASES and key in values and values[key].numel() == entry.numel:
                self.state.values[entry.slice] = values[key].to(self.world.device)
                taken.add(entry.name)
        return taken

    def check_state_agrees(self) -> None:
        """Raise TrainingError naming the ranks whose quantizer state differs from rank 0's."""
        digests: list[str | None] = [None] * self.world.size
        dist.all_gather_object(digests, self.state.digest())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise TrainingError(
                f"quantizer state differs between rank 0 and ranks {odd}; this is a defect, please report"
            )

    def forward(self, inputs: Inputs) -> Tensor:
        """Run the model in training mode on a micro-batch, images (B, C, H, W) or a dict of tokens; return its logits."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Inputs, *, hidden: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the model in training mode; return its logits and, with `hidden`, a text model's hidden states."""
        return model_outputs(self.ds, self.cast(inputs), hidden=hidden)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.world.bf16 else torch.float32

    def cast(self, inputs: Inputs) -> Inputs:
        """Move inputs to this rank's device, images in the model's dtype."""
        return move(inputs, self.world.device, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch; all are nan where the loss is not finite, so that its step is skipped."""
        self.ds.backward(loss * (1 + 0 * loss.detach()))

    def step(self, lr: float, observe: bool = False) -> bool:
        """Take an optimizer step if this micro-batch completes one; return whether one was skipped. `lr` is its learning rate.

        `observe` has a quantized stage measure its regularizers' gradient against the task's. A step whose gradient, over all
        ranks, is not finite is counted and changes nothing else. The decision is that of DeepSpeed, from the norm of the
        gradient that it reduces over ranks and reads before it steps; at ZeRO 0 in float32, that of `ShardOptimizer`.
        """
        boundary = self.ds.is_gradient_accumulation_boundary()
        if boundary:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if self.quantization is not None:
                self.quantization.begin_step(self.step_index / self.total_steps, lr / self.stage.lr, observe)
        self.ds.step()
        if not boundary:
            return False
        skipped = not self.ds.was_step_applied()
        self.step_index += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.quantization is not None:
            self.quantization.finish_step()
            self.state.zero_grad()
        self._keep_statistics(put_back=skipped)
        return skipped

    @torch.no_grad()
    def evaluate_logits(self, inputs: Inputs) -> Tensor:
        """Return float32 logits (B, classes) in evaluation mode; call between `eval()` and `train()`."""
        return logits_of(self.module, self.cast(inputs)).float()

    def eval(self) -> None:
        self.average_statistics()
        self.ds.eval()

    def train(self) -> None:
        self.ds.train()
        self._keep_statistics()

    @torch.no_grad()
    def _keep_statistics(self, put_back: bool = False) -> None:
        """Note BatchNorm's running statistics, which the next forward pass changes, or put back what was noted."""
        if put_back:
            for tensor, kept in zip(self._running, self._statistics, strict=True):
                tensor.copy_(kept)
        else:
            self._statistics = [tensor.clone() for tensor in self._running]

    @cached_property
    def _running(self) -> list[Tensor]:
        """Return BatchNorm's running statistics."""
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        return [t for norm in norms for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Give every rank the mean over ranks of BatchNorm's running statistics, each rank's being of its own images.

        Every rank calls this before the statistics are used or saved, so that all ranks evaluate, and a checkpoint holds,
        one model. Summed in float64.
        """
        running = [tensor for tensor in self._running if tensor.is_floating_point()]
        if not running or self.world.size == 1:
            return
        together = torch.cat([tensor.double() for tensor in running])
        dist.all_reduce(together)
        together /= self.world.size
        for tensor, mean in zip(running, together.split([tensor.numel() for tensor in running]), strict=True):
            tensor.copy_(mean)
        self._keep_statistics()

    def destroy(self) -> None:
        """Free DeepSpeed's buffers and hooks, so that the next stage starts clean."""
        self.ds.destroy()


def fill(model: nn.Module, weights: Weights, ds_config: dict[str, Any], world: World) -> dict[str, tuple[int, Tensor]]:
    """Partition a skeleton for ZeRO 3, give each rank its part of the weights, and return those parts in float32."""
    parts = partition(model, ds_config, torch.bfloat16 if world.bf16 else torch.float32, weights.part)
    saved = weights.buffers()
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])
        buffer.data = buffer.data.to(world.device)
    return parts


def serve(
    model: nn.Module, weights: Weights, stage: StageConfig, ds_config: dict[str, Any], world: World
) -> deepspeed.DeepSpeedEngine:
    """Return a model that only answers, partitioned by ZeRO 3, in evaluation mode: call it, and `destroy()` it in the end.

    `model` is a skeleton; a quantized one has its sites bound, and `weights` that are images.
    """
    ours = {key: value for key, value in ds_config.items() if key != "bf16"}  # `world` has the precision of this model
    config = merge_ds_config(ours, owned_ds_settings(stage, world))
    config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    fill(model, weights, config, world)
    ds, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=config, dist_init_required=False)
    _unlink_shared_buffer()
    ds.eval()
    return ds


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute blocks in backward instead of keeping their activations."""
    if hasattr(model, "gradient_checkpointing_enable"):  # transformers
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return
    if not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(
            f"{type(model).__name__} has no activation checkpointing; set activation_checkpointing: false"
        )
    model.set_grad_checkpointing(True)
