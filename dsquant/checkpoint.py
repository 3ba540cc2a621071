"""Checkpoints as named fragments: written sharded, read back whole or onto any world size and ZeRO stage.

Each rank saves the fragments it owns (latents, optimizer moments, tracker state) in one safetensors file, keyed
`part/weight@offset`; rank 0 adds the replicated quantizer state and the buffers. A fragment says what it is without
reference to ranks, so any layout can be put together from any other, and nothing is unpickled. The folder gets its final
name only after every file and the manifest are on disk (`files.py`): a checkpoint is there whole or not at all.
"""

import hashlib
import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsquant.config import RunConfig, parse_config
from dsquant.engine import Engine
from dsquant.errors import CheckpointError, TrainingError
from dsquant.files import discard, put_in_place, sync, versions, write_synced
from dsquant.models.registry import build_model, insert_sites, load_strict
from dsquant.ops.fake_quantize import dequantize
from dsquant.ops.shard_step import TrackerStep
from dsquant.quant.state import QuantState
from dsquant.spec import WeightSite

logger = logging.getLogger(__name__)
FORMAT, VERSION, MANIFEST, STEPS = "dsquant-checkpoint", 3, "manifest.json", "step_*"
OF_FREQUENCIES = 1  # the version whose trackers hold frequencies as they are; later ones as `TrackerStep` keeps them
WITH_GRADIENTS = 3  # the version from which on weight scales wait for gradients: they step one step later


def checkpoint_dir(run_dir: Path, stage: str, step: int) -> Path:
    """Return where a stage's checkpoint at an optimizer step lies."""
    return run_dir / "checkpoints" / stage / f"step_{step:08d}"


def save_checkpoint(
    run_dir: Path, config: RunConfig, stage: str, engine: Engine, *, done: bool, results: dict[str, Any] | None = None,
    owed: Sequence[str] = (), order_ranks: int | None = None,
) -> Path:  # fmt: skip
    """Save an engine between optimizer steps; every rank calls this.

    Killed at any moment, it leaves this checkpoint or those there were before, whole.

    `done` marks the end of the stage; `results` (top-1 and the like so far) travel in the manifest, as does `owed`: the kinds
    of record that this step was to get and that a resumed run has yet to make, and `order_ranks`: whose order of samples the
    run keeps (default: that of these ranks).
    Raises TrainingError, and writes nothing, where a latent, a moment or a scale is not finite.
    """
    _check_finite(engine)
    engine.average_statistics()
    final = checkpoint_dir(run_dir, stage, engine.step_index)
    partial = final.with_name(f".{final.name}.partial")
    if engine.world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    files = {}
    if engine.world.rank == 0 or not engine.shards.replicated:
        files |= _write(partial / f"rank_{engine.world.rank:05d}.safetensors", _owned_tensors(engine))
    if engine.world.rank == 0:
        files |= _write(partial / "replicated.safetensors", _replicated_tensors(engine))
    gathered: list[Any] = [None] * engine.world.size
    dist.all_gather_object(gathered, files)
    carried = {"results": results or {}, "owed": list(owed), "order_ranks": order_ranks or engine.world.size}
    manifest = _manifest(config, stage, engine, done) | carried
    if engine.world.rank == 0:
        manifest["files"] = {name: facts for part in gathered for name, facts in part.items()}
        write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
        for folder in (partial, run_dir / "checkpoints", run_dir):  # the names in them
            sync(folder)
        put_in_place(partial, final)  # the same step may be there already, from before a resume
        best = results.get("best_step") if results and config.checkpoint.keep_best else None
        _rotate(final.parent, config.checkpoint.keep_last, checkpoint_dir(run_dir, stage, best or 0).name)
    dist.barrier()
    return final


def _check_finite(engine: Engine) -> None:
    held = list(_owned_tensors(engine).values())  # not whole flats: ZeRO 3 leaves what it pads them with as it finds it
    held += [engine.state.values, engine.state.exp_avg, engine.state.exp_avg_sq] if engine.state else []
    finite = [tensor.isfinite().all().to(engine.world.device) for tensor in held]
    together = (
        torch.stack(finite).all().int() if finite else torch.ones((), dtype=torch.int32, device=engine.world.device)
    )
    dist.all_reduce(together, op=dist.ReduceOp.MIN)
    if not together.item():
        raise TrainingError(
            f"step {engine.step_index}: a weight, a moment or a scale is not finite; nothing was saved, resume from the "
            "last checkpoint"
        )


