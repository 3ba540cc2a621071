"""The doctor finds what a run would trip over, names the ranks, and leaves nothing behind."""

import tempfile
from pathlib import Path

import torch.distributed as dist

from dsquant.config import load_config
from tests.integration.runs import TINY

ZERO1 = {"zero_optimization": {"stage": 1}}


def examined(cases):
    """Return, for each (overrides, ds_config, out_dir), the fault of every check; {rank} in out_dir is this rank's."""
    from dsquant.doctor import Doctor
    from dsquant.engine import init_world

    world, found = init_world(), []
    for overrides, ds_config, out_dir in cases:
        if out_dir is None:  # a folder that rank 1 cannot write, even as root
            folder = Path("/proc" if dist.get_rank() else tempfile.mkdtemp())
        else:
            folder = Path(out_dir.format(rank=dist.get_rank()))
            folder.mkdir(parents=True, exist_ok=True)
        doctor = Doctor(world, load_config(str(TINY), overrides), ds_config, folder)
        found.append({finding.name: finding.fault for finding in doctor.examine()})
    return found


def test_faults_are_named_with_their_ranks_and_a_sound_job_has_none(run_ranks, tmp_path):
    shared, other = str(tmp_path / "shared"), str(tmp_path / "rank{rank}")
    cases = {
        "sound": ({}, ZERO1, shared),
        "batch": ({"stages.w2a2.batch_size": 63}, ZERO1, shared),
        "twice": ({}, ZERO1 | {"gradient_clipping": 5.0}, shared),
        "folders": ({}, ZERO1, other),
        "unwritable": ({}, ZERO1, None),
        "samples": ({"stages.fp.batch_size": 5000}, ZERO1, shared),
        "W&B": ({"telemetry.wandb": "online"}, ZERO1, shared),
        "rule": ({"stages.w2a2.quant.rules": [{"match": "nowhere.*", "n_bits": 8}]}, ZERO1, shared),
    }
    ranks = run_ranks(
        2, "tests.test_doctor:examined", cases=list(cases.values()), env={"HOME": str(tmp_path), "WANDB_API_KEY": ""}
    )
    assert ranks[0] == ranks[1]
    faults = {case: {k: v for k, v in found.items() if v} for case, found in zip(cases, ranks[0], strict=True)}
    assert faults.pop("sound") == {}
    for case, check, words in [
        ("batch", "recipe and ds_config", "stage w2a2: batch_size 63 is not divisible by 2 ranks"),
        ("twice", "recipe and ds_config", "gradient_clipping is 5.0 in the ds_config"),
        (
            "folders",
            "folder of the run",
            "is not one folder for all ranks; choose an --out_dir on a shared file system (rank 1 of 2)",
        ),
        ("unwritable", "folder of the run", "/proc cannot be written"),
        ("samples", "data", "stage fp: 1437 samples do not fill a batch of 2500 on 2 ranks (rank 0, 1 of 2)"),
        ("W&B", "W&B", "telemetry.wandb is online and no key is set"),
        ("rule", "quantizers", "nowhere.*"),
    ]:
        assert words in faults[case][check], case
    assert set(faults["folders"]) == {"folder of the run"}
    assert not [path for path in tmp_path.rglob(".dsquant-doctor-*")]


def wrong_kernel(folder):
    """Return what the doctor says of native code, where one of its passes is off."""
    from dsquant import doctor
    from dsquant.engine import init_world

    doctor.disagreements = lambda device: ["shard_step (image) by avx2"]
    examined = doctor.Doctor(init_world(), load_config(str(TINY), {}), ZERO1, Path(folder)).examine()
    return {finding.name: finding.fault for finding in examined}


def test_a_kernel_that_gives_something_else_than_its_definition_is_a_fault(run_ranks, tmp_path):
    (found,) = run_ranks(1, "tests.test_doctor:wrong_kernel", folder=str(tmp_path))
    (fault,) = [fault for fault in found.values() if fault]
    assert "shard_step (image) by avx2 differs from its definition; run with DSQ_BACKEND=torch" in fault
