"""The data of a run, opened by all ranks together: shards, the tokenizer, and how many samples make a batch."""

import re
from pathlib import Path

import torch.distributed as dist

from dsquant.config import DataConfig, RunConfig, StageConfig
from dsquant.data import (
    EvalStream,
    ReplaceTokens,
    ShardCache,
    ShardSet,
    StoredCrops,
    TrainStream,
    copy_tokenizer,
    damage_report,
    load_tokenizer,
    make_digits,
    similar_tokens,
    write_similar_tokens,
)
from dsquant.engine import World, micro_batch_size
from dsquant.errors import ConfigError
from dsquant.evaluation import transform_of
from dsquant.models import tokenizer_location, word_embeddings
from dsquant.run_folder import SIMILAR_TOKENS, TOKENIZER

UNUSED = re.compile(r"\[unused\d+\]")  # of BERT's vocabulary


def open_data(config: DataConfig, run_dir: Path, rank: int) -> tuple[ShardSet, ShardSet]:
    """Open the training and validation shards; rank 0 makes or counts them first, the others then find them."""
    for turn in (rank == 0, rank != 0):
        if turn:
            if config.source == "digits":
                shards = make_digits(run_dir / "data")
            else:
                shards = open_shards(config, run_dir / "data")
        dist.barrier()
    return shards


def open_shards(config: DataConfig, counts: Path) -> tuple[ShardSet, ShardSet]:
    """Open the shards that a recipe names; `counts` is a folder that keeps the counts of those without an index."""
    cache = ShardCache(config.cache_dir, int(config.cache_gib * 2**30)) if config.cache_dir else None
    train = ShardSet.open(config.train, counts, damaged=config.max_damaged > 0, cache=cache)
    return train, ShardSet.open(config.val, counts, cache=cache)


def open_tokenizer(config: RunConfig, run_dir: Path, rank: int) -> Path | None:
    """Give the run a copy of its tokenizer, made by rank 0, and return its folder; None for images."""
    if config.data.task == "image":
        return None
    if rank == 0:
        copy_tokenizer(tokenizer_location(config.model, config.data.tokenizer), run_dir / TOKENIZER)
    dist.barrier()
    return run_dir / TOKENIZER


def open_similar_tokens(config: RunConfig, run_dir: Path, world: World) -> Path | None:
    """Have rank 0 find which tokens are like which, once in a run, and return the file; None where no stage replaces any."""
    if not any(stage.distill and stage.distill.replace_tokens for stage in config.stages.values()):
        return None
    path = run_dir / SIMILAR_TOKENS
    if world.rank == 0 and not path.exists():
        tokenizer = load_tokenizer(run_dir / TOKENIZER)
        embeddings = word_embeddings(config.model).to(world.device)
        names = [name or "" for name in tokenizer.convert_ids_to_tokens(range(len(embeddings)))]  # "": of no token
        special = set(tokenizer.all_special_tokens)
        fixed = {i for i, name in enumerate(names) if not name or name in special or UNUSED.fullmatch(name)}
        write_similar_tokens(similar_tokens(embeddings, names, fixed), path)
    dist.barrier()
    return path


def images_per_batch(config: RunConfig, stage: StageConfig, world_size: int) -> int:
    """Return images per rank and accumulation step; `batch_size` counts crops where an image serves several.

    Raises ConfigError where the batch does not divide.
    """
    crops, soft = micro_batch_size(stage, world_size), config.data.soft_labels
    per_image = soft.crops_per_image if soft else 1
    if crops % per_image:
        raise ConfigError(
            f"batch_size {stage.batch_size} gives {crops} crops to each of {world_size} ranks x {stage.gradient_accumulation} "
            f"accumulation steps, not a multiple of data.soft_labels.crops_per_image {per_image}"
        )
    return crops // per_image


def train_stream(
    config: RunConfig,
    stage: StageConfig,
    shards: ShardSet,
    crops: StoredCrops | None,
    tokenizer: Path | None,
    similar: Path | None,
    world: World,
    order_ranks: int,
) -> TrainStream:
    """Give this rank its training batches: whole stored crops where there are some, else samples by the recipe's transform.

    similar: what `open_similar_tokens` returns.
    """
    data, share = config.data, stage.distill.replace_tokens if stage.distill else 0.0
    replace = ReplaceTokens(similar, share) if share else None
    return TrainStream(
        shards,
        transform=None if crops else transform_of(data, train=True, tokenizer=tokenizer, replace=replace),
        decode_rows=crops,
        batch_size=images_per_batch(config, stage, world.size),
        rank=world.rank,
        world_size=world.size,
        order_ranks=order_ranks,
        seed=config.seed,
        num_workers=data.num_workers,
        shuffle_buffer=data.shuffle_buffer,
        bucket_batches=data.bucket_batches,
        pin_memory=world.device.type == "cuda",
        max_damaged=data.max_damaged,
    )


def damage_of_all_ranks(stream: TrainStream) -> list[dict[str, object]]:
    """Gather the damaged samples that ranks have met since they started, one entry a shard and cause; every rank calls this."""
    if stream.damage.limit == 0:
        return []
    found: list[dict] = [{}] * stream.world_size
    dist.all_gather_object(found, stream.damage.found)
    return damage_report(found)


def eval_stream(data: DataConfig, shards: ShardSet, tokenizer: Path | None, world: World) -> EvalStream:
    """Give this rank its share of the validation samples."""
    return EvalStream(
        shards,
        transform=transform_of(data, train=False, tokenizer=tokenizer),
        batch_size=data.eval_batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=min(data.num_workers, 2),
    )
