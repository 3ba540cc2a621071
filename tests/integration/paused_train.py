"""dsquant/train.py that waits at a chosen point until it is told to stop, so that a test can stop it exactly there.

The folder PAUSES holds files ORDER.WHERE.COUNT: the first that is left says at which call of `StopRequest.poll(WHERE)` of this
start rank 1 waits for a signal. It becomes ORDER.WHERE.COUNT.reached there, with the process's id, and .done after the signal.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from dsquant.preemption import StopRequest

TRAIN = Path(__file__).resolve().parents[2] / "dsquant" / "train.py"
RANK, PATIENCE_S = 1, 150


def pause_at(path):
    """Make `poll` wait at the point that the name of a file says."""
    _, where, count = path.name.split(".")
    poll, left = StopRequest.poll, [int(count)]

    def paused(self, here):
        left[0] -= here == where
        if here == where and left[0] == 0:
            reached = path.with_name(path.name + ".reached")
            path.write_text(str(os.getpid()))
            path.rename(reached)
            deadline = time.monotonic() + PATIENCE_S
            while not self.asked and time.monotonic() < deadline:
                time.sleep(0.02)
            reached.rename(path.with_name(path.name + ".done"))
        poll(self, here)

    StopRequest.poll = paused


if __name__ == "__main__":
    waiting = sorted(p for p in Path(os.environ["PAUSES"]).iterdir() if p.name.count(".") == 2)
    if waiting and int(os.environ.get("RANK") or os.environ["SLURM_PROCID"]) == RANK:
        pause_at(waiting[0])
    sys.argv = [str(TRAIN), *(arg for arg in sys.argv[1:] if arg != str(TRAIN))]
    runpy.run_path(str(TRAIN), run_name="__main__")
