"""A picture of benchmark rows: latency and speed-up over the batch size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from structlayers.bench.rows import Row
from structlayers.errors import ConfigError, DataError

# Told apart by colour-blind readers too; the baseline is always black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
_MARKERS = "osD^vP*X"


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: per dtype and device one line of panels, latency (p20 to p80 shaded) and speed-up over the baseline.

    Raises ``ConfigError`` if matplotlib is not installed, ``DataError`` if no row is timed.
    """
    timed = [row for row in rows if row.p50_ms is not None]
    if not timed:
        raise DataError("no row was timed, so there is nothing to plot")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: pip install 'structlayers[bench]', or plot=false for no plot"
        ) from error

    groups = list(dict.fromkeys((row.dtype, row.device) for row in timed))
    variants = list(dict.fromkeys(row.variant for row in timed))
    baselines = {row.baseline for row in timed}
    others = [variant for variant in variants if variant not in baselines]
    style = {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(others)}
    style |= {name: ("black", _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(sorted(map(str, baselines)))}

    # No pyplot: it would hold the figure in a global list and look for a display.
    figure = Figure(figsize=(11, 0.9 + 3.7 * len(groups) + 0.22 * len(variants)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (dtype, device), (latency, speedup) in zip(groups, panels, strict=True):
        here = [row for row in timed if (row.dtype, row.device) == (dtype, device)]
        batches = sorted({row.batch for row in here})
        for variant in variants:
            line = sorted((row for row in here if row.variant == variant), key=lambda row: row.batch)
            if not line:
                continue
            colour, marker = style[variant]
            x = [row.batch for row in line]
            dashes = "--" if line[0].compiled != "no" else "-"
            look = {"color": colour, "marker": marker, "markersize": 5, "linestyle": dashes, "label": variant}
            latency.plot(x, [row.p50_ms for row in line], **look)
            latency.fill_between(
                x, [row.p20_ms for row in line], [row.p80_ms for row in line], color=colour, alpha=0.15, linewidth=0
            )
            if variant not in baselines:
                ratios = [(row.batch, row.speedup) for row in line if row.speedup is not None]
                speedup.plot([n for n, _ in ratios], [ratio for _, ratio in ratios], **look)
        speedup.axhline(1.0, color="black", linewidth=1)
        speedup.set_ylim(bottom=0)
        latency.set_yscale("log")
        latency.yaxis.set_major_formatter("{x:g}")
        latency.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
        for panel in (latency, speedup):
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, [f"{n:,}" for n in batches])
            panel.set_xlabel("batch size")
            panel.grid(True, which="major", alpha=0.3)
        latency.set_ylabel("latency, ms")
        speedup.set_ylabel("times faster than dense")
        latency.set_title(f"{dtype} on {device}: median latency, p20 to p80 shaded", fontsize=10)
        speedup.set_title("speed-up over dense, same mode (above 1: faster)", fontsize=10)
    first = timed[0]
    machine = first.machine.get("gpu") if first.device.startswith("cuda") else first.machine.get("cpu")
    figure.suptitle(f"{first.case}\n{machine or first.device}, torch {first.machine.get('torch', '?')}", fontsize=11)
    handles: dict[str, Any] = {}
    for panel in panels[:, 0]:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(3, len(variants)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
