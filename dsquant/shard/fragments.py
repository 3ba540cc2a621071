"""Where DeepSpeed keeps the fp32 master of each weight: the only file that knows ZeRO's internals.

Every ZeRO stage holds masters as flat fp32 tensors ("flats") that the inner optimizer steps. A Fragment says which slice
of a flat is which slice of which weight. `map_shards` finds the fragments of this rank for ZeRO 0, 1, 2, 3, offload,
and for bf16 on any of them; a layout it does not know is a ShardError, never a guess.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsquant.errors import ShardError
from dsquant.spec import WeightSite


@dataclass(frozen=True)
class Fragment:
    """Locate a slice of a weight in a flat fp32 shard: `flat[start : start + numel] == weight.view(-1)[offset : ...]`."""

    name: str
    flat: Tensor = field(repr=False)
    start: int
    numel: int
    offset: int
    shape: tuple[int, ...]

    def of(self, flat_like: Tensor) -> Tensor:
        """Return this fragment's slice of any tensor laid out like its flat (its gradient, a moment)."""
        return flat_like.view(-1)[self.start : self.start + self.numel]

    @property
    def values(self) -> Tensor:
        return self.of(self.flat.data)


def part_of(fragment: Fragment | None, site: WeightSite) -> Fragment | None:
    """Return what a fragment of a parameter holds of a site, which may be some rows of it, or None where that is nothing.

    Offset and shape of the result are those within the site.
    """
    if fragment is None or site.rows is None:
        return fragment
    low = max(fragment.offset, site.first)
    high = min(fragment.offset + fragment.numel, site.first + site.numel)
    if low >= high:
        return None
    start = fragment.start + low - fragment.offset
    return Fragment(fragment.name, fragment.flat, start, high - low, low - site.first, site.shape)


@dataclass
class ShardMap:
    """Describe all fp32 masters that this rank's optimizer steps.

    Attributes:
        flats: the tensors the inner optimizer steps, in its order.
        fragments: for each flat, this rank's fragments in it.
        members: for each flat, the weights in it, the same list on every rank, also where a rank owns no element.
        replicated: every rank holds every element (ZeRO 0), so only rank 0 contributes to sums over ranks.
        in_place: the flats are the model's parameters themselves (ZeRO 0 in fp32), so they hold images between steps.
        publish: copy the flats into the model's parameters, gathered, as DeepSpeed does after its own step.
    """

    flats: list[Tensor]
    fragments: list[list[Fragment]]
    members: list[list[str]]
    replicated: bool
    in_place: bool
    publish: Callable[[], None]


def map_shards(ds_engine) -> ShardMap:
    """Map the masters of a DeepSpeed engine whose `initialize` has returned. Raises ShardError for an unknown layout."""
    names = {id(p): name for name, p in ds_engine.module.named_parameters()}
    optimizer = ds_engine.optimizer
    try:
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            found = _map_zero3(optimizer, names)
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            found = _map_flat_partitions(
                optimizer,
                names,
                optimizer.single_partition_of_fp32_groups,
                optimizer.bit16_groups,
                optimizer.update_lp_params,
            )
        elif hasattr(optimizer, "fp32_groups_flat_partition"):
            found = _map_flat_partitions(
                optimizer,
                names,
                optimizer.fp32_groups_flat_partition,
                optimizer.bf16_groups,
                optimizer.update_lp_params,
            )
        elif hasattr(optimizer, "fp32_groups"):
            found = _map_unfused(optimizer, names)
        elif isinstance(optimizer, torch.optim.Optimizer):
            found = _map_plain(optimizer, names)
        else:
            raise ShardError(
                f"DeepSpeed optimizer {type(optimizer).__name__} is not one that weights can be quantized in"
            )
    except (AttributeError, KeyError, IndexError) as error:
        import deepspeed

        raise ShardError(
            f"DeepSpeed {deepspeed.__version__} lays out {type(optimizer).__name__} differently ({error!r}); "
            "use a version that dsquant supports (see pyproject.toml)"
        ) from error
    _check(found, ds_engine.module)
    return found


