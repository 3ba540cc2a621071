"""Runs that several integration tests look at, each made once a session."""

import pytest

from dsquant.config import load_config
from tests.integration.runs import TINY, ds_config, pretrain, run_forked, train_command

STEPS = 24  # an epoch is of 22


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """Return `run(zero)`: the folder of the default recipe, trained on two ranks for STEPS steps a stage."""
    folder, ended = tmp_path_factory.mktemp("default"), {}

    def trained(zero):
        out_dir = folder / zero
        if zero not in ended:
            options = ["--ds_config", ds_config(zero), "--max_steps", STEPS, "--out_dir", out_dir]
            ended[zero] = run_forked(train_command(*options, ranks=2), folder / f"{zero}.log")
        ended[zero].ok()
        return out_dir

    return trained


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Return a float state dict of the tiny recipe's model that has learned something."""
    return pretrain(load_config(str(TINY)), tmp_path_factory.mktemp("pretrained"))
