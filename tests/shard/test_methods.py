"""On shards of two ranks every weight method and cure of oscillation trains as its formulas in the forward pass do."""

from itertools import pairwise

import pytest
import torch

from dsquant.checkpoint import Checkpoint, load_model
from dsquant.convert import pack_checkpoint
from dsquant.export import read_packed
from tests import ranks
from tests.shard.method_oracle import Trainer
from tests.shard.method_runs import CASES, LR, STEPS, WEIGHT_DECAY, batch, float_model, quant_of

ZERO_STAGES = [1, 3]
REGULARIZED = [case for case, quant in CASES.items() if "obr" in quant or "dampening" in quant.get("oscillation", {})]
HELD = [case for case, quant in CASES.items() if "cga" in quant.get("oscillation", {})]
HANDFUL = 3  # codes of 3072 that a different order of summation may flip
ENV = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module", params=ZERO_STAGES, ids=lambda zero: f"zero{zero}")
def runs(request, tmp_path_factory):
    """Return what every case found on each of two ranks."""
    folder = tmp_path_factory.mktemp("methods") / "ranks"
    kwargs = {"zero": request.param, "cases": list(CASES)}
    return ranks.launch(2, "tests.shard.method_runs:run_cases", kwargs, folder, 300, ENV)


@pytest.fixture(scope="module")
def oracles():
    """Return `oracle(case)`: its trainer after all steps; each is trained once."""
    made = {}

    def oracle(case):
        if case not in made:
            trainer = Trainer(float_model().train(), quant_of(case), lr=LR, weight_decay=WEIGHT_DECAY)
            for step in range(STEPS):
                trainer.step(*batch(step), step / STEPS)
            made[case] = trainer
        return made[case]

    return oracle


def whole(parts, name):
    """Put the fragments of a weight on all ranks together; every element is there once."""
    found = sorted((part[name] for part in parts if name in part), key=lambda fragment: fragment[0])
    edges = [0]
    for offset, values in found:
        assert offset == edges[-1]
        edges.append(offset + values.numel())
    return torch.cat([values for _, values in found])


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_formulas_in_the_forward_pass(runs, oracles, case):
    found = torch.tensor([run[case]["losses"] for run in runs]).mean(0)
    wanted = torch.tensor(oracles(case).losses)
    assert (found - wanted).abs().max() < 1e-4
    assert (wanted - wanted[0]).abs().max() > 0.05  # a model that did not train would agree as well


@pytest.mark.parametrize("case", CASES)
def test_latents_codes_and_scales_are_those_of_the_oracle(runs, oracles, case):
    trainer, flipped, total = oracles(case), 0, 0
    for name, weight in trainer.latents.items():
        fake, per_rank = trainer.fakes[name], [run[case] for run in runs]
        latent = whole([rank["latents"][-1] for rank in per_rank], name).view(weight.shape)
        torch.testing.assert_close(latent, weight.detach(), rtol=0, atol=1e-4)
        codes = whole([rank["codes"] for rank in per_rank], name).view(weight.shape)
        flipped += int((codes != fake.codes(weight)).sum())
        total += codes.numel()
        scale = fake.decide(weight)[1].view(-1)
        assert torch.equal(per_rank[0]["scales"][f"{name}:scale"], per_rank[1]["scales"][f"{name}:scale"])
        torch.testing.assert_close(per_rank[0]["scales"][f"{name}:scale"], scale, rtol=1e-4, atol=0)
    assert total == 3072
    assert flipped <= HANDFUL


def test_ranks_own_different_parts_of_weights_whose_groups_span_both(runs):
    """Statistics of a scale group must have crossed ranks: the group's elements lie on both."""
    latents = [run["bwn"]["latents"][-1] for run in runs]
    shared = [name for name in latents[0].keys() & latents[1].keys() if latents[0][name][0] != latents[1][name][0]]
    assert shared


def test_ranks_add_up_the_bins_of_weights_whose_groups_span_both_and_of_no_others(runs):
    """Under ZeRO 3, too, which cuts every weight; and all ranks know which these are."""
    ours, theirs = (run["obr by channel"]["apart"] for run in runs)
    assert ours == theirs
    latents = [run["obr by channel"]["latents"][-1] for run in runs]
    cols = {name: parameter.shape[-1] for name, parameter in float_model().named_parameters()}
    cut = {name for of in latents for name, (at, part) in of.items() if at % cols[name] or part.numel() % cols[name]}
    assert ours == (latents[0].keys() | latents[1].keys()) - cut
    assert runs[0]["obr"]["apart"] == latents[0].keys() ^ latents[1].keys()  # one scale a weight


