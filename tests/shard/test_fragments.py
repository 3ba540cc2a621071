"""The map of ZeRO's shards is whole and true on every stage, and a DeepSpeed that moved its internals is noticed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsquant.errors import ShardError
from dsquant.shard.fragments import map_shards
from tests import ranks

# Odd sizes, so that ZeRO 1 and 2 cut weights in the middle and ZeRO 3 pads them; one weight has fewer elements than ranks.
SHAPES = {"conv": (5, 3, 2, 2), "wide": (7, 13), "tall": (31, 3), "vector": (17,), "one": (1,)}
NUMELS = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
LR = 0.5
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
# Below the threshold ZeRO 3 keeps a weight whole on every rank; sub-groups make several flats.
ZERO3 = {"stage": 3, "sub_group_size": 30, "memory_efficient_linear": False}
PARTED, PERSISTENT = {"stage3_param_persistence_threshold": 0}, {"stage3_param_persistence_threshold": 80}
BF16 = {"bf16": {"enabled": True}}
CASES = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": ZERO3 | PARTED},
    "zero3 persistent": {"zero_optimization": ZERO3 | PERSISTENT},
    "zero2 offload": {"zero_optimization": {"stage": 2} | OFFLOAD, "zero_force_ds_cpu_optimizer": False},
    "zero3 offload": {"zero_optimization": ZERO3 | PARTED | OFFLOAD, "zero_force_ds_cpu_optimizer": False},
    "bf16 zero0": {"zero_optimization": {"stage": 0}} | BF16,
    "bf16 zero1": {"zero_optimization": {"stage": 1}} | BF16,
    "bf16 zero2": {"zero_optimization": {"stage": 2}} | BF16,
    "bf16 zero3": {"zero_optimization": ZERO3 | PERSISTENT} | BF16,
    "bf16 zero1 fp32 sums": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}} | BF16,
}
REPLICATED, IN_PLACE = {"zero0", "bf16 zero0"}, {"zero0"}


def values(name, salt):
    """Return numbers for a weight that bfloat16 holds exactly, so that every claim below is one of equality."""
    generator = torch.Generator().manual_seed(1000 * salt + list(SHAPES).index(name))
    return torch.randint(-32, 32, SHAPES[name], generator=generator) / 16


class Held(nn.Module):
    """Hold one weight; the gradient of its output with respect to it is `values(name, 2)`."""

    def __init__(self, name):
        super().__init__()
        self.weight = nn.Parameter(values(name, 1))
        self.register_buffer("slope", values(name, 2))

    def forward(self, x):
        return x * (self.weight * self.slope).sum()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name in SHAPES:
            self.add_module(name, Held(name))

    def forward(self, x):
        return sum(held(x) for held in self.children())


def start(config):
    """Return a DeepSpeed engine over two parameter groups, stepped by plain SGD."""
    import deepspeed

    model = Model()
    groups = [[p for p in model.parameters() if (p.ndim < 2) is few] for few in (False, True)]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=LR)
    owned = {"train_batch_size": dist.get_world_size(), "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config | owned, dist_init_required=False)[0]


def gathered(engine):
    """Return every parameter of the model, whole, float32."""
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
        return {
            name.removesuffix(".weight"): p.detach().float().clone() for name, p in engine.module.named_parameters()
        }


def facts(shards):
    """Return (weight, flat, start, numel, offset, shape, values) of every fragment."""
    return [
        (f.name.removesuffix(".weight"), index, f.start, f.numel, f.offset, f.shape, f.values.detach().clone())
        for index, fragments in enumerate(shards.fragments)
        for f in fragments
    ]


def map_publish_and_step(cases):
    """On one rank, for every case: the map, the parameters once new masters are published, and all after a step."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    found = {}
    for case, config in cases.items():
        engine = start(config)
        shards = map_shards(engine)
        seen = {
            "optimizer": type(engine.optimizer).__name__,
            "replicated": shards.replicated,
            "in_place": shards.in_place,
            "members": [[name.removesuffix(".weight") for name in names] for names in shards.members],
            "flats": [flat.numel() for flat in shards.flats],
            "fragments": facts(shards),
        }
        for salt in (4, 3):  # twice: parameters that are gathered already have to follow as well
            for f in (f for fragments in shards.fragments for f in fragments):
                f.values.copy_(values(f.name.removesuffix(".weight"), salt).view(-1)[f.offset : f.offset + f.numel])
            shards.publish()
        seen["published"] = gathered(engine)
        engine.backward(engine(torch.ones((), dtype=torch.bfloat16 if "bf16" in config else torch.float32)))
        engine.step()
        seen["stepped fragments"], seen["stepped"] = facts(shards), gathered(engine)
        found[case] = seen
        engine.destroy()
    return found


@pytest.fixture(scope="module", params=[2, 3])
def layouts(request, tmp_path_factory):
    """Return what `map_publish_and_step` saw on every rank of two or three."""
    folder = tmp_path_factory.mktemp("fragments") / "ranks"
    target, kwargs = "tests.shard.test_fragments:map_publish_and_step", {"cases": CASES}
    return ranks.launch(request.param, target, kwargs, folder, 300, {"DS_ACCELERATOR": "cpu"})


def test_the_cases_reach_every_layout_of_deepspeed(layouts):
    kinds = {case: layouts[0][case]["optimizer"] for case in CASES}
    assert kinds["zero0"] == "SGD"
    assert kinds["bf16 zero1 fp32 sums"] == "BF16_Optimizer"
    assert kinds["zero1"] == kinds["zero2"] == kinds["zero2 offload"] == kinds["bf16 zero2"] == "DeepSpeedZeroOptimizer"
    assert kinds["zero3"] == kinds["zero3 offload"] == kinds["bf16 zero3"] == "DeepSpeedZeroOptimizer_Stage3"
    assert len({kinds[case] for case in CASES}) >= 5  # ZeRO 0 in bf16 has one of its own
    assert len(layouts[0]["zero3"]["flats"]) > 2


