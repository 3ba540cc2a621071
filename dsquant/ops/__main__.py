"""List every op and backend on this machine: `python -m dsquant.ops` checks and times each against its definition."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsquant.errors import DsquantError
from dsquant.ops import backends
from dsquant.ops.fake_quantize import ScaleGradient, backward_into, quantize_dequantize
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import packed_matrix, run
from dsquant.ops.quant_attention import QuantArgs
from dsquant.spec import Levels

DEFINITIONS_ALONE = ("pack, unpack",)
REPEATS = 7


@dataclass(frozen=True)
class Case:
    """Say what is run for an op: `run(backend)` gives a result; `tolerance` is the share of its largest value."""

    op: str
    label: str
    run: Callable[[str], Tensor]
    tolerance: float = 0.0
    native: tuple[str, ...] = backends.ON_CPU


def packed_linear_cases(rows: int) -> list[Case]:
    """Return the cases of `packed_linear` for x of `rows` rows: integers, and float."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-2, 2, (768, 768), generator=generator).to(torch.int8)
    weight = packed_matrix(pack(codes, 2), 0.1 + torch.rand(768, generator=generator), 2, 768)
    x = torch.randn(rows, 768, generator=generator)
    quant = QuantArgs(torch.tensor([0.03]), None, Levels(-128, 127))
    return [
        Case("packed_linear", f"x of 8 bits, one scale; M {rows}", lambda b: run(b, x, weight, None, quant)),
        Case("packed_linear", f"float x; M {rows}", lambda b: run(b, x, weight, None, None), tolerance=1e-5),
    ]


def fake_quantize_cases() -> list[Case]:
    """Return the cases of the two passes that fake_quantize, quant_linear and quant_attention share."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 8, 197, 768, generator=generator)
    cases = []
    for name, scale in {"one scale": torch.tensor([0.5]), "a scale a token": torch.full((197, 1), 0.5)}.items():

        def forward(backend: str, scale: Tensor = scale) -> Tensor:
            with backends.forced(backend):
                return quantize_dequantize(x, scale, None, Levels(-2, 1))

        def backward(backend: str, scale: Tensor = scale) -> Tensor:
            d_x = torch.empty_like(x)
            with backends.forced(backend):
                backward_into(x, grad, scale, None, Levels(-2, 1), ScaleGradient(scale, None), d_x)
            return d_x

        cases += [
            Case("fake_quantize", f"forward, {name}", forward),
            Case("fake_quantize", f"backward, {name}", backward),
        ]
    return cases


def report() -> bool:
    """Print the table; return whether every backend that is available agrees with its definition."""
    wanted, good = backends.requested(), True
    print(f"DSQ_BACKEND={wanted}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    row("op", "case", "backend", "available", "tested", "seconds", "")
    for op in DEFINITIONS_ALONE:
        row(op, "any", backends.TORCH, "yes", "is the definition", "", "fastest")
    for case in fake_quantize_cases() + packed_linear_cases(197) + packed_linear_cases(1):
        good &= _report_case(case)
    row("quant_linear, quant_attention", "any", "as fake_quantize", "yes", "quantize by its passes", "", "")
    row(
        "shard_step",
        "AdamW on CPU",
        backends.choose("shard_step", "cpu"),
        "yes",
        "by tests/shard",
        "",
        "",
    )
    row("packed_linear", "scales by token, head, channel of x", "as float x", "yes", "dequantizes x first", "", "")
    for backend in backends.ON_CPU:
        if not (state := backends.availability(backend)).available:
            print(f"{backend}: {state.why}")
    return good


def _report_case(case: Case) -> bool:
    expected = case.run(backends.TORCH)
    here = [b for b in (backends.TORCH, *case.native) if backends.availability(b).available]
    seconds = _interleaved({b: (lambda b=b: case.run(b)) for b in here})
    good = True
    for backend in (backends.TORCH, *case.native):
        if backend not in here:
            row(case.op, case.label, backend, "no", "", "", "")
            continue
        error = float((case.run(backend) - expected).abs().max() / expected.abs().max())
        fine = error <= case.tolerance
        good &= fine
        verdict = "is the definition" if backend == backends.TORCH else "equal" if error == 0 else f"error {error:.0e}"
        fastest = "fastest" if seconds[backend] == min(seconds.values()) else ""
        row(
            case.op,
            case.label,
            backend,
            "yes",
            verdict if fine else f"WRONG: {verdict}",
            f"{seconds[backend]:.1e}",
            fastest,
        )
    return good


def _interleaved(runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, call in runs.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def row(op: str, case: str, backend: str, available: str, tested: str, seconds: str, fastest: str) -> None:
    """Print one line of the table."""
    print(f"{op:16} {case:36} {backend:10} {available:10} {tested:19} {seconds:8} {fastest}".rstrip())


if __name__ == "__main__":
    try:
        with torch.inference_mode():
            sys.exit(0 if report() else "dsquant: a backend disagrees with its definition")
    except DsquantError as error:
        sys.exit(f"dsquant: {error}")
