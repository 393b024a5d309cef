"""Pictures of single factors: speed-up, share of the floor, heat maps over block size and d, winners, forecasts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from structlayers.bench.case_rows import DENSE
from structlayers.bench.figures import (
    COLOURS,
    MARKERS,
    add_legend,
    draw_heat_map,
    draw_points,
    grid_of,
    grouped,
    new_figure,
    plain_numbers,
    style_of,
)
from structlayers.bench.heuristic import RULES
from structlayers.bench.kernel_rows import EXISTING, KernelRow


def factor_speedups(rows: Sequence[KernelRow]) -> Any | None:
    """Time of dense over that of auto, over the width of the layer, one panel for each dtype; layouts by colour."""
    groups = grouped(rows, lambda row: row.dtype)
    points = {
        dtype: [
            (math.sqrt(p[0] * p[1] * p[3] * p[0] * p[2] * p[3]), dense / own, row.n, row.layout)
            for row in group
            if (p := row.pattern) and (dense := row.p50_ms(DENSE)) is not None and (own := _own(row)) is not None
        ]
        for dtype, group in groups.items()
    }
    points = {dtype: found for dtype, found in points.items() if found}
    if not points:
        return None
    figure, axes = grid_of(len(points))
    batches = sorted({n for found in points.values() for _, _, n, _ in found})
    for axis, (dtype, found) in zip(axes, points.items(), strict=False):
        for layout, colour in (("batch_first", "#0072b2"), ("batch_last", "#d55e00")):
            for n, marker in zip(batches, MARKERS, strict=False):
                here = [(x, y) for x, y, own_n, own_layout in found if (own_n, own_layout) == (n, layout)]
                label = f"{layout.replace('_', '-')}, batch {n:,}"
                if here:
                    draw_points(axis, here, s=14, color=colour, marker=marker, alpha=0.7, label=label)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="width")
        axis.set_ylabel("times faster than dense")
        plain_numbers(axis)
        axis.grid(True, which="major", alpha=0.3)
    add_legend(figure, axes, 4)
    return figure


def _own(row: KernelRow) -> float | None:
    """The time of this project's best way by itself: auto, or the compiled kernel where auto was not timed."""
    return row.p50_ms("auto") or row.p50_ms("cuda")


def factor_floor_shares(rows: Sequence[KernelRow]) -> Any | None:
    """Share of the floor over all cases in the order of size: the kernel, auto, and the best of the others."""
    groups = {name: group for name, group in grouped(rows, _dtype_layout).items() if len(group) > 1}
    if not groups:
        return None
    figure, axes = grid_of(len(groups))
    for axis, (name, group) in zip(axes, groups.items(), strict=False):
        best = [entry[1] for row in group if (entry := row.best(EXISTING)) is not None]
        floors = [row.floor_ms for row in group if row.best(EXISTING) is not None]
        lines = {f"best of {', '.join(EXISTING)}": ([f / t for f, t in zip(floors, best, strict=True)], "black")}
        for contender, colour in (("auto", "#009e73"), ("cuda", "#0072b2")):
            found = [row.floor_ms / time for row in group if (time := row.p50_ms(contender)) is not None]
            if found:
                lines[contender] = (found, colour)
        for label, (shares, colour) in lines.items():
            shares = sorted(shares, reverse=True)
            axis.plot([(q + 0.5) / len(shares) for q in range(len(shares))], shares, color=colour, label=label)
        axis.set(ylim=(0, 1.05), title=name, xlabel="share of cases", ylabel="share of the floor")
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.grid(True, alpha=0.3)
    add_legend(figure, axes, 4)
    return figure


def factor_heat_maps(rows: Sequence[KernelRow]) -> Any | None:
    """Median speed-up of the kernel (auto without one) over the best of the others, by block size (b, c) and d."""
    values: dict[str, dict[tuple[tuple[int, int], int], list[float]]] = {}
    for row in rows:
        own, best = row.p50_ms("cuda") or row.p50_ms("auto"), row.best(EXISTING)
        if own is not None and best is not None:
            _, b, c, d = row.pattern
            values.setdefault(_dtype_layout(row), {}).setdefault(((b, c), d), []).append(best[1] / own)
    return _block_maps(values)