@pytest.mark.parametrize("method", ["seq", "ternary", "elastic", "statsq", "bwn", "mdq", "lsq_plus"])
def test_each_method_is_seen_in_the_losses(runs, oracles, method):
    """Were a method ignored, its losses would be those of plain LSQ, which are further away than any tolerance here."""
    found = torch.tensor([run[method]["losses"] for run in runs]).mean(0)
    assert (found - torch.tensor(oracles("lsq").losses)).abs().max() > 1e-3


@pytest.mark.parametrize("case", REGULARIZED)
def test_the_ratio_is_that_of_the_norms_of_both_gradients(runs, oracles, case):
    for name, wanted in oracles(case).ratios.items():
        assert wanted > 1e-4
        for run in runs:
            assert run[case]["ratios"][name] == pytest.approx(wanted, rel=1e-3)


def test_without_a_regularizer_there_is_no_ratio(runs):
    assert set(runs[0]["lsq"]["ratios"].values()) == {None}


def test_weights_freeze_at_the_levels_of_the_oracle(runs, oracles):
    trainer, frozen = oracles("freezing"), 0
    for name, freezing in trainer.freezing.items():
        found = whole([run["freezing"]["frozen"] for run in runs], name)
        assert torch.equal(found, trainer.fakes[name].frozen.view(-1))
        assert freezing.level.view(-1)[found].frac().abs().eq(0.5).all()
        frozen += int(found.sum())
    assert 10 < frozen < 1500


@pytest.mark.parametrize("case", HELD)
def test_only_weights_near_a_boundary_move_and_all_others_keep_every_bit(runs, case):
    """Also those that moved before: neither their momentum nor weight decay reaches them once they are held."""
    oracle = Trainer(float_model(), quant_of(case), lr=LR, weight_decay=WEIGHT_DECAY)
    reach, moved_before = quant_of(case)["oscillation"]["cga"]["boundary_range"], 0
    for name, weight in oracle.latents.items():
        fake, before = oracle.fakes[name], None
        steps = [whole([run[case]["latents"][i] for run in runs], name).view(weight.shape) for i in range(6)]
        touched = torch.zeros_like(weight, dtype=torch.bool)
        for before, after in pairwise(steps):
            moved = before != after
            if not fake.learned:  # the scale follows from the latents alone
                near = fake.near(before, reach)
                assert torch.equal(moved, near)
                moved_before += int((touched & ~near).sum())
            assert 0.01 < moved.float().mean() < 0.5
            touched |= moved
        assert torch.equal(steps[-1][~touched], steps[0][~touched])
    assert moved_before > 0 or fake.learned


def test_statistics_binary_weights_and_annealing_resume_bit_for_bit(run_ranks, tmp_path):
    """A run that was restored half way holds every bit of one that was not: latents, moments, tracker, scales, losses."""
    cases = ["statsq", "bwn", "cga", "mdq"]
    found = run_ranks(
        2, "tests.shard.method_runs:run_and_resume", timeout=240, folder=tmp_path, cases=cases, middle=STEPS // 2,
        env=ENV,
    )  # fmt: skip
    for rank in found:
        for case in cases:
            (losses, wanted), (resumed_losses, resumed), _ = rank[case]
            assert losses == resumed_losses, case
            assert wanted.keys() == resumed.keys()
            assert not [key for key in wanted if not torch.equal(wanted[key], resumed[key])], case
            assert len(losses) == STEPS // 2
    check_what_comes_of_a_checkpoint(tmp_path, {case: found[0][case][2] for case in cases})


def check_what_comes_of_a_checkpoint(folder, trained):
    """A teacher and a packed file have the very images that the model trained with when the checkpoint was written."""
    for case, parameters in trained.items():
        (path,) = (folder / case / "checkpoints" / "q").iterdir()
        teacher = load_model(Checkpoint.open(path))
        pack_checkpoint(Checkpoint.open(path), folder / case / "m.safetensors")
        packed = read_packed(folder / case / "m.safetensors")
        assert len(packed.weights) == 4
        for name, parameter in teacher.named_parameters():
            assert torch.equal(parameter, parameters[name]), (case, name)
            assert name not in packed.weights or torch.equal(packed.image(name), parameters[name]), (case, name)
