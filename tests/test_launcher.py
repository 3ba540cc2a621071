"""How a process learns which of its peers it is: from deepspeed or torchrun, from `srun`, or from nobody."""

import pytest

from dsquant.errors import ConfigError
from dsquant.launcher import adopt_launcher, device_index, first_host, most_tasks_of_a_node

# The environment of task 5 of `srun --nodes=2 --ntasks-per-node=4`, as Slurm 22.05 sets it.
TASK = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0",
}  # fmt: skip


def adopted(**env):
    adopt_launcher(env)
    return env


def test_a_task_of_srun_takes_its_place_from_the_step():
    env = adopted(**TASK)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("5", "8", "1", "4")
    assert env["MASTER_ADDR"] == "gpu07"


def test_all_tasks_of_a_step_meet_at_one_port_and_steps_side_by_side_at_others():
    ports = [adopted(**TASK | {"SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(8)]
    assert len(set(ports)) == 1
    others = [{"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "1235"}, {"SLURM_JOB_ID": "1235", "SLURM_STEP_ID": "1"}]
    found = {ports[0], *(adopted(**TASK | other)["MASTER_PORT"] for other in others)}
    assert len(found) == 4
    assert all(1024 < int(port) < 32768 for port in found)


def test_the_job_script_has_the_last_word_on_where_the_ranks_meet():
    env = adopted(**TASK, MASTER_ADDR="10.0.0.7", MASTER_PORT="29501")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.7", "29501")


def test_the_tasks_of_one_node_meet_on_it_whatever_its_name():
    assert adopted(**TASK | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"


def test_a_launcher_inside_a_job_has_the_last_word():
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert adopted(**TASK, **launched) == TASK | launched


def test_a_command_in_a_job_script_without_srun_is_alone():
    """A batch script has SLURM_PROCID and SLURM_NTASKS too, and no step."""
    script = {key: value for key, value in TASK.items() if "STEP" not in key}
    for env in (script, {}):
        found = adopted(**env)
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")
        assert int(found["MASTER_PORT"]) > 1024


def test_half_a_launcher_is_an_error():
    with pytest.raises(ConfigError, match="WORLD_SIZE is not"):
        adopted(RANK="1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("gpu[007-012,020]", "gpu007"), ("a,b[1-2]", "a"), ("rack2n[3,5-7],x", "rack2n3"),
        ("node[3-4]-ib,other", "node3-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_the_largest_number_of_tasks_of_a_node():
    assert [most_tasks_of_a_node(text) for text in ("1", "8(x16)", "8(x3),2", "1,12(x2)")] == [1, 8, 8, 12]


def test_a_process_takes_its_own_device_of_those_it_sees():
    assert [device_index(local, 4) for local in range(4)] == [0, 1, 2, 3]
    assert [device_index(local, 1) for local in range(4)] == [0, 0, 0, 0]  # srun --gpus-per-task=1 shows each its own
    with pytest.raises(ConfigError, match="process 4 of this node sees 4 devices"):
        device_index(4, 4)
