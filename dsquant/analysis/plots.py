"""Pictures of an analysis, as PNG files that a person can read without the code at hand. Only this file needs matplotlib."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsquant.analysis.modules import layer_of, split_name
from dsquant.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, BLUE, ORANGE = "#222222", "#777777", "#2f6fb0", "#d9822b"
COLORS = ("#2f6fb0", "#d9822b", "#3d9a50", "#c0392b", "#7b5ea7", "#8c6d46", "#d16ba5", "#6b6b6b", "#9aa52a", "#2aa5b5")
DASHES = ("-", "--", "-.", ":")
ANNOTATED = 24  # rows or columns of a heat map up to which its cells show their numbers
ROW, DPI = 0.32, 130  # inches a row; dots an inch


def require_matplotlib() -> None:
    """Raise ConfigError where matplotlib is not installed: known before an hour of measuring, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'dsquant[analysis]', or pass --plots=false") from None


def _figure(
    columns: int, width: float, height: float, title: str, rows: int = 1,
    ratios: Sequence[float] | None = None,
) -> tuple["Figure", list["Axes"]]:  # fmt: skip
    """Return a figure of `rows` of panels that is drawn to files alone, and its axes row by row."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=INK)
    axes = list(figure.subplots(rows, columns, squeeze=False, height_ratios=ratios).flat)
    for ax in axes:
        ax.tick_params(labelsize=8, colors=INK)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=DPI)
    partial.replace(path)
    return path


PANELS = (
    ("recovery_loss", "left in float, all else quantized", "loss recovered (nats)"),
    ("harm_loss", "quantized, all else in float", "loss added (nats)"),
    ("harm_kl", "quantized, all else in float", "KL of predictions from float's (nats)"),
)


def sensitivity_bars(result: Mapping[str, Any], path: Path) -> Path:
    """Draw recovery, harm and moved predictions of each kind: a bar is the mean over blocks, a dot is one block.

    What lies outside blocks has an axis of its own: first and last layer would dwarf all else. The whiskers of a kind that
    is one module are the standard error of the paired difference.
    """
    outside = [kind for kind in result["kinds"] if _is_outside(result, kind)]
    inside = [kind for kind in result["kinds"] if kind not in outside]
    groups = [group for group in (inside, outside) if group]
    title = f"{result['subject']}: float loss {result['float']['loss']:.3f}, top-1 {result['float']['top1']:.1f} %;  "
    title += (
        f"all quantized ({_bits(result)} bits) {result['quantized']['loss']:.3f}, {result['quantized']['top1']:.1f} %"
    )
    height = 1.3 + 0.6 * len(groups) + ROW * len(result["kinds"])
    ratios = [len(group) + 0.2 for group in groups]
    title += f"\n{result['samples']} samples"
    figure, axes = _figure(len(PANELS), 14, height, title, rows=len(groups), ratios=ratios)
    shown: dict[str, Any] = {}
    for index, ax in enumerate(axes):
        row, column = divmod(index, len(PANELS))
        key, head, label = PANELS[column]
        _kind_bars(ax, result, groups[row], key)
        names = groups[row] if column == 0 else [""] * len(groups[row])
        _bars_frame(ax, names, head if row == 0 else "", label if row == len(groups) - 1 else "")
        handles, labels = ax.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _save(figure, path)


def _is_outside(result: Mapping[str, Any], kind: str) -> bool:
    parts = [part for module in result["modules"] if module["kind"] == kind for part in module["parts"]]
    return all(split_name(part)[0] is None for part in parts)


def _kind_bars(ax: "Axes", result: Mapping[str, Any], kinds: Sequence[str], key: str) -> None:
    for row, kind in enumerate(kinds):
        members = [module for module in result["modules"] if module["kind"] == kind]
        value, several = result["kinds"][kind][key], len(members) > 1
        ax.barh(row, value, color=BLUE, height=0.65, alpha=0.85, label="all of it, or mean over blocks")
        if several:
            dots = [module[key] for module in members]
            ax.plot(dots, [row] * len(dots), "o", ms=3.5, color=ORANGE, alpha=0.8, label="one block")
        else:
            error = members[0][f"{key}_se"]
            ax.errorbar(value, row, xerr=error, color=INK, capsize=3, lw=1, label="± standard error, over samples")


def _bits(result: Mapping[str, Any]) -> str:
    return "/".join(map(str, result["n_bits"]))


def _bars_frame(ax: "Axes", names: Sequence[str], title: str, label: str) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axvline(0, color=INK, lw=0.8)
    ax.locator_params(axis="x", nbins=5)  # numbers of small losses are long
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_title(title, fontsize=9, color=INK)
    ax.set_xlabel(label, fontsize=9, color=INK)


def block_table(
    values: Mapping[str, float], path: Path, *, title: str, label: str, form: str | None = None,
    colors: str = "YlOrRd", limits: tuple[float, float] | None = None,
) -> Path:  # fmt: skip
    """Draw a heat map of a value by block (rows) and kind of module (columns) from values by module name.

    Colours span the values inside blocks, unless `limits` are given; first and last layer may lie beyond. Numbers have
    three decimals, or one and an exponent where three would show zeros.
    """
    blocks = list(dict.fromkeys(split_name(name)[0] or "outside blocks" for name in values))
    kinds = list(dict.fromkeys(split_name(name)[1] for name in values))
    cells = {(split_name(n)[0] or "outside blocks", split_name(n)[1]): v for n, v in values.items()}
    rows = [[cells.get((block, kind), float("nan")) for kind in kinds] for block in blocks]
    inside = [v for n, v in values.items() if split_name(n)[0]]
    limits = limits or ((min(inside), max(inside)) if inside else None)
    form = form or ("{:.3f}" if max(map(abs, inside or values.values())) >= 0.01 else "{:.1e}")
    figure, (ax,) = _figure(1, 2.6 + 0.85 * len(kinds), 2.2 + ROW * max(6, len(blocks)), title)
    _heat(figure, ax, rows, blocks, kinds, label, form, colors, limits=limits)
    return _save(figure, path)


def _heat(
    figure: "Figure", ax: "Axes", rows: list[list[float]], names: Sequence[str], columns: Sequence[str], label: str,
    form: str, colors: str, limits: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """Draw one heat map; cells without a value stay white, and those of small maps show their numbers."""
    import numpy as np

    grid = np.ma.masked_invalid(np.array(rows, dtype=float))
    low, high = limits or (float(grid.min()), float(grid.max()))
    image = ax.imshow(grid, aspect="auto", cmap=colors, vmin=low, vmax=high if high > low else low + 1e-9)
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    if max(len(names), len(columns)) <= ANNOTATED and form:
        for (row, column), value in np.ndenumerate(grid):
            if value is not np.ma.masked and np.isfinite(value):
                dark = (value - low) > 0.65 * (high - low)
                text = form.format(value)
                text = text.removeprefix("-") if float(text) == 0 else text.replace("e-0", "e-")
                ax.text(column, row, text, ha="center", va="center", fontsize=7,
                        color="white" if dark else INK)  # fmt: skip
    figure.colorbar(image, ax=ax, shrink=0.8).set_label(label, fontsize=9)


def outlier_boxes(result: Mapping[str, Any], path: Path, statistic: str = "max_over_std") -> Path:
    """Draw the spread of a channel statistic over all channels of each kind of site: weights left, activations right."""
    groups = [_by_kind(result[part], statistic) for part in ("weights", "activations")]
    height = 1.7 + ROW * max(len(group) for group in groups)
    labels = {"max_over_std": "max |x| / std of a channel", "kurtosis": "kurtosis of a channel (normal: 3)"}
    title = f"{result['subject']}: outliers within channels, all blocks; {result['samples']} samples"
    figure, axes = _figure(2, 11, height, title)
    for ax, group, name in zip(axes, groups, ("weights", "activations"), strict=True):
        values = list(group.values())
        ax.boxplot(
            values, orientation="horizontal", whis=(5, 95), widths=0.6, patch_artist=True,
            boxprops={"facecolor": "#cfe0f1", "edgecolor": BLUE}, medianprops={"color": INK},
            whiskerprops={"color": BLUE}, capprops={"color": BLUE},
            flierprops={"marker": ".", "ms": 3, "mfc": ORANGE, "mec": ORANGE, "alpha": 0.6},
        )  # fmt: skip
        ax.set_yticks(range(1, len(group) + 1), [f"{kind} ({len(v)})" for kind, v in group.items()])
        ax.set_ylim(len(group) + 0.6, 0.4)
        low, high = max(1e-9, min(min(v) for v in values)), max(max(v) for v in values)
        if high > 20 * low:
            _log_axis(ax, dense=high < 500 * low)
        ax.grid(axis="x", color="#dddddd", lw=0.6)
        ax.set_title(f"{name} (number of channels)", fontsize=9, color=INK)
        ax.set_xlabel(labels[statistic], fontsize=9, color=INK)
    note = "box: quartiles and median; whiskers: 5 % and 95 %; dots: channels beyond"
    figure.supxlabel(note, fontsize=8, color=MUTED)
    return _save(figure, path)


def _log_axis(ax: "Axes", dense: bool) -> None:
    """Make x logarithmic, with plain numbers at each decade, or `dense` at 1, 2 and 5 of it, and none between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if dense else (1.0,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _by_kind(sites: Mapping[str, Any], statistic: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, site in sites.items():
        kind = split_name(name)[1]
        found.setdefault(kind, []).extend(v for v in site["channels"][statistic] if v is not None)
    return {kind: values for kind, values in found.items() if values}


def outlier_heads(result: Mapping[str, Any], path: Path, statistic: str = "max_over_std") -> Path | None:
    """Draw a heat map by block and head of each kind of activation that has heads; None where no site has any."""
    sites = {name: site["heads"][statistic] for name, site in result["activations"].items() if site["heads"]}
    kinds = list(dict.fromkeys(split_name(name)[1] for name in sites))
    if not kinds:
        return None
    blocks = list(dict.fromkeys(split_name(name)[0] or "" for name in sites))
    heads = max(len(values) for values in sites.values())
    columns = min(3 if heads <= 6 else 2, len(kinds))
    count = -(-len(kinds) // columns)
    labels = {"max_over_std": "max |x| / std of a head", "kurtosis": "kurtosis of a head (normal: 3)"}
    title = f"{result['subject']}: outliers of activations by head; {result['samples']} samples"
    width, height = 1.6 + columns * (1.6 + 0.42 * heads), 0.8 + count * (0.9 + ROW * max(4, len(blocks)))
    figure, axes = _figure(columns, max(8.0, width), height, title, rows=count)
    for index, (ax, kind) in enumerate(zip(axes, kinds, strict=False)):
        rows = [_padded(sites.get(f"{block}.{kind}".lstrip("."), ()), heads) for block in blocks]
        names, columns_of = blocks if index % columns == 0 else [""] * len(blocks), [str(h) for h in range(heads)]
        _heat(figure, ax, rows, names, columns_of, labels[statistic], "{:.1f}", "YlOrRd")
        ax.set_xticks(range(heads), columns_of, rotation=0, ha="center")
        ax.set_title(kind, fontsize=9, color=INK)
        ax.set_xlabel("head", fontsize=9, color=INK)
    for ax in axes[len(kinds) :]:
        ax.set_visible(False)
    return _save(figure, path)


def _padded(values: Iterable[float | None], length: int) -> list[float]:
    known = [float("nan") if v is None else v for v in values]
    return known + [float("nan")] * (length - len(known))


def oscillation_curves(result: Mapping[str, Any], path: Path) -> Path:
    """Draw the share of oscillating weights over the steps, by kind of module: up to 4 bits left, above them right."""
    wide = {kind: c for kind, c in result["kinds"].items() if c["n_bits"] > 4}
    low = {kind: c for kind, c in result["kinds"].items() if c["n_bits"] <= 4}
    panels = [(name, group) for name, group in (("up to 4 bits", low), ("above 4 bits", wide)) if group]
    title = f"{result['run']}, stage {result['stage']}: oscillating weights by module"
    figure, axes = _figure(len(panels), 5.8 * len(panels), 4.4, title)
    for ax, (name, group) in zip(axes, panels, strict=True):
        for index, (kind, curve) in enumerate(group.items()):
            style = {"color": COLORS[index % len(COLORS)], "ls": DASHES[index // len(COLORS) % len(DASHES)]}
            label = f"{kind} ({curve['n_bits']} bits, {curve['numel']:,} weights)"
            ax.plot(result["steps"], curve["oscillating_pct"], lw=1.6, label=label, **style)
        if name == "up to 4 bits":
            ax.plot(result["steps"], result["total"]["oscillating_pct"], color=INK, lw=2.2, label="all up to 4 bits")
        ax.set_ylim(bottom=0)
        ax.set_title(name, fontsize=9, color=INK)
        ax.set_xlabel("optimizer step", fontsize=9, color=INK)
        ax.set_ylabel("oscillating weights (%)", fontsize=9, color=INK)
        ax.grid(color="#dddddd", lw=0.6)
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False, ncols=2 - (len(group) < 4)
        )
    return _save(figure, path)


def allocation_bits(bits: Mapping[str, int], path: Path, *, title: str) -> Path:
    """Draw the bits of each weight or activation by block and kind."""
    named: Callable[[str], str] = layer_of if all(name.endswith(".weight") for name in bits) else str
    values = {named(name): float(n) for name, n in bits.items()}
    return block_table(values, path, title=title, label="bits", form="{:.0f}", colors="Blues", limits=(0, 8))


def run_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path, *, title: str) -> Path:
    """Draw training loss, validation top-1 and oscillating weights of several stages, each over its own steps."""
    panels = (
        ("loss", "training loss"),
        ("top1", "validation top-1 (%)"),
        ("oscillating_pct", "oscillating weights (%)"),
    )
    figure, axes = _figure(len(panels), 13.5, 4.6, title)
    for ax, (field, label) in zip(axes, panels, strict=True):
        for index, (stage, found) in enumerate(curves.items()):
            if found[field]:
                steps, values = zip(*found[field], strict=True)
                marker = "o" if field == "top1" else None
                ax.plot(steps, values, color=COLORS[index % len(COLORS)], lw=1.6, marker=marker, ms=3.5, label=stage)
        ax.set_xlabel("optimizer step of the stage", fontsize=9, color=INK)
        ax.set_ylabel(label, fontsize=9, color=INK)
        ax.grid(color="#dddddd", lw=0.6)
    axes[2].set_ylim(bottom=0)
    lines = list(axes[0].get_lines())
    lines += [line for line in axes[1].get_lines() if line.get_label() not in {x.get_label() for x in lines}]
    ends = {name: f"{name}: {found['top1'][-1][1]:.2f} %" if found["top1"] else name for name, found in curves.items()}
    names = [ends[str(line.get_label())] for line in lines]
    figure.legend(lines, names, loc="outside lower center", ncols=min(5, len(lines)), fontsize=9, frameon=False)
    return _save(figure, path)
