"""Measure memory: what a process or a device has held at most, and what a forward and backward pass keeps alive."""

import ctypes
import re
import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt
LARGE = 256 * 2**10  # a freed block of this size goes back to the system; smaller ones are soon used again


class PeakMemory:
    """Measure the most bytes that this rank has held since `start`, beyond what it held when this object was made.

    On CUDA torch's allocated bytes; on CPU the resident private memory of the process: code and files that are mapped, and the
    buffers that DeepSpeed reduces through, are `mapped`. `base` is that of interpreter, torch and libraries.
    Large tensors are given back to the system when freed, from here on, so that what is resident is what is alive.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cpu":
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, LARGE)
            libc.mallopt(M_TRIM_THRESHOLD, LARGE)
            libc.mallopt(M_ARENA_MAX, 1)  # autograd's threads would keep what they free
        self.start()
        self.base = self.held()

    def start(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def held(self) -> int:
        """Return the bytes held now."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else _status("RssAnon")

    def mapped(self) -> int:
        """Return the bytes of mapped files and shared buffers; they only grow."""
        return 0 if self.device.type == "cuda" else _status("RssFile") + _status("RssShmem")

    def peak(self) -> int:
        """Return the most bytes held since `start`, less the base."""
        most = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return most - self.mapped() - self.base


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that operations make while this mode is on, for as long as they live.

    Works on any device, `meta` included, where nothing is computed. `peak` is the most at one time, `now` what is left.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def know(self, tensor: Tensor) -> None:
        """Leave a tensor's storage out."""
        self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.know(tensor) if tensor.untyped_storage() not in self._known else None
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes
