"""Notice a rank that is gone or hangs, and end this one with a message that says which it was, and where.

A thread of each rank writes a beat and the rank's place into a store of torch.distributed, and watches the rank after it; what
one finds, all read. A rank that is busy alone (a long save, the conversion at the end) goes on beating: time limits of
collectives would not tell it from one that hangs. A rank of which nothing new is heard for DSQ_SILENCE_S (40) is lost.
"""

import os
import sys
import threading
import time
from datetime import timedelta

LOST, LEFT, TOLD = "dsquant/lost", "left", "dsquant/told"
STORE = "rank 0, which holds the ranks together, is gone or hangs"


class Heartbeat:
    """Beat for this rank and watch the next; `where` is what this rank is doing, for the message of another."""

    def __init__(self) -> None:
        self.where, self._error = "the start", False
        self._over, self._heard = threading.Event(), 0.0
        self._threads: list[threading.Thread] = []
        self._store = None
        self._leaving = threading.Lock()

    def start(self, rank: int, world_size: int) -> None:
        """Begin to beat and to watch; every rank calls this once its process group is up."""
        if world_size == 1:
            return
        import torch.distributed as dist

        self.rank, self.watched = rank, (rank + 1) % world_size
        self.silence_s = float(os.environ.get("DSQ_SILENCE_S", 40))
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: what waits in another would hold this one up.
        self._store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=self.silence_s))
        self._beat(0)
        if rank == 0:
            self._store.set(LOST, "")
            self._store.delete_key(TOLD)  # a launcher that starts ranks anew may keep its store
        dist.barrier()
        self._heard = time.monotonic()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self, error: bool = False) -> None:
        """Watch no more, and tell the others that this rank leaves: in good order, or with an error that ends them, too."""
        self._error = error
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=self.silence_s)
        self._threads = []

    def verdict(self) -> None:
        """Wait as long as it may take to find the rank that is lost; this process ends meanwhile where one is."""
        for thread in self._threads:
            thread.join(timeout=1.5 * self.silence_s)

    def rank_0_tells(self, within_s: float) -> bool:
        """Wait, after `stop`, for rank 0 to note that it ends with an error, which it prints; say whether it does, or has.

        A rank 0 that is gone without a note may have been killed: it has told nothing of this rank's error.
        """
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if self._rank_0_told():
                return True
            time.sleep(0.05)
        return False

    def _rank_0_told(self) -> bool:
        try:
            return self._store is not None and self._store.check([TOLD])
        except RuntimeError:
            return False

    def _key(self, rank: int) -> str:
        return f"dsquant/beat/{rank}"

    def _beat(self, count: int) -> None:
        self._store.set(self._key(self.rank), f"{count} {self.where}")

    def _run(self) -> None:
        seen, since, count = "", time.monotonic(), 0
        try:
            while not self._over.wait(self.silence_s / 10):
                count += 1
                self._beat(count)
                if lost := self._store.get(LOST).decode():
                    self._leave(lost)
                now = self._store.get(self._key(self.watched)).decode()
                self._heard = time.monotonic()
                if now != seen or now == LEFT:
                    seen, since = now, self._heard
                elif self._heard - since > self.silence_s:
                    place = now.partition(" ")[2]
                    lost = f"rank {self.watched} is gone or hangs: nothing heard of it for {self.silence_s:g} s, last in {place}"
                    self._store.set(LOST, lost)
                    self._leave(lost)
            self._store.set(self._key(self.rank), LEFT)
            if self._error:
                if self.rank == 0:
                    self._store.set(TOLD, "")
                self._store.set(LOST, f"rank {self.rank} has ended; its message says why")
        except RuntimeError as error:  # DistNetworkError, DistStoreError
            if not self._over.is_set():
                self._leave(f"{STORE} ({str(error).splitlines()[0]})")

    def _guard(self) -> None:
        """Leave where the store does not answer: a rank 0 that hangs holds up whoever asks it."""
        while not self._over.wait(self.silence_s / 10):
            if time.monotonic() - self._heard > self.silence_s:
                self._leave(f"{STORE} (its store has not answered for {self.silence_s:g} s)")

    def _leave(self, why: str) -> None:
        """End the process: its main thread may wait in a collective that never ends."""
        with self._leaving:  # one thread says so
            print(f"dsquant: {why}; rank {self.rank} leaves in {self.where}", file=sys.stderr, flush=True)
            os._exit(1)
