"""The recipe: every choice of a run, checked when it is built and before any device is held.

A recipe is a YAML file (`dsquant/recipes/NAME.yaml` or any path) plus dotted overrides. An unknown key, a wrong type
or a value set differently in the ds_config is an error that names the key, the value and what is allowed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsquant.errors import ConfigError
from dsquant.spec import (
    MAX_BITS,
    MIN_BITS,
    OF_ACTIVATIONS,
    Bias,
    Granularity,
    Method,
    PolicyRule,
    QuantSpec,
    SitePolicy,
    check_bits,
    levels_of,
)

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "digits_w2a2"
SOFT_LABELS = "soft_labels"  # as distill.teacher: the probabilities stored with the crops; no stage bears this name

Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS, strict=True)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Refuse unknown keys in every part of a recipe; integers and flags must be written as such."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(Section):
    """Name a model and how to build it; `checkpoint` is a float state dict that must load strictly.

    timm: `name` is a timm model, `kwargs` go to its constructor. transformers: `name` is a model of the hub, a local folder,
    `package:NAME` (an installed package that holds such a folder), or `bert` or `roberta` for a model made from `kwargs`
    alone; `kwargs` override its configuration. `max_length` is the tokens of an input; a run takes it from its data.
    `rotate` names linear layers, by globs, whose inputs and weights are rotated (`models.rotation`): the same function, of
    inputs without outliers. Every stage of a run has the rotated weights; weights that are read are rotated then.
    """

    library: Literal["timm", "transformers"] = "timm"
    name: str
    num_classes: Positive
    max_length: Positive | None = None
    pretrained: Flag = False
    checkpoint: str | None = None
    kwargs: dict[str, Any] = {}
    rotate: list[str] = []

    @model_validator(mode="after")
    def _images_have_no_length(self):
        if self.library == "timm" and self.max_length is not None:
            raise ValueError("model.max_length is for text; timm models take images")
        return self


class SoftLabelsConfig(Section):
    """Train on crops that a teacher has seen, stored in the shards by tools/make_soft_labels.py (docs/soft_labels.md).

    Each visit of an image decodes it once and serves `crops_per_image` of its stored crops. A stage's `batch_size` counts
    crops, so a step reads batch_size / crops_per_image images, and `epochs` counts as many crops as the set has images:
    optimizer steps at equal `epochs` do not depend on crops_per_image, and e epochs pass over the images e / crops_per_image
    times. With m = 4, one pass is four epochs (Quantization Variation, TMLR 2024; FKD, Shen and Xing 2022).
    """

    crops_per_image: Positive = 4


class DataConfig(Section):
    """Say where the shards lie and how their samples become tensors; `source: digits` makes its own shards in the run.

    task image: `image_size` and the fields after it. task text: sentences are cut to `max_length` tokens by the tokenizer
    of the model, or that of the folder `tokenizer`, and padded to it or to the `longest` of their batch; in the
    latter case the sentences of every `bucket_batches` batches may be put together by length, which leaves less to pad.
    `metric` is what validation reports beside the loss; pearson_spearman is for scores (regression, `model.num_classes: 1`).
    A rank replaces up to `max_damaged` training samples that cannot be read by others, with a warning for each; the next
    one is an error. Validation replaces none. Shards of remote addresses are kept in the folder `cache_dir`, the least
    recently used leaving beyond `cache_gib` GiB; it should lie on a disk of the node, whose ranks share it.
    """

    task: Literal["image", "text"] = "image"
    source: Literal["shards", "digits"] = "shards"
    train: str | None = None
    val: str | None = None
    metric: Literal["accuracy", "f1", "matthews", "pearson_spearman"] = "accuracy"
    tokenizer: str | None = None
    max_length: Positive | None = None
    pad_to: Literal["max_length", "longest"] = "max_length"
    bucket_batches: Positive = 1
    image_size: Positive | None = None
    channels: Literal[1, 3] = 3
    augment: Literal["none", "shift", "flip_crop", "rrc", "rand_augment"] = "rrc"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    num_workers: Count = 4
    shuffle_buffer: Positive = 4096
    max_damaged: Count = 0
    cache_dir: str | None = None
    cache_gib: Annotated[float, Field(gt=0)] = 64.0
    eval_batch_size: Positive = 256
    soft_labels: SoftLabelsConfig | None = None

    @model_validator(mode="after")
    def _complete(self):
        if self.source == "shards" and not (self.train and self.val):
            raise ValueError("data.train and data.val must name folders or patterns of WebDataset shards")
        needed, foreign = ("image_size", TEXT_FIELDS) if self.task == "image" else ("max_length", IMAGE_FIELDS)
        if getattr(self, needed) is None:
            raise ValueError(f"data.{needed} is needed where data.task is {self.task}")
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"data.{name} has no use where data.task is {self.task}; remove it, or set data.task")
        if self.bucket_batches > 1 and self.pad_to != "longest":
            raise ValueError(
                "data.bucket_batches saves padding only where data.pad_to is longest; set it, or remove it"
            )
        if self.task == "text" and self.source != "shards":
            raise ValueError(f"data.source is {self.source}; text comes from shards")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"data.mean and data.std need {self.channels} values, one a channel")
        if self.soft_labels and self.source != "shards":
            raise ValueError(
                f"data.soft_labels lie in shards that a teacher has seen, but data.source is {self.source!r}"
            )
        if self.soft_labels and self.augment != "none":
            raise ValueError(
                f"data.augment is {self.augment!r} and data.soft_labels is set: a soft label holds for its stored crop "
                "alone, so nothing else may change the image; set data.augment: none"
            )
        return self


YAML_WORDS = {"true": True, "false": False, "null": None}  # which Python Fire leaves as strings
TEXT_FIELDS = ("tokenizer", "max_length", "pad_to", "bucket_batches")
IMAGE_FIELDS = ("image_size", "channels", "augment", "mean", "std", "interpolation", "crop_pct")


class TensorQuant(Section):
    """Give the default of all weights or of all activations."""

    n_bits: Bits
    granularity: Granularity = Granularity.PER_TENSOR
    method: Method = Method.LSQ
    offset: Flag = False
    bias: Bias = Bias.NONE


class RuleConfig(Section):
    """Change the sites that match a glob, in order."""

    match: str
    n_bits: Bits | None = None
    granularity: Granularity | None = None
    method: Method | None = None
    offset: Flag | None = None
    bias: Bias | None = None
    lr_scale: NonNegative | None = None
    quantize: Flag = True

    @model_validator(mode="after")
    def _bits_of_method(self):
        if self.method is not None and self.n_bits is not None:
            _as_value_error("method", check_bits, self.method, self.n_bits)
        return self

    def rule(self) -> PolicyRule:
        changes = self.model_dump(exclude={"match", "quantize"}, exclude_none=True)
        return PolicyRule(self.match, changes, self.quantize)


class ObrConfig(Section):
    """Weigh oscillation-aware bin regularization (Quantization Variation, section 4.3; method of the closed form).

    `sum` is the paper's formula, `mean` the authors' code, `kernel_mean` a sum over output channels of means (Nagel et al.
    2022). The weight rises by a cosine from 0 at `start` (a share of the stage's steps) to `weight` at its end; quantizers
    above `max_bits` are left out.
    """

    weight: NonNegative = 0.0
    start: Fraction = 0.25
    aggregation: Literal["sum", "mean", "kernel_mean"] = "sum"
    mse_weight: NonNegative = 1.0
    variance_weight: NonNegative = 1.0
    max_bits: Bits = 4


class FreezeConfig(Section):
    """Freeze weights that oscillate more often than a threshold that falls by a cosine from `first` to `last`."""

    enabled: Flag = False
    start: Fraction = 0.25
    first: Fraction = 0.1
    last: Fraction = 0.01


class DampeningConfig(Section):
    """Weigh oscillation dampening, agg((sg[w_hat] - clip(w))^2), as OBR is weighed (Nagel et al. 2022, section 4.1)."""

    weight: NonNegative = 0.0
    start: Fraction = 0.25
    aggregation: Literal["sum", "mean", "kernel_mean"] = "kernel_mean"
    max_bits: Bits = 4


class CgaConfig(Section):
    """Train only the weights within `boundary_range` steps of a boundary between two codes (OFQ, confidence-guided annealing).

    All others keep their latent, whatever the optimizer's moments and decay would do to it. For a last, short stage.
    """

    enabled: Flag = False
    boundary_range: Annotated[float, Field(gt=0, le=0.5)] = 0.005
    max_bits: Bits = 4


class OscillationConfig(Section):
    """Set the tracker: momentum of the frequency, and the frequency above which a weight counts as oscillating."""

    momentum: Annotated[float, Field(gt=0, le=1)] = 0.001
    threshold: Fraction = 0.005
    freeze: FreezeConfig = FreezeConfig()
    dampening: DampeningConfig = DampeningConfig()
    cga: CgaConfig = CgaConfig()


class CalibrationConfig(Section):
    """Say how many training batches set the first activation scales, in how many rounds, in which order and by which rule.

    The first round fits all sites to float activations; or, `sequential`, each in its turn to what the sites before it,
    quantizing already, pass on. Each further round refits all sites to what they see while all quantize.

    mse fits scale and offset to the least squared error, biases around signed sites being set to the means of their features.
    lsq: 2 mean|x| / sqrt(qmax), twice that where unsigned (OFQ, BiT). qv: 2 mean|x| / sqrt(qmax) with the qmax of signed
    codes everywhere (code of Quantization Variation). Offsets and biases of the last two start at 0.

    `weights: least_squares` first refits every linear layer to its quantized inputs, so that it puts out what the float model
    does there (`quant.least_squares`): for few or no training steps (`steps: 0`), of which it takes the place. All batches of
    a rank go through the model at once, and twice.

    `inherit` says what comes from the stage of `init_from` instead, where that is a quantized one. biases: those of sites
    that have them in both stages, since the weights have been trained with them; scales are fitted upon them. all: every
    scale, offset and bias, weights' too, of the same sites, for fine-tuning that goes on where that stage ended (CGA).
    """

    batches: Positive = 4
    rounds: Positive = 2
    init: Literal["mse", "lsq", "qv"] = "mse"
    sequential: Flag = False
    weights: Literal["keep", "least_squares"] = "keep"
    inherit: Literal["none", "biases", "all"] = "biases"

    @model_validator(mode="after")
    def _all_is_inherited_or_refitted(self):
        if self.inherit == "all" and self.weights != "keep":
            raise ValueError("inherit: all calibrates nothing; weights: least_squares needs inherit: biases or none")
        return self


def _as_value_error(key: str, check: Callable[..., object], *values: object) -> None:
    """Run a check of the vocabulary; its ConfigError becomes one that pydantic places in the recipe."""
    try:
        check(*values)
    except ConfigError as error:
        raise ValueError(f"{key}: {error}") from None


class QuantConfig(Section):
    """Describe the quantization of a stage.

    `grad_scale` is the factor on the gradient of a scale of N elements: lsq 1 / sqrt(N qmax); mdq 1 / sqrt(qmax |w|_1) for
    weights, of their present latents (Quantization Variation), and lsq for activations; none 1. Adam cancels it: it has an
    effect with `scale_optimizer: sgd`.

    `qk_reparam` is OFQ's query-key reparameterization (Liu et al. 2023, section 4.2): of each head the product of its q and
    k weights is quantized, in every forward pass, and not the two. Its sites are `*.attn.qk.weight`, one for the products of
    an attention, with a method whose scale is a statistic (statsq, bwn), and `*.attn.qk`, the product times the input;
    `*.attn.qkv.weight` is then the v rows alone, q and k rows train as float latents, and their biases have no part.
    """

    weight: TensorQuant
    activation: TensorQuant
    rules: tuple[RuleConfig, ...] = (
        RuleConfig(match="patch_embed.*", n_bits=8, method=Method.LSQ),
        RuleConfig(match="head*", n_bits=8, method=Method.LSQ),
    )
    qk_reparam: Flag = False
    weight_init: Literal["mse", "lsq", "lsq_plus"] = "mse"
    scale_lr: Annotated[float, Field(gt=0)] = 1e-3
    scale_lr_mode: Literal["relative", "absolute"] = "relative"
    scale_optimizer: Literal["adam", "sgd"] = "adam"
    grad_scale: Literal["lsq", "mdq", "none"] = "lsq"
    calibration: CalibrationConfig = CalibrationConfig()
    obr: ObrConfig = ObrConfig()
    oscillation: OscillationConfig = OscillationConfig()

    @model_validator(mode="after")
    def _each_kind_has_what_it_can(self):
        weight, activation = self.weight, self.activation
        refused = {
            "weight.offset: weights are symmetric; an offset is for activations": weight.offset,
            "weight.bias: a bias is for activations": weight.bias is not Bias.NONE,
            "weight.granularity: per_token is for activations; weights take per_tensor, per_channel or per_head": (
                weight.granularity is Granularity.PER_TOKEN
            ),
            f"activation.method: {activation.method} is for weights; activations take lsq or elastic": (
                activation.method not in OF_ACTIVATIONS
            ),
            "calibration.weights: least_squares has no layer to refit where a product of weights is quantized; set keep, or "
            "qk_reparam: false": self.qk_reparam and self.calibration.weights == "least_squares",
        }
        if faults := [said for said, is_fault in refused.items() if is_fault]:
            raise ValueError("; ".join(faults))
        for key, tensor in (("weight.method", weight), ("activation.method", activation)):
            _as_value_error(key, levels_of, tensor.method, tensor.n_bits, True)
        return self

    def policy(self) -> SitePolicy:
        """Return the ordered policy that resolves every site."""
        return SitePolicy(
            QuantSpec(**self.weight.model_dump()),
            QuantSpec(**self.activation.model_dump()),
            [rule.rule() for rule in self.rules],
            qk_reparam=self.qk_reparam,
        )


class DistillConfig(Section):
    """Teach a stage by an earlier one: loss = hard * CE(labels) + soft * T^2 * CE(teacher probabilities at T).

    `teacher: soft_labels` takes the probabilities that are stored with the crops of `data.soft_labels`; T is then the
    temperature they were made at.
    `hidden` weighs the squared distance to the teacher's hidden states: of text the embedding output and every layer's output
    (BiT); of images every block's output, relative to the teacher's squared norm.
    `replace_tokens`: the share of a sentence's tokens that are replaced, anew in every epoch, by tokens of like meaning: by one
    of the 15 whose word embeddings, in the model that the run starts with, are closest. The teacher sees them too; the label
    is that of another sentence then.
    """

    teacher: str
    soft: NonNegative = 1.0
    hard: NonNegative = 0.0
    hidden: NonNegative = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    replace_tokens: Fraction = 0.0

    @model_validator(mode="after")
    def _hidden_of_a_model(self):
        if self.hidden and self.teacher == SOFT_LABELS:
            raise ValueError(
                f"hidden states need an online teacher, not {SOFT_LABELS}; name a stage, or set hidden to 0"
            )
        if self.replace_tokens and self.hard:
            raise ValueError("labels (hard) do not hold for a sentence of other tokens (replace_tokens); set one to 0")
        return self


class StageConfig(Section):
    """Describe one stage: what it starts from, what it quantizes, how long and how it is optimized.

    `batch_size` is global: samples per optimizer step over all ranks and accumulation steps. `quant: null` trains in
    float. Give `epochs` or `steps`; a float stage of 0 steps takes the model (`model.pretrained`, `model.checkpoint`) as it
    is, to start and teach later ones, a quantized one is calibrated and not trained. Vectors (biases, norms, and what the model
    keeps from decaying) learn at `vector_lr_scale` times the rate. `dropout: false` trains without the dropout and the
    stochastic depth that the model has; at W1A1 MiniLM ends higher so.
    """

    init_from: str | None = None
    quant: QuantConfig | None = None
    distill: DistillConfig | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Count | None = None
    batch_size: Positive
    gradient_accumulation: Positive = 1
    optimizer: Literal["adamw", "adam", "sgd", "radam", "nadam"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    min_lr: NonNegative = 0.0
    vector_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    warmup: Fraction = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 0.05
    gradient_clipping: NonNegative = 0.0
    label_smoothing: Fraction = 0.0
    dropout: Flag = True
    activation_checkpointing: Flag = False
    eval_every: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give a stage either epochs or steps")
        if self.quant is not None and self.quant.calibration.inherit == "all" and self.init_from is None:
            raise ValueError("quant.calibration.inherit: all needs init_from, the quantized stage that it goes on from")
        return self


class TelemetryConfig(Section):
    """Set how often losses and oscillation are recorded, in optimizer steps, and where W&B sends them."""

    log_every: Positive = 10
    oscillation_every: Positive = 100
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "dsquant"


class CheckpointConfig(Section):
    """Save every so many optimizer steps of a stage (0: only at its end) and keep the last few.

    `keep_best`: save, too, where an evaluation gives the stage's best validation score, and keep the best beside the last;
    `summary.json` names its step (`best_step`), which tools/convert.py takes as --step.
    """

    every_steps: Count = 0
    keep_last: Positive = 2
    keep_best: Flag = False


class Target(Section):
    """Record the figure that a recipe is to be held against: published by whom, and ours where it was run."""

    metric: str
    published: float | None  # None: nobody has published one
    source: str
    measured: float | None = None  # None: not run here


class RunConfig(Section):
    """Hold one run: model, data, an ordered set of stages, and how it is watched and kept.

    `max_steps` caps the optimizer steps of each stage; schedules end there. Up to `max_skipped` steps in a row whose loss or
    gradient is not finite are skipped; one more ends the run (0: the first does). `cpu_threads` are those of a rank that
    trains on a CPU (default: the cores shared out over the ranks of a node; OMP_NUM_THREADS, where set, decides).
    `backend` forces the code that ops run, as DSQ_BACKEND does, which decides where set (`dsquant/ops/backends.py`).
    """

    recipe: str
    seed: Count = 0
    max_steps: Positive | None = None
    max_skipped: Count = 10
    cpu_threads: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    backend: str = "auto"
    model: ModelConfig
    data: DataConfig
    stages: dict[str, StageConfig] = Field(min_length=1)
    telemetry: TelemetryConfig = TelemetryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    targets: dict[str, Target] = {}

    @model_validator(mode="before")
    @classmethod
    def _model_takes_the_length_of_the_data(cls, tree: Any) -> Any:
        """Give a text model the length of its inputs: quantizers depend on it, and a model travels without its data."""
        model, data = (tree.get(key) for key in ("model", "data")) if isinstance(tree, dict) else (None, None)
        sections = isinstance(model, dict) and isinstance(data, dict)
        if not sections or data.get("task") != "text" or model.get("library") != "transformers":
            return tree
        return {**tree, "model": {**model, "max_length": data.get("max_length")}}

    @model_validator(mode="after")
    def _model_fits_data(self):
        library = "transformers" if self.data.task == "text" else "timm"
        if self.model.library != library:
            raise ValueError(f"model.library is {self.model.library}; data.task {self.data.task} needs {library}")
        if (self.data.metric == "pearson_spearman") != (self.model.num_classes == 1):
            raise ValueError("data.metric pearson_spearman and model.num_classes 1 go together: both mean regression")
        return self

    @model_validator(mode="after")
    def _stages_point_back(self):
        seen: list[str] = []
        for name, stage in self.stages.items():
            sources = {"init_from": stage.init_from, "distill.teacher": stage.distill and stage.distill.teacher}
            for key, source in sources.items():
                stored = key == "distill.teacher" and source == SOFT_LABELS
                if source and source not in seen and not stored:
                    raise ValueError(f"stages.{name}.{key} is {source!r}; earlier stages are {seen}")
            seen.append(name)
        if stray := sorted(self.targets.keys() - set(seen)):
            raise ValueError(f"targets.{stray[0]}: no such stage; stages are {seen}")
        return self

    @model_validator(mode="after")
    def _tokens_can_be_replaced(self):
        for name, stage in self.stages.items():
            key = f"stages.{name}.distill.replace_tokens"
            if stage.distill is None or not stage.distill.replace_tokens:
                continue
            if self.data.task != "text":
                raise ValueError(f"{key} is for sentences; data.task is {self.data.task}")
            if not (self.model.pretrained or self.model.checkpoint):
                raise ValueError(
                    f"{key} needs embeddings that mean something; set model.pretrained or model.checkpoint"
                )
        return self

    @model_validator(mode="after")
    def _soft_labels_are_there_and_used(self):
        soft = self.data.soft_labels
        taught = [name for name, s in self.stages.items() if s.distill and s.distill.teacher == SOFT_LABELS]
        if SOFT_LABELS in self.stages:
            raise ValueError(f"stages.{SOFT_LABELS}: this name is kept for distill.teacher; call the stage otherwise")
        if taught and not soft:
            raise ValueError(f"stages.{taught[0]}.distill.teacher is {SOFT_LABELS!r}; set data.soft_labels too")
        if soft and not taught:
            raise ValueError(f"data.soft_labels is set, but no stage has distill.teacher: {SOFT_LABELS}")
        for name, stage in self.stages.items():
            if soft and stage.batch_size % soft.crops_per_image:
                raise ValueError(
                    f"stages.{name}.batch_size is {stage.batch_size} crops, not a multiple of "
                    f"data.soft_labels.crops_per_image {soft.crops_per_image}"
                )
        return self


def load_config(recipe: str = DEFAULT_RECIPE, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a recipe by name or path, apply dotted overrides, and check it. Raises ConfigError.

    A recipe may start with `extends: NAME_OR_FILE`: what it says is then laid over that recipe, mapping by mapping; a stage
    set to null is left out, its target too, and lists replace lists. An override may be a YAML word: true, false, null.
    """
    tree, path = _read_recipe(recipe, ())
    for key, value in (overrides or {}).items():
        _set(tree, key, YAML_WORDS.get(value, value) if isinstance(value, str) else value)
    _drop_null_stages(tree)
    return parse_config(tree, str(path))


def _read_recipe(recipe: str, above: tuple[Path, ...]) -> tuple[dict[str, Any], Path]:
    """Return a recipe's tree, with all that it extends beneath it, and its path; `above` are those that extend it."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(f"no recipe {recipe!r}: give the path of a YAML file or one of {known}")
    if path.resolve() in above:
        raise ConfigError(f"{path} extends itself, by way of {above[-1]}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no mapping of recipe keys")
    beneath = tree.pop("extends", None)
    if beneath is not None:
        base = str(path.parent / beneath) if str(beneath).endswith((".yaml", ".yml")) else str(beneath)
        tree = _laid_over(_read_recipe(base, (*above, path.resolve()))[0] | {"recipe": path.stem}, tree)
        _drop_null_stages(tree)
    tree.setdefault("recipe", path.stem)
    return tree, path


def _drop_null_stages(tree: dict[str, Any]) -> None:
    stages, targets = tree.get("stages"), tree.get("targets")
    if isinstance(targets, dict) and isinstance(stages, dict):
        tree["targets"] = {name: aim for name, aim in targets.items() if stages.get(name, aim) is not None}
    if isinstance(stages, dict):
        tree["stages"] = {name: stage for name, stage in stages.items() if stage is not None}


def _laid_over(beneath: Any, above: Any) -> Any:
    if not (isinstance(beneath, dict) and isinstance(above, dict)):
        return above
    return beneath | {key: _laid_over(beneath.get(key), value) for key, value in above.items()}


def parse_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Check a recipe that is already a mapping. Raises ConfigError with a line for each bad key."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}:\n" + "\n".join(_problem(e) for e in error.errors())) from None


def _problem(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"  {key}: unknown key (value {error['input']!r}); {_allowed(error['loc'])}"
    shown = "" if isinstance(error["input"], dict) else f" (value {error['input']!r})"
    return f"  {key or 'recipe'}: {error['msg']}{shown}"


def _allowed(loc: tuple[str | int, ...]) -> str:
    section: Any = RunConfig
    for part in loc[:-1]:
        if isinstance(section, type) and issubclass(section, Section):
            section = section.model_fields[part].annotation
            if getattr(section, "__origin__", None) in (dict, tuple):
                continue  # the next part is a key or an index
        section = _section_in(section)
    return (
        f"allowed here: {', '.join(section.model_fields)}" if hasattr(section, "model_fields") else "not allowed here"
    )


def _section_in(annotation: Any) -> Any:
    """Find the Section inside `X | None`, `dict[str, X]` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = [_section_in(arg) for arg in getattr(annotation, "__args__", ())]
    return next((s for s in found if isinstance(s, type)), None)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for index, part in enumerate(parents):
        node: Any = tree.setdefault(part, {})
        if isinstance(node, list):
            raise ConfigError(f"override {dotted}: {'.'.join(parents[: index + 1])} is a list; override it as a whole")
        if node is None:
            node = tree[part] = {}
        if not isinstance(node, dict):
            raise ConfigError(f"override {dotted}: {'.'.join(parents[: index + 1])} is {node!r}, not a section")
        tree = node
    tree[last] = value


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON configuration. Raises ConfigError naming the file and the fault."""
    try:
        ds_config = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"ds_config {path} does not exist; the shipped ones are in ds_configs/") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"ds_config {path} is not JSON: {error}") from None
    if not isinstance(ds_config, dict):
        raise ConfigError(f"ds_config {path} must hold one JSON object")
    return ds_config


def merge_ds_config(ds_config: dict[str, Any], owned: dict[str, Any]) -> dict[str, Any]:
    """Add the recipe's settings to a ds_config; raise ConfigError where the two say different things.

    `owned` maps DeepSpeed keys to the values the recipe gives them. "auto" in the ds_config yields to the recipe.
    """
    for section in ("optimizer", "scheduler", "fp16", "amp"):
        if ds_config.get(section):
            raise ConfigError(f"ds_config sets {section!r}: the recipe decides it; remove it from the ds_config")
    merged = dict(ds_config)
    for key, value in owned.items():
        given = ds_config.get(key, "auto")
        both = isinstance(value, dict) and isinstance(given, dict)
        pairs = [(f"{key}.{k}", given.get(k, "auto"), v) for k, v in value.items()] if both else [(key, given, value)]
        for name, theirs, ours in pairs:
            if theirs not in ("auto", ours):
                raise ConfigError(f"{name} is {theirs!r} in the ds_config and {ours!r} in the recipe; set it in one")
        merged[key] = {**given, **value} if both else value
    return merged