@pytest.mark.parametrize("case", CASES)
def test_every_element_of_every_weight_is_in_one_fragment(layouts, case):
    """Once over all ranks, or once on every rank where masters are replicated."""
    per_rank = [rank[case] for rank in layouts]
    assert {seen["replicated"] for seen in per_rank} == {case in REPLICATED}
    assert {seen["in_place"] for seen in per_rank} == {case in IN_PLACE}
    for together in [[seen] for seen in per_rank] if case in REPLICATED else [per_rank]:
        count = {name: torch.zeros(numel, dtype=torch.int64) for name, numel in NUMELS.items()}
        for name, _, _, numel, offset, shape, _ in (f for seen in together for f in seen["fragments"]):
            assert shape == SHAPES[name]
            assert numel > 0
            assert offset + numel <= NUMELS[name]
            count[name][offset : offset + numel] += 1
        assert all(bool((c == 1).all()) for c in count.values()), count


@pytest.mark.parametrize("case", CASES)
def test_a_fragment_holds_the_slice_of_the_weight_that_it_names(layouts, case):
    for rank in layouts:
        for name, _, _, numel, offset, _, held in rank[case]["fragments"]:
            assert held.dtype is torch.float32
            assert torch.equal(held, values(name, 1).view(-1)[offset : offset + numel]), name


@pytest.mark.parametrize("case", CASES)
def test_fragments_of_a_flat_do_not_overlap_and_members_agree_on_every_rank(layouts, case):
    for rank in layouts:
        assert rank[case]["members"] == layouts[0][case]["members"]
        assert sorted(name for names in rank[case]["members"] for name in names) == sorted(SHAPES)
        taken = [torch.zeros(numel, dtype=torch.int64) for numel in rank[case]["flats"]]
        for name, flat, begin, numel, *_ in rank[case]["fragments"]:
            assert name in rank[case]["members"][flat]
            assert begin + numel <= taken[flat].numel()
            taken[flat][begin : begin + numel] += 1
        assert all(int(t.max()) <= 1 for t in taken if t.numel())


@pytest.mark.parametrize("case", CASES)
def test_published_masters_are_the_parameters_of_the_model_on_every_rank(layouts, case):
    for rank in layouts:
        for name, parameter in rank[case]["published"].items():
            assert torch.equal(parameter, values(name, 3)), name


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_steps_the_mapped_masters_and_gathers_them(layouts, case):
    """After SGD on a known gradient, fragments and parameters are those that plain arithmetic gives."""
    world = len(layouts)
    for rank in layouts:
        expected = {name: values(name, 3) - LR * values(name, 2) for name in SHAPES}
        for name, _, _, numel, offset, _, held in rank[case]["stepped fragments"]:
            wanted = expected[name].view(-1)[offset : offset + numel]
            # The mean of a gradient over three ranks is rounded; over two it is exact, also in bfloat16.
            torch.testing.assert_close(held, wanted, rtol=0, atol=0 if world == 2 else 0.02)
        for name, parameter in rank[case]["stepped"].items():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0 if world == 2 else 0.03)


@pytest.mark.parametrize("case", ["zero1", "zero3"])
def test_some_weight_is_cut_in_the_middle_and_some_rank_lacks_some_weight(layouts, case):
    found = [f for rank in layouts for f in rank[case]["fragments"]]
    assert any(offset > 0 for _, _, _, _, offset, _, _ in found)
    assert any({f[0] for f in rank[case]["fragments"]} != set(SHAPES) for rank in layouts)


MOVED = {
    "zero1": ["update_lp_params", "bit16_groups", "_hp_mapping"],
    "zero3": [
        "grad_position",
        "fp16_partitioned_groups_flat",
        "persistent_parameters",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ],
    "bf16 zero1 fp32 sums": ["bf16_groups", "update_lp_params"],
    "bf16 zero0": ["fp16_groups"],
}


def map_without(cases, moved):
    """Return, for every case and attribute, the message of the ShardError (or what else came) once it is gone."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    messages = {"version": deepspeed.__version__}
    for case, attributes in moved.items():
        for attribute in attributes:
            engine = start(cases[case])
            hide(engine, attribute)
            try:
                messages[case, attribute] = f"mapped {map_shards(engine).members}"
            except ShardError as error:
                messages[case, attribute] = str(error)
    return messages


def hide(engine, attribute):
    """Take an attribute away from the optimizer, or from the parameters where it is theirs."""
    if attribute == "_hp_mapping":
        for p in engine.module.parameters():
            del p._hp_mapping
        return

    class Moved(type(engine.optimizer)):
        def __getattribute__(self, name):
            if name == attribute:
                raise AttributeError(f"no attribute {name!r}")
            return super().__getattribute__(name)

    engine.optimizer.__class__ = Moved


def test_a_moved_internal_is_an_error_that_names_the_deepspeed_version(run_ranks):
    (messages,) = run_ranks(
        1, "tests.shard.test_fragments:map_without", cases=CASES, moved=MOVED, env={"DS_ACCELERATOR": "cpu"}
    )
    version = messages.pop("version")
    assert len(messages) == sum(map(len, MOVED.values()))
    for (case, attribute), message in messages.items():
        assert f"DeepSpeed {version}" in message, (case, attribute, message)
        assert attribute in message, (case, attribute, message)
