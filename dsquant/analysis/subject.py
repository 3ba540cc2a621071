"""What is analysed: a float model with its weights, and the samples it is calibrated and measured on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsquant.config import ModelConfig, RunConfig
from dsquant.convert import validation_data
from dsquant.data import EvalStream, ShardSet, Tokenize, TrainStream, build_transform
from dsquant.data.reading import read_shard
from dsquant.data.shards import TEXT_MEMBER, content_member
from dsquant.errors import ConfigError, DataError
from dsquant.evaluation import transform_of
from dsquant.models import Inputs, build_model, logits_of, move, tokenizer_location
from dsquant.run_folder import TOKENIZER

if TYPE_CHECKING:
    from dsquant.checkpoint import Checkpoint

Batch = tuple[Inputs, Tensor]


@dataclass(frozen=True)
class Samples:
    """Say which samples a measurement takes.

    Attributes:
        data: WebDataset shards to measure on; by default the validation shards of the run.
        eval_batches: at most so many batches, a seeded random subset; 0 takes every sample.
        calibration_batches: batches that activation scales are fitted to.
        batch_size: samples at a time.
        seed: of the random subsets.
        num_workers: processes that decode images or tokenize sentences.
    """

    data: str | None = None
    eval_batches: int = 8
    calibration_batches: int = 4
    batch_size: int = 64
    seed: int = 0
    num_workers: int = 0


class Scores(NamedTuple):
    """Hold loss (N,) float64, rightness (N,) bool and log-probabilities (N, C) float32, so that variants compare by sample."""

    losses: Tensor
    right: Tensor
    log_probs: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def top1(self) -> float:
        return 100 * float(self.right.double().mean())

    def summary(self) -> dict[str, float]:
        """Return the mean `loss` and `top1` (%)."""
        return {"loss": self.loss, "top1": self.top1}

    def divergence(self, other: "Scores") -> Tensor:
        """Return KL(self || other) of each sample, (N,) float64, in nats: how far the predictions have moved."""
        mine, theirs = self.log_probs.double(), other.log_probs.double()
        return (mine.exp() * (mine - theirs)).sum(dim=1)


@dataclass
class Subject:
    """Hold a model to analyse, its float weights, and its samples on the device.

    `checkpoint` is that of the run, where there is one; `quantized` says that its stage trained quantizers.
    """

    name: str
    config: ModelConfig
    weights: dict[str, Tensor] = field(repr=False)
    batches: list[Batch] = field(repr=False)
    calibration: list[Inputs] = field(repr=False)
    device: torch.device
    checkpoint: "Checkpoint | None" = field(default=None, repr=False)

    @property
    def quantized(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.config.stages[self.checkpoint.stage].quant is not None

    def build(self) -> nn.Module:
        """Return a new float model with the subject's weights, in evaluation mode, that needs no gradient."""
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.config.model_copy(update={"pretrained": False, "checkpoint": None}))
        model.load_state_dict(self.weights)
        return model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        """Measure a model on every sample, in the order of the batches; label -1 marks padding."""
        losses, right, log_probs = [], [], []
        for inputs, labels in self.batches:
            logits, real = float_logits(model, inputs), labels >= 0
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
            losses.append(loss[real].double().cpu())
            right.append((logits.argmax(dim=-1) == labels)[real].cpu())
            log_probs.append(logits.log_softmax(dim=-1)[real].cpu())
        return Scores(torch.cat(losses), torch.cat(right), torch.cat(log_probs))


