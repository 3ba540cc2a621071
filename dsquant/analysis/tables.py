"""Tables and progress bars of the analysis commands on a terminal."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dsquant.analysis.sensitivity import DIFFERENCES


def sensitivity_table(result: dict[str, Any]) -> Table:
    """Return the differences of each kind of module, the one first that recovers the most loss."""
    found = table(
        "kind", "blocks", "recovers loss", "recovers top-1", "recovers KL", "adds loss", "costs top-1", "adds KL"
    )
    for kind, row in sorted(result["kinds"].items(), key=lambda item: -item[1]["recovery_loss"]):
        cells = (f"{row[key]:.2f}" if key.endswith("top1") else f"{row[key]:.4f}" for key in DIFFERENCES)
        found.add_row(kind, str(row["blocks"]), *cells)
    return found


def outlier_table(result: dict[str, Any]) -> Table:
    """Return the statistics of each weight and activation as a whole."""
    found = table("site", "max/std", "kurtosis", "SDAM", "SDAM / mean", "beyond 6 sigma", "heads")
    for name, site in [*result["weights"].items(), *result["activations"].items()]:
        numbers = (site["max_over_std"], site["kurtosis"], site["sdam"], site["sdam_relative"])
        cells = ["-" if value is None else f"{value:.3f}" for value in numbers]
        heads = len(site["heads"]["mean_abs"]) if site["heads"] else 0
        found.add_row(name, *cells, f"{100 * site['beyond_6_sigma']:.4f} %", str(heads or "-"))
    return found


def oscillation_table(result: dict[str, Any]) -> Table:
    """Return the share of oscillating weights of each site, and of q, k and v inside fused ones where it is known."""
    found = table("module", "bits", "weights", "peak oscillating %", "final oscillating %", "final frozen %")
    for name, site in result["sites"].items():
        shares = (max(site["oscillating_pct"]), site["oscillating_pct"][-1], site["frozen_pct"][-1])
        found.add_row(name, str(site["n_bits"]), f"{site['numel']:,}", *(f"{share:.2f}" for share in shares))
    for name, share in (result["final_parts"] or {}).items():
        found.add_row(name, "", "", "", f"{share:.2f}", "")
    return found


def allocation_table(result: dict[str, Any], part: str) -> Table:
    """Return the bits of each of the `weights` or `activations`, and their cost at each candidate."""
    found, costs = (
        table(part, "elements", "bits", *(f"{result['cost']} at {b}" for b in result["candidates"])),
        result[part],
    )
    for name, n_bits in costs["bits"].items():
        cells = (f"{costs['costs'][name][str(b)][0]:+.4f}" for b in result["candidates"])
        found.add_row(name, f"{costs['numel'][name]:,}", str(n_bits), *cells)
    return found


def table(first: str, *others: str) -> Table:
    """Return a table whose first column, the names, is never cut."""
    found = Table()
    found.add_column(first, no_wrap=True, overflow="fold")
    for name in others:
        found.add_column(name, justify="right")
    return found


def bar() -> Progress:
    """Return a progress bar on the error stream, so that tables alone go to a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr))


def tracker(progress: Progress, label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Return what shows on a bar how far a loop over items is."""
    return lambda items: progress.track(list(items), description=label)
