"""Say before a run what memory and traffic it will take on each rank, ZeRO stage by ZeRO stage, and which ds_config fits.

What is kept follows from what DeepSpeed and the shard step allocate, element by element; activations are those of a real
pass (`footprint.py`). `tools/bench.py memory` holds it against what is measured, and so do tests, on CPU in float32.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dsquant.config import load_ds_config
from dsquant.errors import ConfigError
from dsquant.footprint import Footprint, Job, footprint, open_job
from dsquant.memory import GIB

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
# In the order to try them: each is slower than the one before it, or as fast and takes more.
ORDER = ("zero2", "zero1", "zero0", "zero3", "zero2_offload", "zero3_offload")
WIDTH = 120  # characters of the table where no terminal has another
MOMENTS = {"sgd": 1}  # tensors a weight that the optimizer keeps; 2 for the others
ALLREDUCE_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once without ZeRO


@dataclass(frozen=True)
class Prediction:
    """Hold the bytes of one rank: what it keeps between steps, what backward and the optimizer step add, and traffic.

    kept: by purpose, on the device. host: what offload keeps in the memory of the machine. built: the most that rank 0 holds
    in host memory while models are built. traffic: bytes that a rank sends in an optimizer step, by purpose.
    """

    name: str
    kept: dict[str, int]
    backward: int
    step: int
    host: int
    built: int
    traffic: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.kept.values()) + max(self.backward, self.step)


@dataclass(frozen=True)
class _Sizes:
    """Name what a prediction is made of: weights and quantized weights whole and on a rank, and bytes a parameter."""

    job: Job
    need: Footprint
    zero: dict[str, Any]
    ranks: int
    element: int
    cuda: bool

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def whole(self) -> int:
        return sum(self.need.parameters)

    def shard(self, numel: int) -> int:
        """Return a rank's share of what ZeRO 1 and higher cut."""
        return numel if self.stage == 0 else -(-numel // self.ranks)

    def bucket(self, key: str, default: float) -> int:
        """Return the elements of a buffer: on CUDA all that are allocated, on a CPU those that are ever written."""
        size = int(self.zero.get(key, default))
        return size if self.cuda else min(size, self.whole)

    @property
    def model(self) -> int:
        """Return the bytes of a model's parameters on a rank."""
        if self.stage < 3:
            return self.whole * self.element
        small = int(self.zero.get("stage3_param_persistence_threshold", 1e5))
        persistent = sum(numel for numel in self.need.parameters if numel <= small)
        return (self.shard(self.whole) + persistent) * self.element


def predict(name: str, job: Job, need: Footprint, ds_config: dict[str, Any], ranks: int, *, cuda: bool) -> Prediction:
    """Predict one ds_config; `need` is the footprint in the dtype of the parameters: bf16 on CUDA, float32 else."""
    bf16 = job.config.precision == "bf16" or (job.config.precision == "auto" and cuda)
    sizes = _Sizes(job, need, ds_config.get("zero_optimization", {}), ranks, 2 if bf16 else 4, cuda)
    optimizer = _optimizer_state(sizes, bf16)
    offloads = sizes.zero.get("offload_optimizer", {}).get("device") == "cpu"
    kept = {"parameters": sizes.model, "teacher": sizes.model if job.taught else 0, "buffers": need.buffers}
    if sizes.stage == 3:
        double = 2 if cuda and sizes.zero.get("overlap_comm") else 1
        kept["gradients"] = sizes.shard(sizes.whole) * sizes.element
        kept["buckets"] = double * sizes.bucket("reduce_bucket_size", 5e8) * sizes.element
    if not offloads:
        kept |= optimizer
    step = _step(sizes, bf16)
    host = sum(optimizer.values()) + step if offloads else 0
    built = 4 * sizes.whole if sizes.stage == 3 and not job.config.model.checkpoint else 0
    return Prediction(name, kept, _backward(sizes), 0 if offloads else step, host, built, _traffic(sizes))


def _optimizer_state(sizes: _Sizes, bf16: bool) -> dict[str, int]:
    """Return what the owner of a shard keeps of it: masters, moments, codes with their tracker, latents kept aside; and what two
    steps find of all scales and bins, for the next.
    """
    quant = sizes.job.stage.quant
    weights, quantized = sizes.shard(sizes.whole), sizes.shard(sizes.need.quantized)
    tracked = 6 + (5 if quant is not None and quant.oscillation.freeze.enabled else 0)
    in_place = sizes.stage == 0 and not bf16
    return {
        "masters": 0 if in_place else 4 * weights,
        "moments": 4 * MOMENTS.get(sizes.job.stage.optimizer, 2) * weights,
        "codes and tracking": tracked * quantized,
        "sums": 2 * 8 * sizes.need.sums,
        "latents": 4 * quantized if in_place else 0,
    }


def _backward(sizes: _Sizes) -> int:
    """Return what forward and backward add: activations, gradients on their way, and the weights that ZeRO 3 gathers."""
    need, element = sizes.need, sizes.element
    if sizes.stage == 0:
        together = min(ALLREDUCE_BUCKET, sizes.whole) if sizes.ranks > 1 else 0
        return max(need.growing, (sizes.whole + together) * element)
    bucket = sizes.bucket("reduce_bucket_size", 5e8)
    if sizes.stage < 3:
        double = 2 if sizes.cuda and sizes.zero.get("overlap_comm") else 1
        return need.working + (sizes.shard(sizes.whole) + double * bucket) * element
    live = min(int(sizes.zero.get("stage3_max_live_parameters", 1e9)), sizes.whole)
    return need.working + (live + min(bucket, sizes.whole)) * element


def _step(sizes: _Sizes, bf16: bool) -> int:
    """Return what the optimizer step adds: gradients in float32, whose memory images take until they are published.

    Without native code for the step (no AdamW, or CGA) images take the latents' memory, and these are kept aside.
    """
    quant = sizes.job.stage.quant
    weights, quantized = sizes.shard(sizes.whole), sizes.shard(sizes.need.quantized)
    cga = quant is not None and quant.oscillation.cga.enabled
    native = sizes.job.stage.optimizer == "adamw" and not cga
    held, aside = 5 * quantized if cga else 0, 0 if native else 4 * quantized
    if sizes.stage == 0:
        return held + (sizes.whole * (sizes.element + 8) + aside if bf16 else 4 * sizes.whole)
    if sizes.stage < 3:
        return held + weights * (sizes.element + 4) + aside
    group = min(int(sizes.zero.get("sub_group_size", 1e9)), weights)
    return held + aside + 4 * (max(group, quantized) if native else group)


def _traffic(sizes: _Sizes) -> dict[str, int]:
    """Return the bytes a rank sends in an optimizer step, rings assumed: (n - 1) / n of a tensor to scatter or to gather it."""
    ring, micro = (sizes.ranks - 1) / sizes.ranks, sizes.job.stage.gradient_accumulation
    once = int(ring * sizes.whole * sizes.element)
    passes = {0: 0, 1: 1, 2: 1, 3: micro * (3 if sizes.job.taught else 2)}[sizes.stage]
    return {
        "gradients": once * {0: 2, 1: 1, 2: micro, 3: micro}[sizes.stage],
        "weights": once * passes,
        "quantizers": int(2 * ring * 8 * sizes.need.sums),
    }


def shipped(names: tuple[str, ...] = ORDER) -> dict[str, dict[str, Any]]:
    """Read ds_configs that come with dsquant."""
    return {name: load_ds_config(DS_CONFIGS / f"{name}.json") for name in names}


def plan(
    recipe: str, gpus: int, gpu_gib: float, nodes: int = 1, stage: str | None = None, batch: int | None = None,
    model: str | None = None, device: str = "cuda", reserve_gib: float = 2.0, **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the predictions of every shipped ds_config for a stage of a recipe, and the first to take.

    Args:
        gpus: on each of `nodes`. gpu_gib: memory of one. reserve_gib: of it, for what is not tensors.
        stage: default: the first quantized one. batch: samples of a rank in one pass (default: what batch_size leaves).
        model: a name in place of the recipe's; overrides are dotted, as for train.py. device: cuda, or cpu (float32).

    Raises ConfigError.
    """
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"device is {device!r}; a plan is for cuda or cpu")
    named = {"model.name": model} if model else {}
    job, cuda = open_job(recipe, named | overrides, gpus * nodes, stage, batch), device == "cuda"
    half = job.config.precision == "bf16" or (job.config.precision == "auto" and cuda)
    need = footprint(job, torch.bfloat16 if half else torch.float32)
    found = [predict(name, job, need, ds, gpus * nodes, cuda=cuda) for name, ds in shipped().items()]
    room = (gpu_gib - reserve_gib) * GIB
    fits = [p.name for p in found if p.peak <= room]
    return {
        "recipe": recipe, "stage": job.name, "model": job.config.model.name, "ranks": gpus * nodes,
        "micro_batch": job.micro_batch, "gpu_gib": gpu_gib, "reserve_gib": reserve_gib, "weights": sum(need.parameters),
        "quantized_weights": need.quantized, "saved_for_backward": need.saved,
        "predictions": [asdict(p) | {"peak": p.peak, "fits": p.name in fits} for p in found],
        "take": fits[0] if fits else None,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print a plan as a table, GiB a rank."""
    title = (
        f"{found['recipe']}, stage {found['stage']}: {found['model']}, {found['weights'] / 1e6:.1f} M weights, "
        f"{found['micro_batch']} samples a pass on each of {found['ranks']} ranks"
    )
    table = Table(
        title=title, caption="GiB a rank; sent: GB a rank and optimizer step; host: offloaded state; building: rank 0"
    )
    columns = (
        "ds_config",
        "weights",
        "teacher",
        "optimizer",
        "codes",
        "other",
        "pass or step",
        "peak",
        "fits",
        "host",
        "building",
        "sent",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "ds_config" else "right")
    for p in found["predictions"]:
        kept = p["kept"]
        optimizer = sum(kept.get(key, 0) for key in ("masters", "moments", "latents"))
        codes = kept.get("codes and tracking", 0)
        other = sum(kept.get(key, 0) for key in ("buffers", "gradients", "buckets"))
        sizes = (kept["parameters"], kept["teacher"], optimizer, codes, other, max(p["backward"], p["step"]), p["peak"])
        cells = [f"{size / GIB:.2f}" for size in sizes]
        sent = f"{sum(p['traffic'].values()) / 1e9:.2f}"
        table.add_row(
            p["name"], *cells, "yes" if p["fits"] else "no", f"{p['host'] / GIB:.2f}", f"{p['built'] / GIB:.2f}", sent
        )
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(table)
    room = f"{found['gpu_gib']:g} GiB less {found['reserve_gib']:g}"
    take = found["take"]
    console.print(
        f"take ds_configs/{take}.json" if take else
        f"nothing fits {room}: a smaller micro-batch (gradient_accumulation), activation_checkpointing, more ranks"
    )  # fmt: skip


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1)
