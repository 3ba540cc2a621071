"""A plan says what a run takes before it starts: activations of a real pass, peaks that are then measured."""

import gc
import json
import sys

import pytest
import torch

from dsquant.benchmarks.memory import measure, memory
from dsquant.errors import ConfigError
from dsquant.footprint import Job, footprint, open_job, passes
from dsquant.memory import LiveBytes
from dsquant.ops import backends
from dsquant.plan import GIB, plan, predict, shipped
from tests import ranks
from tests.integration.runs import REPO, run_forked

ZERO = ("zero0", "zero1", "zero2", "zero3")
MODEL = {"model.kwargs.embed_dim": 384, "model.kwargs.depth": 4, "model.kwargs.num_heads": 6}  # 7 M weights, 29 MB


def job_of(*, batch=4, quantized=True, **overrides):
    job = open_job("digits_w2a2", MODEL | overrides, 2, None, batch)
    if quantized:
        return job
    plain = job.stage.model_copy(update={"quant": None})
    return Job(
        job.config.model_copy(update={"stages": job.config.stages | {job.name: plain}}), job.name, job.micro_batch
    )


def test_live_bytes_are_those_of_tensors_that_are_alive():
    known = torch.ones(1000)
    with LiveBytes() as live:
        live.know(known)
        a = known * 2
        b = a.view(10, 100)
        assert (live.now, live.peak) == (4000, 4000)
        known.add_(1)
        c = a + b.view(-1)
        assert live.now == 8000
        del a, b, c
        assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_on_the_meta_device_saves_and_holds_what_a_real_one_does(checkpointing):
    job = job_of(**{"stages.w2a2.activation_checkpointing": checkpointing, "model.kwargs.embed_dim": 96})
    with backends.forced("torch"):
        real = passes(job, torch.float32, device="cpu")
    assert passes(job, torch.float32) == real


def test_a_stage_without_dropout_keeps_no_masks_for_backward():
    none = {"model.kwargs.proj_drop_rate": 0.0, "model.kwargs.drop_path_rate": 0.0}
    dropping, stopped, plain = (
        footprint(job_of(**{"model.kwargs.embed_dim": 96} | more), torch.float32)
        for more in ({}, {"stages.w2a2.dropout": False}, none)
    )
    assert stopped == plain
    assert dropping.saved > plain.saved


def test_checkpointing_saves_memory_and_samples_add_to_it():
    kept, plain, twice = (
        footprint(
            job_of(batch=n, **{"stages.w2a2.activation_checkpointing": c, "model.kwargs.embed_dim": 96}), torch.float32
        )
        for n, c in ((16, True), (16, False), (32, False))
    )
    assert kept.saved < plain.saved / 3
    assert twice.saved == pytest.approx(2 * plain.saved, rel=0.01)
    assert plain.growing > 4 * sum(plain.parameters)


def measured(job):
    found = {}
    for name, ds_config in shipped(ZERO).items():
        gc.collect()
        found[name] = measure(job, ds_config, 2)
    return found


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """Return what two ranks measure on every ZeRO stage, and what is predicted."""
    job, folder = job_of(), tmp_path_factory.mktemp("peaks") / "ranks"
    need = footprint(job, torch.float32)
    predicted = {name: predict(name, job, need, ds, 2, cuda=False) for name, ds in shipped(ZERO).items()}
    return ranks.launch(2, f"{__name__}:measured", {"job": job}, folder, 400, {"DS_ACCELERATOR": "cpu"}), predicted


@pytest.mark.parametrize("name", ZERO)
def test_the_predicted_peak_is_that_measured(peaks, name):
    by_rank, predictions = peaks
    predicted = predictions[name]
    for rank in by_rank:
        assert predicted.peak == pytest.approx(rank[name]["step"], rel=0.15)
        assert sum(predicted.kept.values()) == pytest.approx(rank[name]["kept"], rel=0.15)


def test_zero_stages_take_the_same_steps_and_track_6_bytes_a_weight(peaks):
    for rank in peaks[0]:
        assert len({tuple(found["losses"]) for found in rank.values()}) == 1
        assert all(found["tracking_bytes_per_weight"] == 6 for found in rank.values())


def test_traffic_is_that_of_rings():
    job = job_of()
    need = footprint(job, torch.float32)
    whole = 4 * sum(need.parameters)
    sent = {name: predict(name, job, need, ds, 4, cuda=False).traffic for name, ds in shipped().items()}
    assert [sent[name]["gradients"] for name in ZERO] == [int(1.5 * whole), *[int(0.75 * whole)] * 3]
    assert [sent[name]["weights"] for name in ZERO] == [0, *[int(0.75 * whole)] * 2, 3 * int(0.75 * whole)]
    alone = predict("zero3", job, need, shipped(("zero3",))["zero3"], 1, cuda=False)
    assert not any(alone.traffic.values())


def test_what_fits_first_is_taken_and_too_little_memory_is_said():
    options = {"recipe": "digits_w2a2", "gpus": 4, "reserve_gib": 0.0, **MODEL}
    roomy = plan(gpu_gib=80, **options)
    assert roomy["take"] == "zero2"
    by_name = {p["name"]: p for p in roomy["predictions"]}
    assert all(p["fits"] for p in by_name.values())
    least = min(by_name.values(), key=lambda p: p["peak"])
    assert by_name["zero2"]["peak"] < by_name["zero0"]["peak"]
    assert by_name["zero2_offload"]["peak"] < by_name["zero2"]["peak"]
    tight = plan(gpu_gib=(least["peak"] + 1) / GIB, **options)
    assert tight["take"] == least["name"]
    assert plan(gpu_gib=0.99 * least["peak"] / GIB, **options)["take"] is None


def test_a_stage_or_a_batch_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no stage 'w9'; it has fp, w2a2"):
        plan("digits_w2a2", 1, 8, stage="w9")
    with pytest.raises(ConfigError, match="does not divide into 7"):
        plan("digits_w2a2", 7, 8)


def test_the_command_prints_a_table_or_json(tmp_path):
    command = [
        sys.executable,
        str(REPO / "tools" / "plan.py"),
        "--recipe",
        "digits_w2a2",
        "--gpus",
        "2",
        "--gpu_gib",
        "8",
    ]
    shown = run_forked(command, tmp_path / "table").ok().output
    assert "take ds_configs/zero2.json" in shown
    assert all(name in shown for name in shipped())
    printed = run_forked([*command, "--json"], tmp_path / "json").ok().output
    assert json.loads(printed[printed.index("{\n") :])["take"] == "zero2"


def test_the_benchmark_measures_and_predicts_what_it_says(tmp_path, capsys):
    memory(model="", batch=256, recipe="digits_w2a2", zero="zero1", ranks=1, steps=1, out=str(tmp_path / "memory.json"))
    found = json.loads((tmp_path / "memory.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["saved_ratio"] == found["saved_bytes"]["quantized"] / found["saved_bytes"]["float"]
    assert found["peaks"]["zero1"]["step"] > found["peaks"]["zero1"]["kept"] > 0