def _owned_tensors(engine: Engine) -> dict[str, Tensor]:
    tensors = {}
    quantization = engine.quantization
    for flat, fragments in zip(engine.shards.flats, engine.shards.fragments, strict=True):
        moments = {k: v for k, v in engine.optimizer.state.get(flat, {}).items() if _is_elementwise(v, flat)}
        for fragment in fragments:
            key = f"{fragment.name}@{fragment.offset}"
            weight = quantization.weights.get(fragment.name) if quantization else None
            tensors[f"weight/{key}"] = quantization.latents_of(fragment) if quantization else fragment.values
            tensors |= {f"{part}/{key}": fragment.of(moment) for part, moment in moments.items()}
            if weight and weight.fragment is not None:  # offsets of trackers are those within the site
                key = f"{fragment.name}@{weight.fragment.offset}"
                tensors |= {f"tracker.{part}/{key}": t for part, t in weight.tracker.tensors().items()}
    return tensors


def _replicated_tensors(engine: Engine) -> dict[str, Tensor]:
    fragments = {name for names in engine.shards.members for name in names}
    own = engine.module.state_dict()
    if engine.zero_stage == 3:  # its parameters are empty here; of the buffers, those that a state dict has
        own = {name: buffer for name, buffer in engine.module.named_buffers() if name in own}
    tensors = {f"buffer/{name}": t for name, t in own.items() if name not in fragments}
    if engine.state is not None:
        tensors |= {f"quant/{key}": t for key, t in engine.state.state_dict().items()}
    return tensors