def partition(
    model: nn.Module, ds_config: dict, dtype: torch.dtype, part_of_weight: Callable[[str, int, int], Tensor]
) -> dict[str, tuple[int, Tensor]]:
    """Cut the parameters of a model as ZeRO 3 does, each rank filling its own part: no weight is ever whole.

    `part_of_weight(name, numel, part)` gives this rank's values, 1-D float32, at most `part` of them; it is called for every
    parameter in one order. Returns what a `dtype` other than float32 has rounded, name -> (offset in the weight, values): masters
    start from it. Raises ShardError for partitions that DeepSpeed keeps in a second form.
    """
    import deepspeed

    zero = ds_config["zero_optimization"]
    if zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("zero_quantized_weights"):
        raise ShardError(
            "zero_hpz_partition_size and zero_quantized_weights are not supported; remove them from the ds_config"
        )
    if not deepspeed.comm.is_initialized():  # it would take the world for one rank
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    cutter, found = deepspeed.zero.Init(config_dict_or_path=ds_config, dtype=dtype), {}
    for name, p in model.named_parameters():
        p.data = torch.empty(p.shape, dtype=dtype, device=cutter.local_device)
        try:
            cutter._convert_to_deepspeed_param(p)
            p.partition()
            mine, rank = p.ds_tensor, p.ds_zero_partition_rank
        except AttributeError as error:
            raise ShardError(
                f"DeepSpeed {deepspeed.__version__} partitions parameters differently ({error!r})"
            ) from error
        values = part_of_weight(name, p.ds_numel, mine.numel())
        mine.zero_()[: values.numel()].copy_(values)
        if dtype is not torch.float32:
            found[name] = rank * mine.numel(), values
    return found


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole weight, also where ZeRO 3 has partitioned it away."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _map_plain(optimizer, names) -> ShardMap:
    """ZeRO 0 in fp32: the optimizer steps the parameters themselves."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    fragments = [[Fragment(names[id(p)], p, 0, p.numel(), 0, tuple(p.shape))] for p in params]
    return ShardMap(params, fragments, [[names[id(p)]] for p in params], True, True, lambda: None)


def _map_unfused(optimizer, names) -> ShardMap:
    """ZeRO 0 in bf16: one fp32 tensor a parameter, replicated."""
    lows = [p for group in optimizer.fp16_groups for p in group]
    highs = [p for group in optimizer.fp32_groups for p in group]
    fragments = [
        [Fragment(names[id(low)], high, 0, high.numel(), 0, tuple(low.shape))]
        for low, high in zip(lows, highs, strict=True)
    ]

    def publish() -> None:
        for low, high in zip(lows, highs, strict=True):
            low.data.copy_(high.data)

    return ShardMap(highs, fragments, [[names[id(low)]] for low in lows], True, False, publish)


def _map_flat_partitions(optimizer, names, flats, groups, publish) -> ShardMap:
    """ZeRO 1 and 2 (and BF16_Optimizer): a group's parameters, concatenated, are cut into equal parts over the ranks."""
    fragments = []
    for flat, params in zip(flats, groups, strict=True):
        found = []
        for p in params:
            mapping = p._hp_mapping
            if mapping is not None:  # None: no element of it lives on this rank
                high, low = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                found.append(Fragment(names[id(p)], flat, high.start, high.numel, low.start, tuple(p.shape)))
        fragments.append(found)
    members = [[names[id(p)] for p in params] for params in groups]
    return ShardMap(list(flats), fragments, members, False, False, publish)


def _map_zero3(optimizer, names) -> ShardMap:
    """ZeRO 3: each weight is cut over the ranks; a sub-group's cuts lie one after another in a flat."""
    flats = optimizer.fp32_partitioned_groups_flat
    for index, (flat, low) in enumerate(zip(flats, optimizer.fp16_partitioned_groups_flat, strict=True)):
        if low is None or flat.numel() == 0:
            raise ShardError("masters or parameters on NVMe cannot be quantized; offload to cpu instead")
        if flat.data_ptr() == low.data_ptr():  # an alias would put latents where the image must stay
            flats[index] = flat.detach().clone().requires_grad_(True)
            flats[index].ds_id = flat.ds_id
    rank = dist.get_rank(group=optimizer.dp_process_group)
    fragments, members = [[] for _ in flats], [[] for _ in flats]
    for group_params in optimizer.fp16_groups:
        for p in group_params:
            group, start, part = optimizer.grad_position[optimizer.get_param_id(p)]
            members[group].append(names[id(p)])
            mine = max(0, min(part, p.ds_numel - rank * part))  # the tail of the last ranks is padding
            if mine:
                fragments[group].append(Fragment(names[id(p)], flats[group], start, mine, rank * part, full_shape(p)))

    # Looked up here, so that a DeepSpeed that moved them is noticed before the first step.
    partition_all, reassign = (
        optimizer._partition_all_parameters,
        optimizer._reassign_or_swap_out_partitioned_parameters,
    )
    persistent = optimizer.persistent_parameters

    def publish() -> None:
        partition_all()  # as its step does: parameters that are whole already would not be gathered
        for index in range(len(flats)):
            reassign(index)
        if persistent:
            persistent[0].all_gather(persistent)

    return ShardMap(flats, fragments, members, False, False, publish)


def _check(found: ShardMap, model: nn.Module) -> None:
    """Raise ShardError unless the masters are float32 and every trainable parameter is in exactly one flat."""
    for flat in found.flats:
        if flat.dtype is not torch.float32:
            raise ShardError(
                f"masters are {flat.dtype}; codes are decided on float32 masters (bf16_master_weights must be off)"
            )
    listed = sorted(name for names in found.members for name in names)
    wanted = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    if listed != wanted:
        odd = sorted(set(listed) ^ set(wanted)) or listed
        raise ShardError(f"the optimizer does not step each trainable parameter once; first odd one: {odd[0]}")