def factor_winners(rows: Sequence[KernelRow]) -> Any | None:
    """The backend that is fastest most often, by block size (b, c) and d."""
    groups = grouped(rows, _dtype_layout)
    winners: dict[str, dict[tuple[tuple[int, int], int], list[str]]] = {}
    for name, group in groups.items():
        for row in group:
            best = row.best(("cuda", *EXISTING))
            if best is not None:
                _, b, c, d = row.pattern
                winners.setdefault(name, {}).setdefault(((b, c), d), []).append(best[0])
    if not winners:
        return None
    names = list(dict.fromkeys(w for found in winners.values() for cell in found.values() for w in cell))
    colours = {name: style_of(names)[name]["color"] for name in names}
    figure, axes = _map_grid(winners)
    for axis, (name, found) in zip(axes, winners.items(), strict=False):
        blocks, ds = _block_axes(found)
        for y, block in enumerate(blocks):
            for x, d in enumerate(ds):
                cell = found.get((block, d))
                if cell:
                    winner = max(dict.fromkeys(cell), key=cell.count)
                    colour = "#444444" if colours[winner] == "black" else colours[winner]
                    axis.add_patch(_square(x, y, colour))
                    share = f"{cell.count(winner)}/{len(cell)}"
                    size = 6.5 if len(share) < 4 else 4.5
                    axis.text(x, y, share, ha="center", va="center", fontsize=size, color="white")
        _label_blocks(axis, blocks, ds, name)
    for name in names:
        axes[0].scatter([], [], color="#444444" if colours[name] == "black" else colours[name], marker="s", label=name)
    add_legend(figure, axes)
    return figure


def _square(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour, linewidth=0)


def _block_maps(
    values: Mapping[str, Mapping[tuple[tuple[int, int], int], list[float]]],
) -> Any | None:
    if not values:
        return None
    figure, axes = _map_grid(values)
    for axis, (name, found) in zip(axes, values.items(), strict=False):
        blocks, ds = _block_axes(found)

        def value(block: Any, d: Any, found: Any = found) -> float | None:
            cell = found.get((block, d))
            return statistics.median(cell) if cell else None

        draw_heat_map(axis, blocks, ds, value)
        _label_blocks(axis, blocks, ds, name)
    return figure


def _map_grid(values: Mapping[str, Mapping[tuple[Any, int], Any]]) -> tuple[Any, list[Any]]:
    """Panels of maps, three in a line, each line as high as its longest map needs."""
    columns = min(3, len(values))
    sizes = [len({block for block, _ in found}) for found in values.values()]
    heights = [1.1 + 0.2 * max(sizes[start : start + columns]) for start in range(0, len(sizes), columns)]
    figure = new_figure(12, sum(heights) + 0.4)
    axes = list(figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flat)
    for axis in axes[len(values) :]:
        axis.set_visible(False)
    return figure, axes


def _block_axes(found: Mapping[tuple[Any, int], Any]) -> tuple[list[Any], list[int]]:
    blocks = sorted({block for block, _ in found}, key=lambda block: (block[0] * block[1], block))
    return blocks, sorted({d for _, d in found})


def _label_blocks(axis: Any, blocks: Sequence[tuple[int, int]], ds: Sequence[int], name: str) -> None:
    axis.set_xlim(-0.5, len(ds) - 0.5)
    axis.set_ylim(len(blocks) - 0.5, -0.5)
    axis.set_xticks(range(len(ds)), [str(d) for d in ds], fontsize=8 if len(ds) < 8 else 6)
    axis.set_yticks(range(len(blocks)), [f"{b} x {c}" for b, c in blocks], fontsize=7)
    axis.set_xlabel("d")
    axis.set_title(name, fontsize=9)


def forecasts(rows: Sequence[KernelRow]) -> Any | None:
    """Measured over foretold speed-up, for each rule; on the diagonal it is right."""
    found = {name: rule(rows) for name, rule in RULES.items()}
    found = {name: entries for name, entries in found.items() if entries}
    if not found:
        return None
    figure = new_figure(5.6 * len(found), 4.8)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (name, entries) in zip(axes, found.items(), strict=True):
        groups = grouped(entries, lambda entry: _dtype_layout(entry.row))
        for (label, group), colour in zip(groups.items(), COLOURS, strict=False):
            draw_points(axis, ((e.foretold, e.measured) for e in group), s=9, alpha=0.6, color=colour, label=label)
        ends = [min(e.measured for e in entries), max(e.measured for e in entries)]
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.axvline(1, color="#999999", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=name, xlabel="speed-up foretold", ylabel="speed-up measured")
        plain_numbers(axis)
    add_legend(figure, axes, 4)
    return figure


def _dtype_layout(row: KernelRow) -> str:
    return f"{row.dtype}, {row.layout.replace('_', '-')}"
