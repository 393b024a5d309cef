"""Pictures of the report: what they share, and those of energy and whole models.

Each function returns a matplotlib figure, or None where there is nothing to show.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from structlayers.bench.case_rows import DENSE
from structlayers.bench.chain_calls import FROZEN, PLANNED, UNFUSED
from structlayers.bench.rows import Row
from structlayers.errors import ConfigError

# Told apart by colour-blind readers too; dense is always black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
MARKERS = "osD^vP*X"
_CHAIN_STYLE = {
    DENSE: ("black", "s"),
    "bmm": ("#d55e00", "o"),
    UNFUSED: ("#56b4e9", "v"),
    PLANNED: ("#0072b2", "D"),
    FROZEN: ("#009e73", "^"),
    "auto": ("#0072b2", "D"),
    "einsum": ("#e69f00", "P"),
    "cuda": ("#0072b2", "D"),
    "dense_built": ("#7f7f7f", "X"),
}
_MOST_PANELS = 8
# Pixels an inch of what is not drawn as outlines.
_POINTS_DPI = 160


def new_figure(width: float, height: float) -> Any:
    """An empty figure that belongs to no window. Raises ``ConfigError`` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'structlayers[bench]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg(figure: Any) -> str:
    """A figure as an SVG that stands alone; the same figure gives the same text."""
    from matplotlib import rc_context

    text = io.StringIO()
    # Text as text, and its family named in short: as outlines it is half of a picture full of numbers.
    with rc_context({"svg.hashsalt": "structlayers", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(text, format="svg", dpi=_POINTS_DPI, metadata={"Date": None})
    return text.getvalue()


def draw_points(axis: Any, points: Iterable[tuple[float, float]], **look: Any) -> None:
    """Points without lines, as pixels: thousands of them as outlines would make a picture of megabytes."""
    axis.scatter(*zip(*points, strict=True), rasterized=True, **look)


def style_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker for every contender, the known ones always the same."""
    found: dict[str, dict[str, Any]] = {}
    free = [(colour, marker) for colour, marker in zip(COLOURS, MARKERS, strict=True)]
    taken = {_CHAIN_STYLE[name] for name in names if name in _CHAIN_STYLE}
    free = [entry for entry in free if entry[0] not in {colour for colour, _ in taken}] or free
    for name in names:
        colour, marker = _CHAIN_STYLE.get(name) or free[len(found) % len(free)]
        found[name] = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.5, "label": name}
    return found


def plain_numbers(axis: Any) -> None:
    """Numbers as they are read, 0.5 and 2 and 1000, on axes that are logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for line in (axis.xaxis, axis.yaxis):
        if line.get_scale() == "log":
            low, high = line.get_view_interval()
            few = high / low < 100
            line.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=12))
            line.set_major_formatter("{x:g}")
            line.set_minor_formatter(NullFormatter())


def add_legend(figure: Any, panels: Iterable[Any], columns: int = 6) -> None:
    handles: dict[str, Any] = {}
    for panel in panels:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9)


def draw_heat_map(
    axis: Any, lines: Sequence[Any], columns: Sequence[Any], value: Callable[[Any, Any], float | None]
) -> None:
    """Cells coloured by the logarithm of a ratio: blue above 1, red below, the number inside."""
    from matplotlib.colors import TwoSlopeNorm

    grid = [[value(line, column) for column in columns] for line in lines]
    logs = [[math.nan if v is None or v <= 0 else math.log2(v) for v in line] for line in grid]
    most = max((abs(v) for line in logs for v in line if v == v), default=1.0) or 1.0
    most = max(most, 0.1)
    axis.imshow(logs, cmap="RdBu", norm=TwoSlopeNorm(0, -most, most), aspect="auto")
    for y, line in enumerate(grid):
        for x, entry in enumerate(line):
            if entry is not None:
                dark = abs(math.log2(entry)) > 0.6 * most if entry > 0 else False
                text = (
                    f"{entry:.2f}"
                    if entry < 10 and len(columns) < 8
                    else f"{entry:.1f}"
                    if entry < 10
                    else f"{entry:.0f}"
                )
                axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axis.set_xticks(range(len(columns)), [f"{column:,}" for column in columns], fontsize=8)
    axis.set_yticks(range(len(lines)), [str(line) for line in lines], fontsize=7)


def grid_of(count: int) -> tuple[Any, list[Any]]:
    columns = min(4, count)
    lines = -(-count // columns)
    figure = new_figure(max(3.3 * columns, 6), 3.2 * lines + 0.5)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def grouped(rows: Iterable[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(list(groups.items())[:_MOST_PANELS])


def energy_over_time(points: Mapping[str, Sequence[tuple[float, float]]], idle_w: float | None) -> Any | None:
    """Joules over milliseconds of one call by contender, with lines of equal power."""
    points = {name: found for name, found in points.items() if found}
    if not points:
        return None
    figure = new_figure(8, 5.5)
    axis = figure.subplots()
    style = style_of(points)
    for name, found in points.items():
        look = {key: style[name][key] for key in ("color", "marker", "label")}
        draw_points(axis, found, s=16, alpha=0.7, **look)
    times = [time for found in points.values() for time, _ in found]
    for power in (100, 200, 400, 700):
        ends = (min(times), max(times))
        axis.plot(ends, [power * time * 1e-3 for time in ends], color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.text(ends[1], power * ends[1] * 1e-3, f" {power} W", fontsize=7, color="#777777")
    axis.set(xscale="log", yscale="log", xlabel="milliseconds of one call", ylabel="joules of one call")
    plain_numbers(axis)
    axis.set_title("" if idle_w is None else f"idle power {idle_w:.0f} W", fontsize=10)
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8)
    return figure


# What a variant of a model is called in its rows ("structure") where its weights are those of the dense model.
_DENSE_WEIGHTS = ("dense", "one factor")


def model_split(splits: Sequence[tuple[str, float, float]]) -> Any | None:
    """Latency of whole models, the part of their linears and the rest: (label, linear ms, other ms) each."""
    if not splits:
        return None
    figure = new_figure(11, 0.9 + 0.32 * len(splits))
    axis = figure.subplots()
    places = range(len(splits))
    axis.barh(places, [other for *_, other in splits], color="#999999", label="other")
    linear = [time for _, time, _ in splits]
    axis.barh(places, linear, left=[other for *_, other in splits], color="#0072b2", label="linears replaced")
    axis.set_yticks(places, [label for label, *_ in splits], fontsize=8)
    axis.set_ylim(len(splits) - 0.4, -0.6)
    axis.set_xlabel("milliseconds")
    axis.legend(fontsize=8)
    return figure


def model_speedups(rows: Sequence[Row]) -> Any | None:
    """Times faster than dense in the same mode, a bar for each variant, those of dense weights in grey."""
    found = [
        (f"{row.case}, {row.variant}, {row.dtype}, batch {row.batch}", row.speedup, row.structure in _DENSE_WEIGHTS)
        for row in rows
        if row.speedup is not None and row.variant != row.baseline and row.structure != "free"
    ]
    if not found:
        return None
    figure = new_figure(11, 0.9 + 0.3 * len(found))
    axis = figure.subplots()
    for dense, color, label in ((False, "#0072b2", "structured"), (True, "#999999", "dense weights")):
        kind = [(place, ratio) for place, (_, ratio, is_dense) in enumerate(found) if is_dense is dense]
        if kind:
            axis.barh(*zip(*kind, strict=True), color=color, label=label)
    axis.set_yticks(range(len(found)), [label for label, *_ in found], fontsize=8)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.legend(fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("times faster than dense in the same mode")
    return figure
