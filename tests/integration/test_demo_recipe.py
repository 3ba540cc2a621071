"""The command as a newcomer types it: help that reads, from any folder, with no option at all but a cap on the steps."""

import re

import pytest

from dsquant.telemetry.metrics import read_summary
from tests.integration.runs import ds_config, run, run_forked, train_command

OPTIONS = ["recipe", "ds_config", "out_dir", "max_steps", "resume"]


@pytest.mark.parametrize("options", [["--help"], ["--ds_config", "ds_configs/zero2.json", "--max_steps", "3", "-h"]])
def test_help_names_every_option_and_trains_nothing(tmp_path, options):
    ended = run(train_command(*options), tmp_path / "log", cwd=tmp_path).ok()
    for option in OPTIONS:
        assert re.search(rf"--{option}\b", ended.output), (option, ended.output)
    assert "--stages.w2a2.epochs=30" in ended.output  # how a recipe field is overridden
    assert "digits_w2a2" in ended.output
    assert "Traceback" not in ended.output
    assert len(ended.output.splitlines()) < 60
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Return a folder that is not the checkout, from which the default recipe was run twice and then resumed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    commands = {
        "first": ["--max_steps", 1],
        "second": ["--max_steps", 1, "--ds_config", ds_config("zero2"), "--local_rank=0"],
        "resumed": ["--resume"],
    }
    for name, options in commands.items():
        run_forked(train_command(*options), folder / f"{name}.log", cwd=folder).ok()
    return folder


def test_runs_without_an_out_dir_are_numbered_under_runs(elsewhere):
    assert sorted(p.name for p in (elsewhere / "runs").iterdir()) == ["digits_w2a2", "digits_w2a2-2"]
    zero = {name: read_summary(elsewhere / "runs" / name)["zero_stage"] for name in ("digits_w2a2", "digits_w2a2-2")}
    assert zero == {"digits_w2a2": 1, "digits_w2a2-2": 2}


def test_resume_without_an_out_dir_takes_the_newest_run(elsewhere):
    assert str(elsewhere / "runs" / "digits_w2a2-2") in (elsewhere / "resumed.log").read_text()


def test_a_run_keeps_everything_in_its_folder_and_says_where(elsewhere):
    run_dir = elsewhere / "runs" / "digits_w2a2"
    names = {p.name for p in run_dir.iterdir()}
    assert {"recipe.yaml", "data", "checkpoints", "metrics.jsonl", "summary.json", "report.html"} <= names
    summary = read_summary(run_dir)
    assert summary["packed_file"] == str(run_dir / "model.packed.safetensors")
    assert summary["checkpoint"] == str(run_dir / "checkpoints" / "w2a2" / "step_00000001")
    shown = (elsewhere / "first.log").read_text()
    assert all(str(run_dir / name) in shown for name in ("metrics.jsonl", "report.html", "model.packed.safetensors"))
    assert {p.name for p in elsewhere.iterdir()} == {"first.log", "second.log", "resumed.log", "runs"}
