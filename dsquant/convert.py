"""From a run's checkpoint to a packed file, and from a packed file to its scores on the run's validation samples."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsquant.config import DataConfig, ModelConfig, load_config
from dsquant.data import EvalStream, ShardSet
from dsquant.errors import ConfigError, ExportError
from dsquant.evaluation import Scores, evaluate, transform_of
from dsquant.export import PackedInfo, load_packed, read_packed, write_packed
from dsquant.export.layout import data_keys
from dsquant.files import sync
from dsquant.models import Sites, build_model, insert_sites, portable
from dsquant.models.rotation import float_weights
from dsquant.quant.reparam import encode_product
from dsquant.run_folder import RECIPE_FILE, TOKENIZER

if TYPE_CHECKING:
    from dsquant.checkpoint import Checkpoint


def convert_run(run_dir: str | Path, out: str | Path, stage: str | None = None, step: int | None = None) -> PackedInfo:
    """Pack the newest checkpoint of a run, of one of its stages, or that of a step, whatever ZeRO stage and world size wrote it.

    The codes are those of the last training step. Raises CheckpointError where there is no whole checkpoint and
    ExportError for a float stage.
    """
    from dsquant.checkpoint import load_run_checkpoint  # evaluating a packed file needs no DeepSpeed

    return pack_checkpoint(load_run_checkpoint(Path(run_dir), stage, step), out)


def export_float(run_dir: str | Path, out: str | Path, stage: str | None = None, step: int | None = None) -> Path:
    """Write the float32 weights and buffers of a run's newest checkpoint, of one of its stages, or of a step, by upstream name.

    The safetensors file is what `model.checkpoint` takes; of a quantized stage it holds the latents. Rotated weights
    (`model.rotate`) are rotated back. Raises CheckpointError where there is no whole checkpoint.
    """
    from dsquant.checkpoint import load_float, load_run_checkpoint

    checkpoint, path = load_run_checkpoint(Path(run_dir), stage, step), Path(out)
    weights = float_weights(load_float(checkpoint), checkpoint.config.model.rotate)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
    sync(partial)
    partial.replace(path)
    sync(path.parent)
    return path


def pack_checkpoint(checkpoint: "Checkpoint", out: str | Path) -> PackedInfo:
    """Write the packed file of a checkpoint. Raises ExportError for a float stage or tensors of another model."""
    config, stage = checkpoint.config, checkpoint.stage
    quant = config.stages[stage].quant
    if quant is None:
        quantized = [name for name, other in config.stages.items() if other.quant is not None]
        raise ExportError(f"stage {stage!r} trains in float; its run has these quantized stages: {quantized}")
    with torch.random.fork_rng(devices=[]):
        model = build_model(ModelConfig(**config.model.model_dump(exclude={"pretrained", "checkpoint"})))
    latents, buffers = checkpoint.latents, checkpoint.buffers
    own = model.state_dict().keys()
    if odd := sorted(own - (latents.keys() | buffers.keys()) | latents.keys() - own):
        where = "model" if odd[0] in own else "checkpoint"
        raise ExportError(f"stage {stage!r}: only its {where} has {odd[0]}; convert with the dsquant that trained it")
    sites = insert_sites(model, quant.policy())
    product_codes, product_scales = _products(checkpoint, latents, sites)
    return write_packed(
        out,
        latents=latents,
        buffers={name: tensor for name, tensor in buffers.items() if name in own},  # ZeRO 3 saves volatile ones as well
        weight_sites=sites.weights,
        activation_sites=sites.activations,
        scales=checkpoint.quant | product_scales,
        model=portable(config.model.model_copy(update={"pretrained": False, "checkpoint": None})),
        quant=quant,
        data=config.data.model_dump(mode="json", include=data_keys(config.data.task)),
        training={
            "recipe": config.recipe,
            "stage": stage,
            "step": checkpoint.step,
            "precision": config.precision,
            "world_size": checkpoint.manifest["world_size"],
            "eval_batch_size": config.data.eval_batch_size,
        },
        codes=checkpoint.codes | product_codes,
        products=sites.products,
    )


def _products(
    checkpoint: "Checkpoint", latents: dict[str, Tensor], sites: Sites
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return codes and scales of the products of q and k weights (QKR), of the weights that forward passes saw."""
    dtype = torch.bfloat16 if checkpoint.manifest.get("bf16", False) else torch.float32
    found = {site.name: encode_product(latents[fused].to(dtype), site) for fused, site in sites.products.items()}
    return {name: codes for name, (codes, _) in found.items()}, {f"{n}:scale": scale for n, (_, scale) in found.items()}


def validation_data(run_dir: str | Path) -> str:
    """Return where the validation shards of a run lie. Raises ConfigError for a folder that holds no run."""
    recipe = Path(run_dir) / RECIPE_FILE
    if not recipe.is_file():
        raise ConfigError(f"{run_dir} holds no {RECIPE_FILE}; give the --out_dir of a run")
    data = load_config(str(recipe)).data
    return str(Path(run_dir) / "data" / "val") if data.source == "digits" else data.val


def evaluate_packed(
    path: str | Path,
    val_location: str | Path,
    batch_size: int | None = None,
    *,
    tokenizer: str | Path | None = None,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> dict[str, float | int]:
    """Return `top1` (%), mean `loss` and the number of `samples` of a packed file over a set of validation shards.

    A text model's result holds its metric as well; its tokenizer is by default the folder `tokenizer` beside the file, where
    a run keeps it. Batches are cut as the training run cut them, for its number of ranks, and the dtype is the run's on this
    device (bf16 on a GPU, fp32 on a CPU, or what its recipe says): the result is that of training's own evaluation.
    Raises ExportError for the file and DataError for the shards.
    """
    packed = read_packed(path)
    training = packed.training
    batch_size = batch_size or training.get("eval_batch_size")
    if not batch_size:
        raise ConfigError(f"{path} does not say with which batch size its training evaluated; give batch_size")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(training.get("precision", "fp32"), device)
    model = load_packed(path, device).to(dtype)
    shards = ShardSet.open(val_location)
    task = packed.data.get("task", "image")
    data = DataConfig(**{key: packed.data[key] for key in data_keys(task)}, train="-", val=str(val_location))
    tokenizer = tokenizer or Path(path).parent / TOKENIZER
    if task == "text" and not Path(tokenizer).is_dir():
        raise ConfigError(f"{tokenizer} is no folder of a tokenizer; give that of the run, RUN/{TOKENIZER}")
    transform, scores = transform_of(data, train=False, tokenizer=tokenizer), Scores(data.metric, device)
    for rank in range(world_size := training.get("world_size", 1)):
        stream = EvalStream(
            shards,
            transform=transform,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        evaluate(model, stream, scores, device, dtype)
    return scores.result()


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    bf16 = precision == "bf16" or (precision == "auto" and device.type != "cpu")
    return torch.bfloat16 if bf16 else torch.float32
