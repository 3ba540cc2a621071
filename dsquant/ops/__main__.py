"""List every op and backend on this machine: `python -m dsquant.ops` checks and times each against its definition."""

import os
import sys

import torch

from dsquant.errors import DsquantError
from dsquant.ops import backends
from dsquant.ops.cases import Case, all_cases

REPEATS = 7


def report() -> bool:
    """Print the table for every device; return whether every backend that is available agrees with its definition."""
    backends.requested("")  # what it names must exist
    wanted, good = os.environ.get("DSQ_BACKEND") or "auto", True
    print(f"DSQ_BACKEND={wanted}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    row("op", "case", "device", "backend", "available", "tested", "seconds", "")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for case in all_cases(device):
            good &= _report_case(case, device)
    row("pack, unpack", "any", "any", backends.TORCH, "yes", "is the definition", "", "")
    row("quant_linear", "backward", "any", "as fake_quantize", "yes", "quantizes by its passes", "", "")
    row(
        "packed_linear",
        "scales by token, head, channel of x",
        "any",
        "as float x",
        "yes",
        "dequantizes x first",
        "",
        "",
    )
    for backend in (*backends.ON_CPU, *backends.ON_GPU):
        if not (state := backends.availability(backend)).available:
            print(f"{backend}: {state.why}")
    return good


def _report_case(case: Case, device: str) -> bool:
    expected, good = case.results(backends.TORCH), True
    here = [b for b in case.backends(device) if backends.availability(b).available]
    seconds = case.timed(here, device, REPEATS)
    for backend in case.backends(device):
        if backend not in here:
            row(case.op, case.label, device, backend, "no", "", "", "")
            continue
        error = case.error(backend, expected)
        fine = error <= case.tolerance
        good &= fine
        verdict = "is the definition" if backend == backends.TORCH else "equal" if error == 0 else f"error {error:.0e}"
        fastest = "fastest" if seconds[backend] == min(seconds.values()) else ""
        verdict = verdict if fine else f"WRONG: {verdict}"
        row(case.op, case.label, device, backend, "yes", verdict, f"{seconds[backend]:.1e}", fastest)
    return good


def row(op: str, case: str, device: str, backend: str, available: str, tested: str, seconds: str, fastest: str) -> None:
    """Print one line of the table."""
    line = f"{op:16} {case:36} {device:6} {backend:16} {available:10} {tested:19} {seconds:8} {fastest}"
    print(line.rstrip())


if __name__ == "__main__":
    try:
        with torch.no_grad():
            sys.exit(0 if report() else "dsquant: a backend disagrees with its definition")
    except DsquantError as error:
        sys.exit(f"dsquant: {error}")
