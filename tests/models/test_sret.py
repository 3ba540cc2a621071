"""SReT: its architecture, that evaluation repeats itself, and its sites against a forward pass written out group by group."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from dsquant.config import ModelConfig, QuantConfig
from dsquant.errors import CheckpointError, ConfigError
from dsquant.export import load_packed, write_packed
from dsquant.models import build_model, describe, insert_sites
from dsquant.quant.calibrate import calibrate
from dsquant.quant.state import QuantState
from dsquant.spec import Grouping
from tests.export.conftest import DATA, expected_codes, expected_image

SIZE, CLASSES = 64, 5  # maps of 8 x 8, then 4 x 4
SMALL = {"img_size": SIZE, "head_dim": 8, "depths": [4, 2], "recursions": [2, 1], "heads": [2, 4], "slices": [4, 1],
         "groups": [2, 1], "drop_path_rate": 0.0}  # fmt: skip
EIGHT = [{"match": match, "n_bits": 8} for match in ("patch_embed.*", "pools.*", "head*")]
BLOCKS = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"]
PROJECTIONS = [f"stages.0.non_projs.{i}" for i in range(4)] + [f"stages.1.non_projs.{i}" for i in range(2)]


def small_sret(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = build_model(ModelConfig(name="sret_tiny", num_classes=CLASSES, kwargs={**SMALL, **kwargs}))
    for name, p in model.named_parameters():  # a trained model's coefficients are no ones, its biases no zeros
        norm = name.endswith("weight") and (".bn" in name or "norm" in name)
        torch.nn.init.trunc_normal_(p, mean=float(norm or "coefficient" in name), std=0.15)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = None  # take the statistics of these images alone, as a trained model's are of its images
    with torch.no_grad():
        model.train()(images())
    return model


def config(*rules):
    return QuantConfig(weight={"n_bits": 2}, activation={"n_bits": 2}, rules=[*EIGHT, *rules])


def images(count=4):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def bound(*rules):
    """Return a calibrated model in evaluation mode, its sites and their state."""
    model = small_sret().eval()
    sites = insert_sites(model, config(*rules).policy())
    state = QuantState(sites.weights, sites.activations)
    with torch.no_grad():
        calibrate(sites.quantizers, state, model, [images()], 2, lambda: sites.bind(state))
    return model, sites, state


def test_sret_tiny_has_the_parameters_of_the_paper_and_the_quantizers_of_the_method():
    with torch.device("meta"):
        model = timm.create_model("sret_tiny")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 4.8
    sites = insert_sites(model, config().policy())
    assert sum(s.grouping.n_groups for s in sites.weights) == 106
    assert len(sites.activations) == 126


def test_each_site_has_the_sign_offset_and_bits_of_the_method_table():
    model = small_sret()
    sites = insert_sites(model, config().policy())
    found = {s.name: (s.spec.n_bits, s.spec.signed, s.spec.offset) for s in sites.activations}
    expected = {f"{name}.input": (8, True, False) for name in ("patch_embed.conv1", "pools.0", "head")}
    expected |= {f"patch_embed.{conv}.input": (8, False, False) for conv in ("conv2", "conv3")}
    for block in BLOCKS:
        parts = ("attn.qkv.input", "attn.q", "attn.k", "attn.v", "attn.proj.input")
        expected |= {f"{block}.{part}": (2, True, False) for part in parts}
        expected[f"{block}.attn.probs"] = (2, False, False)
    for name in BLOCKS + PROJECTIONS:
        expected |= {f"{name}.mlp.fc1.input": (2, True, False), f"{name}.mlp.fc2.input": (2, False, True)}
    assert found == expected
    bits = {s.name: s.spec.n_bits for s in sites.weights}
    eight = {"patch_embed.conv1.weight", "patch_embed.conv2.weight", "patch_embed.conv3.weight", "pools.0.weight",
             "head.weight"}  # fmt: skip
    assert {name for name, n in bits.items() if n == 8} == eight
    assert len(bits) == len(eight) + 4 * len(BLOCKS) + 2 * len(PROJECTIONS)
    groupings = {s.name: (s.shape, s.grouping) for s in sites.weights}
    assert groupings["stages.0.blocks.1.attn.qkv.weight"] == ((48, 16), Grouping(3, 16 * 16))
    assert groupings["pools.0.weight"][0] == (32, 1, 3, 3)  # depthwise: a filter sees one channel of 16
    assert len(describe(model).splitlines()) == 1 + len(bits) + len(found)


def test_evaluation_repeats_itself_and_training_is_random_by_torchs_generator_alone():
    model, x = small_sret(), images()
    with torch.no_grad():
        model.eval()
        expected = model(x)
        assert all(torch.equal(model(x), expected) for _ in range(3))
        assert torch.equal(model(x.flip(0)).flip(0), expected)
        for module in model.modules():  # without BatchNorm's batch statistics, so that only groups differ
            module.training = not isinstance(module, torch.nn.BatchNorm2d) and module is not model.patch_embed
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(model(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], expected)


@pytest.mark.parametrize(("side", "groups"), [(28, 2), (28, 4), (14, 2), (8, 2)])
def test_in_evaluation_every_group_is_spread_over_the_map(side, groups):
    attention = small_sret().stages[0].blocks[0].attn.eval()
    order = attention.order(side * side, torch.device("cpu"))
    assert torch.equal(order.sort().values, torch.arange(side * side))
    row, col = order // side, order % side
    for group in range(groups):
        mine = slice(group * side * side // groups, (group + 1) * side * side // groups)
        quarter = (row[mine] >= side // 2) * 2 + (col[mine] >= side // 2)
        share = torch.bincount(quarter, minlength=4) / len(quarter)
        assert (share - 0.25).abs().max() < 0.07


class Reference:
    """Run a bound SReT in evaluation mode with a quantizer written out at each site and a loop over groups."""

    def __init__(self, model, state):
        self.model, self.state = model, state

    def quantize(self, name, x, n_bits=2, signed=True):
        s, offset = self.state.get(name), self.state.get(name, "offset")
        offset = 0.0 if offset is None else offset
        low, high = (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)
        return ((x - offset) / s).clamp(low, high).round() * s + offset

    def linear(self, name, x, **kwargs):
        module = self.model.get_submodule(name)
        return F.linear(self.quantize(f"{name}.input", x, **kwargs), module.weight, module.bias)

    def conv(self, name, x, signed=True, groups=1):
        module = self.model.get_submodule(name)
        return F.conv2d(self.quantize(f"{name}.input", x, 8, signed), module.weight, module.bias, 2, 1, groups=groups)

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)), signed=False)

    def attend(self, name, x, groups, mixed):
        n, heads = x.shape[1], self.model.get_submodule(name).num_heads
        order = sorted(range(n), key=lambda i: i * (math.sqrt(5) - 1) / 2 % 1) if mixed else list(range(n))
        out = torch.empty_like(x)
        for group in range(groups):
            rows = order[group * n // groups : (group + 1) * n // groups]
            qkv = self.linear(f"{name}.qkv", x[:, rows])
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
            q, k, v = (self.quantize(f"{name}.{part}", t) for part, t in zip("qkv", (q, k, v), strict=True))
            p = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            p = self.quantize(f"{name}.probs", p, signed=False)
            out[:, rows] = (p @ v).transpose(1, 2).flatten(2)
        return self.linear(f"{name}.proj", out)

    def block(self, name, x, time, slices, groups):
        block = self.model.get_submodule(name)
        c = [block.get_submodule(f"coefficient{i}").bias for i in range(1, 5)]
        count = slices if time == 0 else groups
        x = c[0] * x + c[1] * self.attend(f"{name}.attn", block.norm1(x), count, time > 0 and count > 1)
        return c[2] * x + c[3] * self.mlp(f"{name}.mlp", block.norm2(x))

    def projection(self, name, x):
        module = self.model.get_submodule(name)
        return module.coefficient1.bias * x + module.coefficient2.bias * self.mlp(f"{name}.mlp", module.norm1(x))

    def logits(self, x):
        for i, signed in ((1, True), (2, False), (3, False)):
            norm = self.model.patch_embed.get_submodule(f"bn{i}")
            x = self.conv(f"patch_embed.conv{i}", x, signed)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
        x = (x + self.model.pos_embed).flatten(2).transpose(1, 2)
        for turn in range(4):
            x = self.block(f"stages.0.blocks.{turn // 2}", x, turn % 2, 4, 2)
            x = self.projection(f"stages.0.non_projs.{turn}", x)
        x = self.conv("pools.0", x.transpose(1, 2).unflatten(2, (8, 8)), groups=16).flatten(2).transpose(1, 2)
        for turn in range(2):
            x = self.block("stages.1.blocks.0", x, turn, 1, 1)
            x = self.projection(f"stages.1.non_projs.{turn}", x)
        return self.linear("head", self.model.norm(x.mean(1)), n_bits=8)


def test_once_bound_the_logits_are_those_of_a_quantizer_written_out_at_each_site():
    model, _, state = bound()
    with torch.no_grad():
        found, expected = model(images(5)), Reference(model, state).logits(images(5))
    apart = (found - expected).abs().amax(1)
    assert (apart < 1e-4).sum() >= 4, apart  # sums are ordered differently: a code on an edge may fall otherwise
    assert found.std(dim=0).min() > 0.01


def test_insertion_renames_nothing_and_leaves_the_float_logits_as_they_were():
    model = small_sret().eval()
    with torch.no_grad():
        expected, names = model(images()), list(model.state_dict())
        sites = insert_sites(model, config().policy())
        assert torch.equal(model(images()), expected)
        seen = []
        for site, quantizer in sites.quantizers.items():
            quantizer.observer = lambda x, site=site: seen.append(site)
        torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    assert {s: seen.count(s) for s in sites.quantizers} == {s: 2 if ".blocks." in s else 1 for s in sites.quantizers}
    later = small_sret(seed=4).state_dict()
    model.load_state_dict(later, strict=True)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in later.items())


def test_once_bound_every_parameter_and_every_activation_scale_gets_a_gradient():
    model, _, state = bound()
    model.train()(images()).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    grads = {key: state.grads[e.slice] for key, e in state.entries.items() if e.start < state.n_activation}
    assert not [key for key, grad in grads.items() if not bool((grad.abs() > 0).all() and grad.isfinite().all())]


def test_recomputed_blocks_draw_the_same_groups_and_give_the_same_gradients():
    model, _, _ = bound()
    grads = []
    for recompute in (False, True):
        model.train().set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(5)
        model(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_groups_of_two_sizes_take_per_head_scales_and_no_per_token_ones():
    rules = [{"match": f"*.attn.{part}", "granularity": "per_head"} for part in ("q", "k", "v", "probs")]
    model, sites, state = bound(*rules)
    model(images()).square().sum().backward()
    groups = {s.name: s.n_groups for s in sites.activations}
    assert [groups[f"{block}.attn.probs"] for block in BLOCKS] == [2, 2, 4]
    assert bool((state.grads[: state.n_activation].abs() > 0).all())
    with pytest.raises(ConfigError, match=r"stages\.0\.blocks\.0\.attn\.q has no per_token"):
        insert_sites(small_sret(), config({"match": "*.attn.q", "granularity": "per_token"}).policy())
    bound(
        {"match": "*.attn.*.input", "granularity": "per_token"},
        {"match": "stages.1.*.probs", "granularity": "per_token"},
    )


def authors_names(weights):
    """Name a state dict as the authors' code does: a block once for each application, projections in between."""
    found = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "pools":
            name = ".".join([*parts[:2], "conv", parts[2]])
        if parts[0] != "stages":
            found[name] = tensor
            continue
        stage, kind, number = parts[1:4]
        at = [2 * int(number) + 1] if kind == "non_projs" else [4 * int(number), 4 * int(number) + 2]
        found |= {".".join(["transformers", stage, "blocks", str(i), *parts[4:]]): tensor for i in at}
    return found


def test_a_checkpoint_of_the_authors_loads_strictly(tmp_path):
    upstream, path = small_sret(seed=3), str(tmp_path / "authors.pth")
    weights = authors_names(upstream.state_dict())
    assert "transformers.0.blocks.6.attn.qkv.weight" in weights
    torch.save({"model": weights}, path)
    wanted = ModelConfig(name="sret_tiny", num_classes=CLASSES, kwargs=SMALL, checkpoint=path)
    model = build_model(wanted)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), upstream.state_dict().values(), strict=True)
    )
    faults = {
        "differs from the same weight": {"transformers.0.blocks.2.mlp.fc1.bias": torch.zeros(57)},
        r"1 tensors this model lacks, first stages\.2": {"transformers.2.blocks.0.norm1.bias": torch.zeros(8)},
    }
    for said, changed in faults.items():
        torch.save({"model": weights | changed}, path)
        with pytest.raises(CheckpointError, match=said):
            build_model(wanted)


def test_a_packed_model_gives_the_logits_of_the_model_it_was_written_from(tmp_path):
    model, sites, state = bound()
    latents = {key: p.detach().clone() for key, p in model.named_parameters()}
    for site in sites.weights:
        state.get(site.name).fill_(latents[site.name].abs().mean())
        codes = expected_codes(latents[site.name], state.get(site.name), site)
        model.get_parameter(site.name).data.copy_(expected_image(codes, state.get(site.name), site))
    sites.bind_images(model, state)
    write_packed(
        tmp_path / "m.safetensors",
        latents=latents,
        buffers={key: t for key, t in model.state_dict().items() if key not in latents},
        weight_sites=sites.weights,
        activation_sites=sites.activations,
        scales={key: state.get(entry.name, entry.role) for key, entry in state.entries.items()},
        model=ModelConfig(name="sret_tiny", num_classes=CLASSES, kwargs=SMALL),
        quant=config(),
        data=DATA,
    )
    with torch.no_grad():
        expected = model(images())
    assert torch.equal(load_packed(tmp_path / "m.safetensors")(images()), expected)
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"slices": [5, 1]}, "5 groups do not divide 64 tokens"),
        ({"heads": [2, 3]}, r"heads \(2, 3\): those of a stage do not divide"),
        ({"recursions": [3, 1]}, "3 blocks do not divide a depth of 4"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate must be 0"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(kwargs, said):
    with pytest.raises(ConfigError, match=said):
        insert_sites(small_sret(**kwargs), config().policy())


def test_weights_that_nobody_serves_are_an_error_that_says_what_to_set():
    with pytest.raises(ConfigError, match=r"set model\.checkpoint"):
        build_model(ModelConfig(name="sret_tiny", num_classes=CLASSES, pretrained=True))
