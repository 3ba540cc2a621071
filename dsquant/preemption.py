"""Stop on every rank at the same point when one of them is asked to: by Slurm before a limit, by scancel, by anybody.

A signal only sets a flag. At the end of every step, and of every batch of an evaluation or a calibration, the ranks put their
flags together. They do so on a gloo group of their own, and each looks at the answer to its question one point later: by then
it has long come, so nothing waits, no device is synchronized, and a request is acted upon after at most two points.

torch is imported late, since the command listens before it loads anything that takes long.
"""

import os
import signal
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not finished, to be tried again
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):
    """Signal that all ranks have agreed to stop; what a resumed run needs is on disk where this is raised to the command."""


class StopRequest:
    """Hold whether this process was asked to stop, and agree on it with the other ranks."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._process = os.getpid()
        self._group = self._flag = self._answer = None

    def listen(self) -> None:
        """Take SIGUSR1 and SIGTERM as requests to stop, from now on, in this process."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # not in a worker that has been forked a moment ago
            self.signal = signal.Signals(number)

    def release(self) -> None:
        """Let the signals end this process again, once it has nothing left to save; one of SIGTERM that came ends it now."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.signal is signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def join(self, world_size: int) -> None:
        """Open the group in which ranks agree; every rank calls this, and again where the ranks are others."""
        import torch.distributed as dist

        self._answer = None
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def poll(self, where: str) -> None:
        """Raise Stopped on all ranks at the same call, soon after a signal has reached one; every rank calls this as often.

        where: "training", "evaluation" or "calibration", for the message.
        """
        if self._group is None:
            stop = self.asked
        else:
            stop = self._agreed_before()
            if not stop:
                self._ask()
        if stop:
            raise Stopped(f"stopped in {where}")

    def _ask(self) -> None:
        import torch
        import torch.distributed as dist

        self._flag = torch.tensor([self.asked], dtype=torch.int32)
        self._answer = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _agreed_before(self) -> bool:
        """Return what the ranks answered to the question of the last call, False at the first."""
        if self._answer is None:
            return False
        self._answer.wait()
        return bool(self._flag.item())

    def agree(self, stopping: bool, where: str) -> None:
        """Raise Stopped on all ranks where any is `stopping`; waits for every rank to call this."""
        if self._group is not None:
            import torch
            import torch.distributed as dist

            flag = torch.tensor([stopping], dtype=torch.int32)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            stopping = bool(flag.item())
        if stopping:
            raise Stopped(f"stopped in {where}")


def leave_together() -> None:
    """Wait for all ranks and end their process group, so that none ends while another still writes."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
