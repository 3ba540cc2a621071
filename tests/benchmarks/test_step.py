"""The benchmark of a training step says what QAT costs over float: time, bytes saved for backward, and in which operators."""

import json
import os

from dsquant.benchmarks.step import step


def measure(out):
    os.environ.pop("DSQ_BACKEND", None)
    step("deit_tiny_patch16_224", batch=2, steps=1, out=out)
    with open(out) as file:
        return json.load(file)


def test_a_step_saves_at_most_a_twentieth_more_than_floats_and_is_told_by_operator(tmp_path, run_ranks):
    [found] = run_ranks(1, "tests.benchmarks.test_step:measure", out=str(tmp_path / "step.json"))
    assert found["saved_ratio"] <= 1.05
    assert found["time_ratio"] == found["qat_s"] / found["float_s"]
    float_s, qat_s = found["by_operator"]["dsquant::quant_attention_cpu_backward"]
    assert float_s == 0 < qat_s
    differences = [abs(qat - plain) for plain, qat in found["by_operator"].values()]
    assert differences == sorted(differences, reverse=True)