def _is_elementwise(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() == flat.numel() and value.dim() == flat.dim()


def _manifest(config: RunConfig, stage: str, engine: Engine, done: bool) -> dict[str, Any]:
    scalars = {}
    for flat in engine.shards.flats:
        for key, value in engine.optimizer.state.get(flat, {}).items():
            if not _is_elementwise(value, flat):
                scalars[key] = float(value)
    return {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "step": engine.step_index,
        "done": done,
        "skipped_in_a_row": engine.skipped_in_a_row,
        "world_size": engine.world.size,
        "zero_stage": engine.zero_stage,
        "optimizer_scalars": scalars,
        "shapes": {f.name: list(f.shape) for f in _all_fragments(engine)},
        "site_shapes": {s.name: list(s.shape) for s in engine.sites.weights if s.rows} if engine.sites else {},
        "bf16": engine.world.bf16,
        "config": config.model_dump(mode="json"),
    }


def _all_fragments(engine: Engine):
    """Return one fragment of each weight, from whichever rank has one."""
    mine = {f.name: f.shape for fragments in engine.shards.fragments for f in fragments}
    found = [mine]
    if not engine.shards.replicated:
        found = [None] * engine.world.size
        dist.all_gather_object(found, mine)
    merged = {name: shape for part in found for name, shape in part.items()}
    return [_Shape(name, shape) for name, shape in merged.items()]


@dataclass
class _Shape:
    name: str
    shape: tuple[int, ...]


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    held = {k: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    try:
        save_file(held, path)
        sync(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}; the last checkpoint is untouched") from None
    return {path.name: {"bytes": path.stat().st_size, "blake2b": _hash(path)}}


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _rotate(folder: Path, keep: int, best: str) -> None:
    """Delete all but the last `keep` checkpoints of a stage and the one named `best`; leftovers of killed saves go too."""
    for leftover in set(folder.glob(f".{STEPS}")) - set(versions(folder, STEPS)):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in versions(folder, STEPS)[:-keep]:
        if best not in old.name:
            discard(old)


@dataclass
class Checkpoint:
    """Read a checkpoint's tensors by weight name and offset, whatever layout wrote them."""

    path: Path
    manifest: dict[str, Any]
    config: RunConfig
    _index: dict[str, dict[str, list[tuple[int, int, str]]]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open and verify a checkpoint folder. Raises CheckpointError naming the file that is missing, short or changed."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is no whole checkpoint: {MANIFEST} cannot be read ({error})") from None
        if manifest.get("format") != FORMAT or manifest.get("version") not in range(1, VERSION + 1):
            raise CheckpointError(f"{path}: not a {FORMAT} of version 1 to {VERSION}")
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"] or _hash(file) != facts["blake2b"]:
                raise CheckpointError(f"{file} is missing or differs from the manifest; use an earlier checkpoint")
        found = cls(path, manifest, parse_config(manifest["config"], str(path / MANIFEST)))
        found._read_index()
        return found

    def _read_index(self) -> None:
        self._index = defaultdict(lambda: defaultdict(list))
        for file in sorted(self.path.glob("rank_*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    part, name, offset = re.fullmatch(r"([^/]+)/(.+)@(\d+)", key).groups()
                    numel = tensors.get_slice(key).get_shape()[0]
                    self._index[part][name].append((int(offset), numel, file.name))

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def order_ranks(self) -> int:
        """Return how many ranks the run began with, whose order of samples it keeps."""
        return self.manifest.get("order_ranks", self.manifest["world_size"])

    @property
    def done(self) -> bool:
        return self.manifest["done"]

    @property
    def owed(self) -> list[str]:
        return self.manifest.get("owed", [])

    @property
    def parts(self) -> list[str]:
        return list(self._index)

    def read(self, part: str, name: str, offset: int, numel: int) -> Tensor:
        """Return elements [offset, offset + numel) of one part of a weight, 1-D, from as many files as hold them."""
        out, filled = None, 0
        for start, length, file in self._index[part].get(name, ()):
            low, high = max(start, offset), min(start + length, offset + numel)
            if low >= high:
                continue
            with safe_open(self.path / file, "pt") as tensors:
                piece = tensors.get_slice(f"{part}/{name}@{start}")[low - start : high - start]
            if out is None:
                out = torch.empty(numel, dtype=piece.dtype)
            out[low - offset : high - offset] = piece
            filled += high - low
        if filled != numel:
            raise CheckpointError(f"{self.path}: {part} of {name} is incomplete ({filled} of {numel} elements)")
        if part == "tracker.frequency" and self.manifest["version"] == OF_FREQUENCIES:
            out /= self.tracker_step.left
        return out

    @cached_property
    def tracker_step(self) -> TrackerStep:
        """Return the last step of the trackers of a quantized stage."""
        momentum = self.config.stages[self.stage].quant.oscillation.momentum
        return TrackerStep(momentum, int(self.replicated("quant")["step_count"]))

    def whole(self, part: str) -> dict[str, Tensor]:
        """Return one part of every weight that has it, in the weights' shapes; trackers' in those of their sites."""
        shapes = self.manifest["shapes"]
        if part.startswith("tracker."):
            shapes = shapes | self.manifest.get("site_shapes", {})
        return {
            name: self.read(part, name, 0, torch.Size(shapes[name]).numel()).view(shapes[name])
            for name in self._index.get(part, ())
        }

    @property
    def latents(self) -> dict[str, Tensor]:
        return self.whole("weight")

    @property
    def codes(self) -> dict[str, Tensor]:
        return self.whole("tracker.codes")

    def replicated(self, prefix: str) -> dict[str, Tensor]:
        """Return what rank 0 saved under a prefix ("buffer" or "quant"), without it."""
        try:
            with safe_open(self.path / "replicated.safetensors", "pt") as tensors:
                keys = [key for key in tensors.keys() if key.startswith(prefix + "/")]  # noqa: SIM118
                return {key.removeprefix(prefix + "/"): tensors.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}/replicated.safetensors cannot be read: {error}") from None

    @property
    def buffers(self) -> dict[str, Tensor]:
        return self.replicated("buffer")

    @property
    def quant_state(self) -> dict[str, Tensor]:
        """Return what `QuantState.load_state_dict` takes."""
        found = self.replicated("quant")
        if self.manifest["version"] < WITH_GRADIENTS:
            weights = {f"{name}:{role}" for name in self._index["tracker.codes"] for role in ("scale", "centre")}
            found |= {
                f"{key}/grad": torch.zeros_like(found[f"{key}/value"]) for key in weights if f"{key}/value" in found
            }
        return found

    @property
    def quant(self) -> dict[str, Tensor]:
        """Return scales and offsets as "site:role" -> (n_groups,) float32."""
        saved = self.replicated("quant").items()
        return {key.removesuffix("/value"): tensor for key, tensor in saved if key.endswith("/value")}


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into an engine of any world size and ZeRO stage. Raises CheckpointError for another model."""
    own = {shape.name: list(shape.shape) for shape in _all_fragments(engine)}
    saved = checkpoint.manifest["shapes"]
    if odd := sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name)):
        first = odd[0]
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {first} is {saved.get(first)} there and {own.get(first)} here"
        )
    moments = [p for p in checkpoint.parts if p != "weight" and not p.startswith("tracker.")]
    scalars = checkpoint.manifest["optimizer_scalars"]
    for flat, fragments in zip(engine.shards.flats, engine.shards.fragments, strict=True):
        state = {part: torch.zeros_like(flat.data) for part in moments}
        for f in fragments:
            f.values.copy_(checkpoint.read("weight", f.name, f.offset, f.numel))
            for part in moments:
                f.of(state[part]).copy_(checkpoint.read(part, f.name, f.offset, f.numel))
        engine.optimizer.state[flat] = state | {key: torch.tensor(value) for key, value in scalars.items()}
    _restore_replicated(engine, checkpoint)
    engine.step_index = checkpoint.step
    engine.skipped_in_a_row = checkpoint.manifest.get("skipped_in_a_row", 0)


def _restore_replicated(engine: Engine, checkpoint: Checkpoint) -> None:
    buffers = checkpoint.buffers
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    if engine.quantization is None:
        engine.shards.publish()
        return
    engine.state.load_state_dict(checkpoint.quant_state)
    engine.sites.bind(engine.state)
    trackers = {}
    for name, weight in engine.quantization.weights.items():
        if weight.fragment is not None:
            f = weight.fragment
            parts = [p for p in checkpoint.parts if p.startswith("tracker.")]
            trackers[name] = {p.removeprefix("tracker."): checkpoint.read(p, name, f.offset, f.numel) for p in parts}
    engine.quantization.resume(trackers)
    engine.check_state_agrees()


def latest_checkpoint(run_dir: Path, stages: list[str], stage: str | None = None) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, or of one stage; one that fails verification yields to the one before."""
    problems = []
    for name in reversed([stage] if stage else stages):
        for path in reversed(versions(run_dir / "checkpoints" / name, STEPS)):
            try:
                found = Checkpoint.open(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems and not (dist.is_initialized() and dist.get_rank()):
                logger.warning("%s; going back to %s", problems[-1], path)
            return found
    if problems:
        raise CheckpointError("no checkpoint of this run is whole:\n  " + "\n  ".join(problems))
    return None


def load_run_checkpoint(run_dir: Path, stage: str | None = None, step: int | None = None) -> Checkpoint:
    """Return the newest checkpoint of a run or of one of its stages, or a step's. Raises CheckpointError where there is none."""
    stages = stages_on_disk(run_dir)
    if stage is not None and stage not in stages:
        raise CheckpointError(f"{run_dir} has no checkpoint of stage {stage!r}; it has {stages}")
    if step is not None and stages:
        path = checkpoint_dir(run_dir, stage or stages[-1], step)
        if not path.is_dir():
            there = [other.name for other in versions(path.parent, STEPS)]
            raise CheckpointError(f"{path} does not exist; there are {there}")
        return Checkpoint.open(path)
    found = latest_checkpoint(run_dir, stages, stage)
    if found is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint; give the --out_dir of a run")
    return found


def stages_on_disk(run_dir: Path) -> list[str]:
    """Return the stages that have a checkpoint folder, in the order of the recipe."""
    found = [path / MANIFEST for folder in (run_dir / "checkpoints").glob("*") for path in versions(folder, STEPS)]
    found = [path for path in found if path.is_file()]
    if not found:
        return []
    manifest = json.loads(max(found, key=lambda path: path.stat().st_mtime).read_text())
    folders = {path.parent.parent.name for path in found}
    return [name for name in manifest["config"]["stages"] if name in folders]


def load_float(checkpoint: Checkpoint) -> nn.Module:
    """Build the float model of a checkpoint, its weights being the latents."""
    config = checkpoint.config.model.model_copy(update={"pretrained": False, "checkpoint": None})
    model = build_model(config)
    load_strict(model, {**checkpoint.latents, **checkpoint.buffers}, str(checkpoint.path))
    return model


@dataclass
class Images:
    """Turn the latents of a checkpoint's quantized weights into images. sites: by the names of their parameters."""

    checkpoint: Checkpoint
    sites: dict[str, WeightSite]
    state: QuantState

    @torch.no_grad()
    def write(self, site: WeightSite, weight: Tensor) -> None:
        """Write the image of a site into its rows of a whole weight."""
        runs = (-1, site.grouping.n_groups, site.grouping.inner)
        codes = self.checkpoint.read("tracker.codes", site.name, 0, site.numel)
        levels, scale = codes.float().view(runs), self.state.get(site.name)[None, :, None].to(weight.device)
        site.of(weight).view(runs).copy_(dequantize(levels, scale, None, site.spec.levels))


def insert_images(model: nn.Module, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Images | None:
    """Insert the sites of a checkpoint's stage, activations bound to its values on `device`; return None for a float stage."""
    quant = checkpoint.config.stages[checkpoint.stage].quant
    if quant is None:
        return None
    sites = insert_sites(model, quant.policy(), quant.grad_scale)
    state = QuantState(sites.weights, sites.activations, device)
    state.load_state_dict(checkpoint.quant_state)
    sites.bind(state, trainable=False)
    sites.bind_images(model, state)
    return Images(checkpoint, {site.name: site for site in sites.weights}, state)


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Build the model a stage ends with, in evaluation mode: float, or quantized with images as its weights."""
    model = load_float(checkpoint)
    images, parameters = insert_images(model, checkpoint), dict(model.named_parameters())
    for name, site in images.sites.items() if images else ():
        images.write(site, parameters[name].data)
    return model.eval()
