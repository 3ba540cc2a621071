"""What a launcher says of this process, put the way torch.distributed and DeepSpeed read it.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `srun` says the same in other words, once
for each task; a process that nobody launched is a world of one. This is the one place that knows the difference.
"""

import re
import socket
from collections.abc import MutableMapping

from dsquant.errors import ConfigError

FIRST_PORT, PORTS = 10_000, 20_000  # below the ephemeral ports of Linux, which begin at 32768
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def adopt_launcher(env: MutableMapping[str, str]) -> None:
    """Complete `env` with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    What is set already stays: a deepspeed or torchrun inside a Slurm job has the last word. Tasks of an `srun` take theirs from
    SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID. Raises ConfigError where a launcher has set RANK and not the rest.
    """
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
        env.update(_of_slurm(env) | {key: env[key] for key in ("MASTER_ADDR", "MASTER_PORT") if key in env})
    elif "RANK" in env and "WORLD_SIZE" not in env:
        raise ConfigError("RANK is set and WORLD_SIZE is not: unset RANK, or start with deepspeed, torchrun or srun")
    for key, value in SINGLE.items():
        env.setdefault(key, value)
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if env["WORLD_SIZE"] == "1" and "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port())


def device_index(local_rank: int, visible: int) -> int:
    """Return which of the `visible` devices is this process's own.

    Where a task sees only its own device (srun --gpus-per-task, --gpu-bind), that one has the number 0 whatever the local rank.
    Raises ConfigError where a node has more processes than each sees devices.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"process {local_rank} of this node sees {visible} devices: start one process a device "
            "(sbatch --ntasks-per-node, deepspeed --num_accelerators)"
        )
    return local_rank


def _of_slurm(env: MutableMapping[str, str]) -> dict[str, str]:
    """Translate the environment of one task of a job step."""
    one_node = env.get("SLURM_STEP_NUM_NODES", "1") == "1"
    # Every task computes the same port: the job gives one that no other job of these nodes has, mostly, the step the rest.
    port = FIRST_PORT + (int(env["SLURM_JOB_ID"]) + 997 * int(env["SLURM_STEP_ID"])) % PORTS
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(most_tasks_of_a_node(env["SLURM_STEP_TASKS_PER_NODE"])),
        "MASTER_ADDR": "127.0.0.1" if one_node else first_host(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),
    }


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm host list: "gpu[07-09,12]-ib,login1" -> "gpu07-ib"."""
    before, inside, after = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes).groups()
    return before + (inside or "") + after


def most_tasks_of_a_node(tasks_per_node: str) -> int:
    """Return the largest count in Slurm's "8(x3),2"."""
    return max(int(count) for count in re.findall(r"(?:^|,)(\d+)", tasks_per_node))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
