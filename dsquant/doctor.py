"""Check a machine or a job before it starts: everything a run would trip over, found in seconds, on every rank.

Each check is a function that returns what it found or raises a DsquantError, whose message names the fault and the fix. Ranks
run the same checks in the same order and put their findings together, so that one bad node is named.
"""

import importlib.metadata
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsquant.config import RunConfig, StageConfig, merge_ds_config
from dsquant.data.digits import make_digits
from dsquant.engine import World, owned_ds_settings
from dsquant.errors import BuildError, ConfigError, DataError, DsquantError, TrainingError
from dsquant.models import build_model, insert_sites
from dsquant.ops import backends
from dsquant.ops.cases import disagreements
from dsquant.run_data import images_per_batch, open_shards
from dsquant.shard.whole_weights import weight_images

PACKAGES = ("torch", "deepspeed", "timm", "transformers", "webdataset", "wandb")
STATE_BYTES = 18  # of a weight in a checkpoint: latent, two moments, codes, direction, frequency
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Finding:
    """Say what a check found: `fault` is None where all is well on every rank."""

    name: str
    found: str
    fault: str | None = None


class Doctor:
    """Examine the ranks of a job, and what a recipe would do on them.

    Args:
        config: the recipe.
        ds_config: the DeepSpeed configuration it would run with.
        out_dir: the folder of the run, which may be yet to be made.
    """

    def __init__(self, world: World, config: RunConfig, ds_config: dict[str, Any], out_dir: Path):
        self.world, self.config, self.ds_config, self.out_dir = world, config, ds_config, out_dir

    def examine(self) -> Iterator[Finding]:
        """Run every check on all ranks and yield its finding; each rank calls this to its end."""
        for name, check in self._checks().items():
            yield self._together(name, check)

    def _checks(self) -> dict[str, Callable[[], str]]:
        return {
            "packages": self.packages,
            "ranks and devices": self.devices,
            "communication": self.communication,
            "recipe and ds_config": self.settings,
            "folder of the run": self.folder,
            "disk space": self.space,
            "data": self.data,
            "quantizers": self.quantizers,
            "native code": self.native,
            "W&B": self.wandb,
        }

    def _together(self, name: str, check: Callable[[], str]) -> Finding:
        """Run a check here, and name the ranks on which it failed, each fault once.

        Whatever goes wrong on one rank is a finding: the others are not left waiting for it.
        """
        try:
            mine = check(), None
        except DsquantError as error:
            mine = "", str(error)
        except Exception as error:
            mine = "", f"{type(error).__name__}: {error}"
        everywhere: list[Any] = [None] * self.world.size
        dist.all_gather_object(everywhere, mine)
        faults: dict[str, list[int]] = {}
        for rank, (_, fault) in enumerate(everywhere):
            if fault is not None:
                faults.setdefault(fault, []).append(rank)
        if not faults:
            return Finding(name, everywhere[0][0])
        lines = [f"{fault} (rank {', '.join(map(str, ranks))} of {self.world.size})" for fault, ranks in faults.items()]
        return Finding(name, "", "\n".join(lines))

    def packages(self) -> str:
        """Compare versions over ranks: nodes with different environments fail in ways that nothing explains."""
        mine = {name: _version(name) for name in PACKAGES}
        everywhere = self._gathered(mine)
        for name in PACKAGES:
            versions = {found[name] for found in everywhere}
            if len(versions) > 1:
                raise ConfigError(
                    f"{name} is {' and '.join(sorted(versions))} on different ranks; install one everywhere"
                )
        if missing := [name for name, version in mine.items() if version == "missing"]:
            raise ConfigError(
                f"{', '.join(missing)} cannot be found; install dsquant with its dependencies: pip install ."
            )
        return ", ".join(f"{name} {version}" for name, version in mine.items())

    def devices(self) -> str:
        """Check that ranks are numbered without gaps and that no two share a device."""
        local = int(os.environ.get("LOCAL_RANK", 0))
        everywhere = self._gathered((socket.gethostname(), str(self.world.device), local))
        if self.world.device.type != "cpu":
            for place in {(host, device) for host, device, _ in everywhere}:
                ranks = [r for r, (host, device, _) in enumerate(everywhere) if (host, device) == place]
                if len(ranks) > 1:
                    raise ConfigError(
                        f"ranks {ranks} share {place[1]} of {place[0]}; give each task a GPU (slurm/README.md)"
                    )
        hosts = sorted({host for host, _, _ in everywhere})
        return f"{self.world.size} ranks on {len(hosts)} hosts ({', '.join(hosts)}), {self.world.device.type}"

    def communication(self) -> str:
        """Add up one number over all ranks by the backend that training uses."""
        one = torch.ones(1, device=self.world.device)
        dist.all_reduce(one)
        if int(one) != self.world.size:
            raise TrainingError(
                f"an all-reduce of ones over {self.world.size} ranks gave {int(one)}: check the network"
            )
        return f"{dist.get_backend()}: an all-reduce over {self.world.size} ranks is right"

    def settings(self) -> str:
        """Check that each stage's batch divides, and that recipe and ds_config say nothing twice."""
        for name, stage in self.config.stages.items():
            try:
                merge_ds_config(self.ds_config, owned_ds_settings(stage, self.world))
                images_per_batch(self.config, stage, self.world.size)
            except ConfigError as error:
                raise ConfigError(f"stage {name}: {error}") from None
        zero = self.ds_config.get("zero_optimization", {}).get("stage", 0)
        return f"{len(self.config.stages)} stages ({', '.join(self.config.stages)}), ZeRO {zero}"

    def folder(self) -> str:
        """Check that every rank can write the folder and sees in it what rank 0 has written: one file system for all."""
        path = _existing(self.out_dir)
        token = self._gathered(os.urandom(8).hex())[0]
        mine, first = (path / f".dsquant-doctor-{token}-{rank}" for rank in (self.world.rank, 0))
        fault = None
        try:
            mine.write_text(token)
        except OSError as error:
            fault = error
        dist.barrier()  # every rank comes here, and to the next: what it found is said after
        seen = first.exists()
        dist.barrier()
        if fault is not None:
            raise ConfigError(f"{path} cannot be written: {fault}; choose another --out_dir")
        mine.unlink(missing_ok=True)
        if not seen:
            raise ConfigError(f"{path} is not one folder for all ranks; choose an --out_dir on a shared file system")
        return f"{path} is writable, and the same on every rank"

    def space(self) -> str:
        """Compare the free space with what the checkpoints of a run take."""
        numel = sum(p.numel() for p in self._model().parameters())
        kept = self.config.checkpoint.keep_last + self.config.checkpoint.keep_best + len(self.config.stages)
        needed, free = STATE_BYTES * numel * kept, shutil.disk_usage(_existing(self.out_dir)).free
        if needed > free:
            raise ConfigError(
                f"{kept} checkpoints of {numel / 1e6:.1f} M parameters take {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB are "
                "free; choose another --out_dir or a smaller checkpoint.keep_last"
            )
        return f"{kept} checkpoints take {needed / MIB:.0f} MiB, {free / GIB:.0f} GiB are free"

    def data(self) -> str:
        """Open the shards as a run does, and compare them with the batch and the number of ranks."""
        data = self.config.data
        with tempfile.TemporaryDirectory() as scratch:
            if data.source == "digits":
                train, val = make_digits(Path(scratch))
            else:
                train, val = open_shards(data, Path(scratch))
        for name, stage in self.config.stages.items():
            per_rank = images_per_batch(self.config, stage, self.world.size)
            if train.total < per_rank * self.world.size:
                raise DataError(
                    f"stage {name}: {train.total} samples do not fill a batch of {per_rank} on {self.world.size} ranks"
                )
        return f"{train.total} samples in {len(train)} shards to train on, {val.total} in {len(val)} to validate"

    def quantizers(self) -> str:
        """Quantize every weight of every stage once and check that no scale group holds more values than its bits allow."""
        checked = 0
        for name, stage in self.config.stages.items():
            if stage.quant is not None:
                checked += self._quantize(name, stage)
        stages = sum(stage.quant is not None for stage in self.config.stages.values())
        return f"{checked} weights of {stages} quantized stages have the levels asked for"

    def _quantize(self, name: str, stage: StageConfig) -> int:
        model = self._model()
        sites = insert_sites(model, stage.quant.policy(), stage.quant.grad_scale)
        images = weight_images(model, sites.weights)
        for site in sites.weights:
            grouped = images[site.name].view(-1, site.grouping.n_groups, site.grouping.inner)
            values = grouped[:, 0].unique().numel()
            if not 1 < values <= 2**site.spec.n_bits:
                raise TrainingError(
                    f"stage {name}: {site.name} has {values} values in a scale group after quantization to "
                    f"{site.spec.n_bits} bits; check its weights, and the rules of the recipe"
                )
        return len(sites.weights)

    def _model(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        return build_model(self.config.model)

    def native(self) -> str:
        """Say which native code runs, and check that it gives what the definitions give, on this rank's device."""
        device = self.world.device.type
        backend = backends.choose("fake_quantize", device)
        if wrong := disagreements(device):
            raise BuildError(f"{wrong[0]} differs from its definition; run with DSQ_BACKEND=torch, and report this")
        return f"{backend} on {device}; every op gives what its definition gives"

    def wandb(self) -> str:
        """Say where metrics go beside metrics.jsonl."""
        mode = self.config.telemetry.wandb
        key = (
            "a key is set"
            if os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
            else "no key is set"
        )
        if mode == "online" and key == "no key is set":
            raise ConfigError("telemetry.wandb is online and no key is set: `wandb login`, WANDB_API_KEY, or offline")
        return f"{mode}, {key}"

    def _gathered(self, value: Any) -> list[Any]:
        everywhere: list[Any] = [None] * self.world.size
        dist.all_gather_object(everywhere, value)
        return everywhere


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
