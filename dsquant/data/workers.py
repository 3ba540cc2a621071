"""Load batches in worker processes: in order, with their errors, and deaf to the signals that a training process listens to."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dsquant.errors import DataError

J, R = TypeVar("J"), TypeVar("R")
Batch = tuple[Any, ...]  # inputs (a tensor of images, or a dict of tensors), labels, and what else a row has


class _WorkerBatches(IterableDataset):
    """Give worker w of W the batches w, w + W, ...: DataLoader takes workers in turn, which restores the order.

    A DataError travels as an item, since torch would wrap a raised one in the worker's traceback.
    """

    def __init__(self, worker_batches: Callable[[int, int], Iterator[Batch]]):
        self.worker_batches = worker_batches

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        try:
            yield from self.worker_batches(info.id, info.num_workers) if info else self.worker_batches(0, 1)
        except DataError as error:
            yield error


def load_batches(
    worker_batches: Callable[[int, int], Iterator[Batch]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batches that `worker_batches(worker, workers)` makes in each of `num_workers` processes, 0: in this one.

    A DataError of a worker is raised here as it is.
    """
    loader = DataLoader(
        _WorkerBatches(worker_batches),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if num_workers else None,  # the parent is this process, whose mask a worker has
        generator=torch.Generator(),  # otherwise DataLoader draws from the global one
    )
    with _sigterm_blocked():
        batches = iter(loader)
    try:
        for item in batches:
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        batches = item = None  # an error keeps this frame alive, which must not keep workers waiting


def map_in_processes(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[R]:
    """Yield `function(job)` of each job in order, from so many processes, 1: from this one.

    What the function raises ends all. Processes end with this one, however it ends. Raises DataError where one is killed.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_end_with_parent)
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool:
        raise DataError("a worker process was killed, for want of memory perhaps; use fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)


def _as_is(item: Any) -> Any:
    return item


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Let a SIGTERM wait: workers that start meanwhile inherit this, and are safe before `_start_worker` runs in them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Leave signals to the parent, which stops at the end of a step and needs its workers until then.

    Slurm signals every process of a step: USR1 and INT are ignored, and TERM ends a worker if it comes from the parent alone.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # blocked since `_sigterm_blocked`
    threading.Thread(target=_end_when_parent_says, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_when_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # the parent would take another code for a failure of its worker