def float_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the logits (B, C) of a model of any family, float32."""
    return logits_of(model, inputs).float()


def open_run(run: str | Path, stage: str | None, samples: Samples, device: torch.device) -> Subject:
    """Open the newest checkpoint of a run, or of one stage; samples are prepared as the run prepared them.

    Raises ConfigError or CheckpointError for a folder without a run or stage, DataError for its shards.
    """
    from dsquant.checkpoint import load_run_checkpoint  # a model by name needs no DeepSpeed

    measured = samples.data or validation_data(run)
    checkpoint = load_run_checkpoint(Path(run), stage)
    weights = {**checkpoint.latents, **checkpoint.buffers}
    config = checkpoint.config
    _check_classifies(config.model)
    transform = transform_of(config.data, train=False, tokenizer=Path(run) / TOKENIZER)
    fitted = measured if samples.data else _training_data(config, Path(run))
    batches, calibration = _read(measured, fitted, transform, samples, device, config.model.num_classes)
    name = f"{config.model.name}, {Path(run).name}, stage {checkpoint.stage}"
    plain = config.model.model_copy(update={"pretrained": False, "checkpoint": None})
    return Subject(name, plain, weights, batches, calibration, device, checkpoint)


def _check_classifies(config: ModelConfig) -> None:
    if config.library == "transformers" and config.num_classes == 1:
        raise ConfigError(
            f"{config.name} gives scores (num_classes 1); analysis measures the loss and the predictions of classes"
        )


def _training_data(config: RunConfig, run: Path) -> str:
    return str(run / "data" / "train") if config.data.source == "digits" else config.data.train


def open_model(
    config: ModelConfig, samples: Samples, device: torch.device, *, image_size: int | None = None,
    tokenizer: str | None = None,
) -> Subject:  # fmt: skip
    """Open a model by its upstream name, a text model where its library is transformers.

    Images are prepared as its pretrained configuration says. Sentences are cut to `config.max_length` tokens by its own
    tokenizer, or by that of the folder `tokenizer`. A head that its weights lack is drawn by the seed of the samples.
    Raises ConfigError without shards, for a name that is unknown and for weights that are not to be had.
    """
    if samples.data is None:
        raise ConfigError("--model needs --data: a folder or pattern of WebDataset shards (a run knows its own)")
    _check_classifies(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(samples.seed)
        model = build_model(config)
    if config.library == "transformers":
        transform = Tokenize(tokenizer_location(config, tokenizer), config.max_length, pad_to="longest")
    else:
        transform = _image_transform(config, model, image_size)
    batches, calibration = _read(samples.data, samples.data, transform, samples, device, config.num_classes)
    weights = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    return Subject(config.name, config, weights, batches, calibration, device)


def _image_transform(config: ModelConfig, model: nn.Module, image_size: int | None) -> Any:
    known = getattr(model, "pretrained_cfg", None) or {}
    if missing := [key for key in ("mean", "std", "interpolation", "crop_pct", "input_size") if key not in known]:
        raise ConfigError(f"{config.name} does not say how its images are prepared ({missing}); analyse a run of it")
    channels, _, size = known["input_size"]
    if config.kwargs.get("in_chans", channels) != channels:
        raise ConfigError(
            f"{config.name} says how images of {channels} channels are prepared; analyse a run of it instead"
        )
    return build_transform(
        image_size=image_size or config.kwargs.get("img_size", size),
        channels=channels,
        train=False,
        augment="none",
        **{key: known[key] for key in ("mean", "std", "interpolation", "crop_pct")},
    )


def _read(
    measured: str, fitted: str, transform: Any, samples: Samples, device: torch.device, num_classes: int
) -> tuple[list[Batch], list[Inputs]]:
    """Read all that is measured and calibrated on into memory, once; every variant then sees the same samples."""
    shards = ShardSet.open(measured)
    _check_content(shards, isinstance(transform, Tokenize), measured)
    batches = []
    for inputs, labels in _measured(shards, transform, samples):
        _check_labels(labels, num_classes, measured)
        batches.append((move(inputs, device, torch.float32), labels.to(device)))
    stream = TrainStream(
        ShardSet.open(fitted), transform=transform, batch_size=samples.batch_size, rank=0, world_size=1,
        seed=samples.seed + 1, num_workers=samples.num_workers,
    ).batches()  # fmt: skip
    calibration = [move(next(stream)[0], device, torch.float32) for _ in range(samples.calibration_batches)]
    return batches, calibration


def _check_content(shards: ShardSet, wants_text: bool, measured: str) -> None:
    holds_text = content_member(shards.urls[0], next(read_shard(shards.urls[0], shards.counts[0]))) == TEXT_MEMBER
    if holds_text != wants_text:
        held, wanted = ("sentences", "images") if holds_text else ("images", "sentences")
        fix = "pass --library transformers for a text model" if holds_text else "give shards of make_shards.py text"
        raise DataError(f"{measured} holds {held}, and the model takes {wanted}; {fix}")


def _check_labels(labels: Tensor, num_classes: int, measured: str) -> None:
    if labels.is_floating_point():
        raise DataError(f"{measured} holds scores; analysis measures the loss and the predictions of classes")
    if (largest := int(labels.max())) >= num_classes:
        raise DataError(
            f"{measured} has a sample of class {largest}; the model tells {num_classes} classes (0, 1, ...)"
        )


def _measured(shards: ShardSet, transform: Any, samples: Samples) -> Iterator[Batch]:
    shared = {"transform": transform, "batch_size": samples.batch_size, "num_workers": samples.num_workers}
    if not samples.eval_batches or samples.eval_batches * samples.batch_size >= shards.total:
        yield from EvalStream(shards, rank=0, world_size=1, **shared).batches()
        return
    stream = TrainStream(shards, rank=0, world_size=1, seed=samples.seed, **shared).batches()
    for _ in range(samples.eval_batches):  # within one pass over the shards: no sample comes twice
        yield next(stream)
