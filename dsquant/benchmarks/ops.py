"""Time every op by every backend of a device, interleaved in one run."""

import json

import torch

from dsquant.ops import backends
from dsquant.ops.cases import all_cases
from dsquant.ops.timing import interleaved


def ops(device: str | None = None, repeats: int = 15, threads: int | None = None, out: str | None = None) -> None:
    """Print a JSON line for each op, case and backend: op, case, device, backend, shape, seconds, gb_per_s.

    gb_per_s is what the op has to read and write, each operand once, over the time: beside the line `copy`, which copies 64
    MiB (on a GPU 256), it says how near an elementwise op comes to the memory's bandwidth. On a GPU a run is a CUDA graph, and
    others' ops in float have lines beside.

    Args:
        device: cpu or cuda (default: cuda where there is one).
        repeats: timed calls of each; the median counts.
        threads: CPU threads (default: torch's).
        out: also write the lines to this file.
    """
    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.ones(1 << (24 if device == "cpu" else 26), device=device)
    target = torch.empty_like(source)
    copied = interleaved({"torch": lambda: target.copy_(source)}, repeats)["torch"]
    size = f"{source.nbytes >> 20} MiB"
    lines = [_line("copy", size, device, "torch", str(source.numel()), copied, 2 * source.nbytes)]
    with torch.no_grad():
        for case in all_cases(device):
            here = [b for b in case.backends(device) if backends.availability(b).available]
            lines += [
                _line(case.op, case.label, device, by, case.shape, taken, case.bytes_moved)
                for by, taken in case.timed(here, device, repeats).items()
            ]
    for line in lines:
        print(line)
    if out:
        with open(out, "w") as file:
            file.write("\n".join(lines) + "\n")


def _line(op: str, case: str, device: str, backend: str, shape: str, seconds: float, moved: int) -> str:
    found = {"op": op, "case": case, "device": device, "backend": backend, "shape": shape, "seconds": seconds}
    return json.dumps(found | {"gb_per_s": moved / seconds / 1e9})
