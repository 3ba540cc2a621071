"""Training with the product of q and k weights quantized (QKR) is that of its formulas, on shards of two ranks too."""

import pytest
import torch

from dsquant.checkpoint import Checkpoint, load_float, load_model
from dsquant.convert import pack_checkpoint
from dsquant.export import load_packed, read_packed
from tests import ranks
from tests.shard.method_runs import STEPS, batch
from tests.shard.reparam_runs import CASES, HEADS, QKV, WIDTH, WRITTEN_OUT, Oracle

PRODUCT = "blocks.0.attn.qk.weight"
HANDFUL = 3  # codes of 2560 that a different order of summation may flip
ENV = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module", params=[0, 1, 3], ids=lambda zero: f"zero{zero}")
def runs(request, tmp_path_factory):
    """Return what every case found on each of two ranks."""
    folder = tmp_path_factory.mktemp("reparam") / "ranks"
    kwargs = {"zero": request.param, "cases": list(CASES)}
    return ranks.launch(2, "tests.shard.reparam_runs:run_cases", kwargs, folder, 400, ENV)


@pytest.fixture(scope="module")
def oracles():
    """Return `oracle(case)`: trained to the end, once."""
    made = {}

    def oracle(case):
        if case not in made:
            made[case] = Oracle(case)
            for step in range(STEPS):
                made[case].step(*batch(step))
        return made[case]

    return oracle


def whole(parts, name):
    """Put the fragments of a weight on all ranks together: every element is there once, or on every rank (ZeRO 0)."""
    found = sorted((part[name] for part in parts if name in part), key=lambda fragment: fragment[0])
    if len(found) > 1 and found[0][0] == found[1][0]:
        assert torch.equal(found[0][1], found[1][1])
        found = found[:1]
    edges = [0]
    for offset, values in found:
        assert offset == edges[-1]
        edges.append(offset + values.numel())
    return torch.cat([values for _, values in found])


@pytest.mark.parametrize("case", WRITTEN_OUT)
def test_losses_and_logits_are_those_of_the_formulas_in_the_forward_pass(runs, oracles, case):
    found, wanted = torch.tensor([run[case]["losses"] for run in runs]).mean(0), torch.tensor(oracles(case).losses)
    assert (found - wanted).abs().max() < 1e-4
    assert (wanted - wanted[0]).abs().max() > 0.05  # a model that did not train would agree as well
    with torch.no_grad():
        logits = oracles(case).logits(batch(99)[0])
    for run in runs:
        assert torch.equal(run[case]["logits"], runs[0][case]["logits"])
    torch.testing.assert_close(runs[0][case]["logits"], logits, rtol=0, atol=2e-3)


@pytest.mark.parametrize("case", WRITTEN_OUT)
def test_latents_and_codes_are_those_of_the_oracle_those_of_q_and_k_rows_included(runs, oracles, case):
    oracle, flipped = oracles(case), 0
    for name, weight in oracle.latents.items():
        latent = whole([run[case]["latents"] for run in runs], name).view(weight.shape)
        torch.testing.assert_close(latent, weight.detach(), rtol=0, atol=1e-4)
        part = weight.detach()[oracle.rows[name]]
        codes = whole([run[case]["codes"] for run in runs], name)
        assert codes.numel() == part.numel()
        flipped += int((codes.view(part.shape) != oracle.fakes[name].codes(part)).sum())
    assert flipped <= HANDFUL


def test_every_parameter_moves_but_for_biases_of_q_and_k(runs):
    """Those have no part and a gradient of zero; they are no unused parameters, and keep every bit."""
    from tests.shard.method_runs import float_model

    for name, before in float_model().named_parameters():
        after = whole([run["statsq"]["latents"] for run in runs], name).view(before.shape)
        if name == "blocks.0.attn.qkv.bias":
            assert torch.equal(after[: 2 * WIDTH], before[: 2 * WIDTH].detach())
            after, before = after[2 * WIDTH :], before[2 * WIDTH :]
        assert not torch.equal(after, before.detach()), name
        if name == QKV:
            assert all(
                (after[i * WIDTH : (i + 1) * WIDTH] != before[i * WIDTH : (i + 1) * WIDTH]).any() for i in range(3)
            )


def test_bits_of_the_product_follow_the_rule_for_its_name(runs):
    found = [torch.tensor(runs[0][case]["losses"]) for case in ("statsq", "four bits a head")]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("zero", [1, 3])
def test_a_restored_run_goes_on_bit_for_bit_and_its_checkpoint_packs_to_the_same_logits(run_ranks, tmp_path, zero):
    cases = ["statsq", "bwn", "cga", "activations too"]
    found = run_ranks(
        2, "tests.shard.reparam_runs:run_and_resume", timeout=400, folder=tmp_path, cases=cases, middle=STEPS // 2,
        zero=zero, env=ENV,
    )  # fmt: skip
    for case in cases:
        for rank in found:
            (losses, wanted), (resumed_losses, resumed), _ = rank[case]
            assert losses == resumed_losses, case
            assert wanted.keys() == resumed.keys()
            assert not [key for key in wanted if not torch.equal(wanted[key], resumed[key])], case
        check_what_comes_of_a_checkpoint(tmp_path / case, found[0][case][2])


def check_what_comes_of_a_checkpoint(folder, logits):
    """A teacher and a packed model give the logits that the model in training gave when the checkpoint was written."""
    (path,) = (folder / "checkpoints" / "q").iterdir()
    checkpoint, images = Checkpoint.open(path), batch(99)[0]
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(images), logits)
        pack_checkpoint(checkpoint, folder / "m.safetensors")
        for cache in (False, True):
            assert torch.equal(load_packed(folder / "m.safetensors", cache=cache)(images), logits)
    packed = read_packed(folder / "m.safetensors")
    assert packed.weights[QKV].rows == (2 * WIDTH, 3 * WIDTH)
    assert packed.products[QKV].shape == packed.codes(PRODUCT).shape == (HEADS * WIDTH, WIDTH)
    assert QKV not in packed.names  # neither latents of q and k, nor floats of v, are shipped
    latents = load_float(checkpoint).state_dict()[QKV].double()
    q, k = (latents[i * WIDTH : (i + 1) * WIDTH].view(HEADS, -1, WIDTH) for i in range(2))
    exact = (q.transpose(1, 2) @ k).view(-1, WIDTH)
    if (
        packed.products[QKV].spec.method == "statsq"
    ):  # mid-rise, a step a row: no image is further away than half a step
        step = packed.tensor(f"{PRODUCT}_scale").view(-1, 1).double()
        inside = exact.abs() < 2 * step
        assert inside.double().mean() > 0.5
        assert ((packed.image(PRODUCT).double() - exact).abs() <= 0.50001 * step)[inside].all()
