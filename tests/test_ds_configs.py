"""The shipped DeepSpeed configurations hold ZeRO and communication, and nothing that a recipe decides."""

import json
from pathlib import Path

import pytest

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
ALLOWED = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
}


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_a_ds_config_holds_zero_and_communication_only(path):
    config = json.loads(path.read_text())
    assert set(config) <= ALLOWED
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_a_ds_config_shards_as_its_name_says(path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(path.read_text())
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])  # rejects a key it does not know
    offload = zero.offload_optimizer is not None
    assert path.stem == f"zero{int(zero.stage)}" + ("_offload" if offload else "")
    assert config.get("zero_force_ds_cpu_optimizer", True) is not offload


def test_every_stage_and_offload_is_shipped():
    names = {path.stem for path in DS_CONFIGS.glob("*.json")}
    assert names == {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}
