"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, from Debian's slurm-wlm and munge."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=n[1-2] NodeHostname=localhost Port=[{first}-{second}] CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Say why there can be no Slurm here, or return None."""
    absent = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"needs Slurm: {', '.join(absent)} not found; apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root: Slurm's daemons start jobs as their owners"


class Cluster:
    """Run Slurm's daemons in a folder; `env` makes its commands find this cluster."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]

    def start(self):
        """Return self once both nodes are idle."""
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        control, first = free_ports(1), free_ports(2)
        text = CONFIG.format(folder=self.folder, control=control, first=first, second=first + 1)
        (self.folder / "slurm.conf").write_text(text)
        own = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munge.pid", "log-file": "munge.log"}
        own["seed-file"] = "munge.seed"
        options = [f"--{option}={self.folder / name}" for option, name in own.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self._until((self.folder / "munge.socket").exists, "munged listens")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(
            lambda: self.run("sinfo", "--noheader", "--format=%T %D", check=False) == "idle 2", "nodes are idle"
        )
        return self

    def _daemon(self, name, *options):
        with open(self.folder / f"{name}{len(self.daemons)}.out", "w") as file:
            command = [shutil.which(name, path=PATH), *options]
            self.daemons.append(
                subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            )

    def stop(self):
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command, check=True, cwd=None, env=None):
        """Return what a command of Slurm prints."""
        ended = subprocess.run(
            [str(word) for word in command],
            env=self.env | (env or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0 or not check, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout.strip()

    def field(self, job, name):
        """Return one field of a job's record, such as JobState."""
        return re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", "-o", job)).group(1)

    def wait(self, job, done, timeout=300, about=""):
        """Wait until `done()`; a job that Slurm would restart in two minutes it restarts now."""
        self._until(lambda: done() or self._hurry(job), f"job {job} {about}", timeout)

    def _hurry(self, job):
        if self.field(job, "JobState") == "PENDING" and self.field(job, "Reason") == "BeginTime":
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def _until(self, done, what, timeout=30, pause=0.2):
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                logs = [f"{p}:\n{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.out"))]
                raise AssertionError("\n".join([f"after {timeout} s not yet: {what}", *logs]))
            time.sleep(pause)


def free_ports(count):
    """Return the first of so many consecutive free ports."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                if count == 2:
                    second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
