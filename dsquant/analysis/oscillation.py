"""Oscillation by module: curves from a run's metrics.jsonl, and where it ended, from its last checkpoint.

A weight oscillates where the moving average of its oscillations exceeds the recipe's threshold (Nagel et al. 2022).
Sites of more than 4 bits are kept apart: with 256 bins nearly every weight changes its code, which harms nothing.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from dsquant.analysis.modules import fused_rows, layer_of, split_name
from dsquant.config import load_config
from dsquant.errors import ConfigError
from dsquant.models import build_model, insert_sites
from dsquant.run_folder import RECIPE_FILE
from dsquant.telemetry.metrics import METRICS_FILE, read_metrics

LOW_BITS = 4
SHARES = ("oscillating_pct", "frozen_pct")


def oscillation(run: str | Path, stage: str | None = None) -> dict[str, Any]:
    """Return curves by site and by kind of module over the steps of a stage, and the final share of each module.

    By default the last stage that recorded oscillation. Kinds are means over their weights. Raises DsquantError where
    the run has no records, ConfigError where it, or the stage, trained no quantizer.
    """
    run = Path(run)
    records = read_metrics(run / METRICS_FILE, "oscillation", stage)
    if not records:
        where = f"stage {stage!r} of {run}" if stage else str(run)
        raise ConfigError(f"{where} has no oscillation records: only quantized stages write them (oscillation_every)")
    stage = records[-1]["stage"]
    records = [record for record in records if record["stage"] == stage]
    sites = site_curves(records)
    return {
        "run": run.name,
        "stage": stage,
        "steps": [record["step"] for record in records],
        "total": {key: [record[key] for record in records] for key in SHARES},
        "sites": sites,
        "kinds": kind_curves(sites),
        "final": {name: {"oscillating_pct": curve["oscillating_pct"][-1]} for name, curve in sites.items()},
    }


def site_curves(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each weight site's shares (%) over the records, its number of weights and its bits."""
    return {
        name: {
            "kind": split_name(layer_of(name))[1],
            "numel": last["numel"],
            "n_bits": last["n_bits"],
            **{key: [record["sites"][name][key] for record in records] for key in SHARES},
        }
        for name, last in records[-1]["sites"].items()
    }


def kind_curves(sites: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for each kind of module, the share of all its weights in all blocks, over the records."""
    groups = defaultdict(list)
    for curve in sites.values():
        groups[curve["kind"]].append(curve)
    return {kind: _together(curves) for kind, curves in groups.items()}


def _together(curves: list[dict[str, Any]]) -> dict[str, Any]:
    numel = sum(curve["numel"] for curve in curves)
    shares = {
        key: [
            sum(s * c["numel"] for s, c in zip(step, curves, strict=True)) / numel
            for step in zip(*(c[key] for c in curves), strict=True)
        ]
        for key in SHARES
    }
    return {"numel": numel, "n_bits": max(c["n_bits"] for c in curves), "blocks": len(curves), **shares}


def final_by_part(run: str | Path, stage: str) -> dict[str, float] | None:
    """Return the oscillating share (%) of q, k and v inside each fused weight, from the checkpoint's tracker.

    Records speak of whole weights. Empty where no weight of the stage is fused, None where the stage has no checkpoint
    (yet). Raises CheckpointError for one that is damaged.
    """
    from dsquant.checkpoint import load_run_checkpoint, stages_on_disk

    if stage not in stages_on_disk(Path(run)):
        return None
    config = load_config(str(Path(run) / RECIPE_FILE))
    quant = config.stages[stage].quant
    checkpoint = load_run_checkpoint(Path(run), stage)
    kept, left = checkpoint.whole("tracker.frequency"), checkpoint.tracker_step.left
    plain = config.model.model_copy(update={"pretrained": False, "checkpoint": None})
    found = {}
    for site in insert_sites(build_model(plain), quant.policy()).weights:
        oscillates = kept[site.name] > quant.oscillation.threshold / left
        for name, (start, stop) in fused_rows(site).items():
            found[name] = 100 * float(oscillates[start:stop].double().mean())
    return found
