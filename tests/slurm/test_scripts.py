"""The job scripts as text: sound shell, recipes that exist, and arguments that reach train.py as they were given."""

import re
import shutil
import subprocess

import pytest

from dsquant.config import load_config, load_ds_config
from dsquant.engine import micro_batch_size
from tests.integration.runs import REPO

FOLDER = REPO / "slurm"
JOBS = sorted(path.stem for path in FOLDER.glob("*.sh") if path.name != "body.sh")
# Stand-ins for Slurm's commands, as shell functions: srun writes what it was given, one argument a line.
SHELL = """
scontrol() {{ if [ "$1" = hostnames ]; then echo n1; elif [ "$1 $2" = "show hostnames" ]; then echo n1;
              elif [ "$1 $2" = "show node" ]; then echo "NodeName=n1 NodeAddr=10.1.2.3 Port=1"; else echo "scontrol $*"; fi; }}
srun() {{ printf '%s\\n' "$@" >"{given}"; env >"{given}.env"; return {code}; }}
root={root}
source {root}/slurm/body.sh
run_job swin_w2 some_recipe zero2.json "$@"
"""
JOB = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


def body(folder, *arguments, code=0, **env):
    """Run the body with stand-ins; return its output, the arguments of train.py, those of srun, and srun's environment."""
    given = folder / "given"
    env = {"PATH": "/usr/bin:/bin", "DSQUANT_PYTHON": "/bin/true"} | JOB | env
    text = SHELL.format(given=given, root=REPO, code=code)
    ended = subprocess.run(["bash", "-c", text, "job", *arguments], cwd=folder, env=env, capture_output=True, text=True)
    words = given.read_text().splitlines() if given.exists() else []
    at = words.index(str(REPO / "dsquant" / "train.py")) if words else 0
    exported = (
        dict(line.split("=", 1) for line in (folder / "given.env").read_text().splitlines() if "=" in line)
        if at
        else {}
    )
    return ended, words[at + 1 :], words[: max(at - 1, 0)], exported


@pytest.mark.parametrize("name", [*JOBS, "body"])
def test_the_scripts_are_sound(name):
    path = FOLDER / f"{name}.sh"
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        ended = subprocess.run(["shellcheck", "-x", path], cwd=REPO, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", JOBS)
def test_a_script_names_itself_a_recipe_and_a_ds_config_that_fit_its_ranks(name):
    text = (FOLDER / f"{name}.sh").read_text()
    called, recipe, ds_config = re.search(r"^run_job (\S+) (\S+) (\S+) \"\$@\"$", text, re.M).groups()
    assert (
        called
        == name
        == re.search(r"slurm/(\w+)\\\.sh", text).group(1)
        == re.search(r"--job-name=(\S+)", text).group(1)
    )
    load_ds_config(REPO / "ds_configs" / ds_config)
    ranks, gpus = (int(re.search(rf"--{key}=(\d+)", text).group(1)) for key in ("ntasks-per-node", "gpus-per-node"))
    assert ranks == gpus
    assert all(micro_batch_size(stage, ranks) > 0 for stage in load_config(recipe).stages.values())
    assert {"--requeue", "--open-mode=append"} <= set(re.findall(r"^#SBATCH (\S+)$", text, re.M))
    assert int(re.search(r"--signal=USR1@(\d+)", text).group(1)) >= 300


def test_arguments_go_on_as_given_and_replace_the_scripts_own(tmp_path):
    _, default, _, _ = body(tmp_path)
    ds_config = str(REPO / "ds_configs" / "zero2.json")
    assert default == ["--recipe", "some_recipe", "--ds_config", ds_config, "--out_dir", "runs/swin_w2-77"]
    mine = [
        "--recipe=a b.yaml",
        "--ds-config",
        "c d.json",
        "--out_dir",
        "my run",
        "--stages.w2a2.epochs=3",
        "--data.mean=[0.5, 0.4]",
    ]
    _, given, srun, _ = body(tmp_path, *mine)
    assert given == mine
    assert "--output=my run/logs/77-start0/rank_%t.log" in srun
    assert (tmp_path / "my run" / "logs" / "77-start0").is_dir()


def test_a_run_that_has_records_is_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "--resume" not in body(tmp_path, "--out_dir=run")[1]
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert "--resume" in body(tmp_path, "--out_dir=run")[1]


def test_an_array_is_one_run_a_seed(tmp_path):
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}
    assert body(tmp_path, **task)[1][-4:] == ["--seed", "4", "--out_dir", "runs/swin_w2-70/seed_4"]
    given = body(tmp_path, "--seed=9", **task)[1]
    assert given[-3:] == ["--out_dir", "runs/swin_w2-70/task_4", "--seed=9"]


def test_ranks_meet_on_the_first_node_whatever_the_submitting_shell_was_part_of(tmp_path):
    leaked = {"RANK": "3", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    _, _, srun, env = body(tmp_path, SLURM_CPUS_PER_TASK="6", DSQUANT_IFNAME="ib0", SLURM_EXPORT_ENV="NONE", **leaked)
    assert env["MASTER_ADDR"] == "10.1.2.3"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & env.keys()
    assert env["NCCL_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] == "ib0"
    assert env["OMP_NUM_THREADS"] == "6"
    assert {"--export=ALL", "--cpus-per-task=6", "--wait=60"} <= set(srun)


def test_only_a_stopped_run_is_requeued_and_not_for_ever(tmp_path):
    env = {"SLURM_JOB_ID": "77"}
    state = "is : not requeued"  # the stand-in knows no state; the real one is asked in test_stop_and_resume.py
    assert body(tmp_path, code=1, **env)[0].returncode == 1
    assert "requeue" not in body(tmp_path, code=1, **env)[0].stdout
    said = [body(tmp_path, code=75, **env)[0].stdout for _ in range(3)]
    assert state in said[0]
    assert state in said[1]
    assert "3 starts in a row were stopped before they saved anything: not requeued" in said[2]


def test_what_is_missing_is_named(tmp_path):
    ended, *_ = body(tmp_path, DSQUANT_PYTHON="/nowhere/python")
    assert ended.returncode == 2
    assert "no Python at /nowhere/python: run 'make venv'" in ended.stderr
    ended = subprocess.run(["bash", FOLDER / "swin_w2.sh"], capture_output=True, text=True, env={"PATH": "/bin"})
    assert ended.returncode == 2
    assert "submit this file with sbatch" in ended.stderr
