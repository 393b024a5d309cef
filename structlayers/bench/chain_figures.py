"""Pictures of chains: dense, bmm, unfused and planned against the floor, over width and batch."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from structlayers.bench.case_rows import CHAIN, CaseRow
from structlayers.bench.chain_calls import PLANNED
from structlayers.bench.figures import add_legend, draw_heat_map, new_figure, style_of
from structlayers.errors import DataError
from structlayers.patterns import Chain


def chain_times(rows: Sequence[CaseRow]) -> Any | None:
    """Time over width at three batches, and over the batch at three widths, with the floor; square chains."""
    square = [
        row for row in rows if row.kind == CHAIN and row.in_features == row.out_features and row.suite != "frozen"
    ]
    square = _one_family(square)
    if len({(row.in_features, row.n) for row in square}) < 2:
        return None
    batches, widths = sorted({row.n for row in square}), sorted({row.in_features for row in square})
    panels = [("width", n, [row for row in square if row.n == n]) for n in _three(batches)]
    panels += [("batch", w, [row for row in square if row.in_features == w]) for w in _three(widths)]
    names = list(dict.fromkeys(r.contender for row in square for r in row.results if r.p50_ms is not None))
    style = style_of(names)
    figure = new_figure(12, 7.5)
    axes = figure.subplots(2, 3, squeeze=False)
    for axis, (over, fixed, group) in zip(_two_lines(axes, panels), panels, strict=True):
        x_of = _width if over == "width" else _batch
        group = sorted(group, key=x_of)
        for name in names:
            line = [(x_of(row), time * 1e3) for row in group if (time := row.p50_ms(name)) is not None]
            if line:
                axis.plot([x for x, _ in line], [time for _, time in line], **style[name])
        floor = [(x_of(row), row.floor_ms * 1e3) for row in group if row.floor_ms is not None]
        axis.plot([x for x, _ in floor], [time for _, time in floor], "k:", linewidth=1.5, label="floor")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({x_of(row) for row in group}))
        axis.set_xticklabels([f"{x_of(row):,}" for row in _unique(group, x_of)], fontsize=8, rotation=30)
        axis.set_title(
            f"batch {fixed:,}, over width" if over == "width" else f"width {fixed:,}, over batch", fontsize=10
        )
        axis.set_ylabel("microseconds")
        axis.grid(True, which="major", alpha=0.3)
    for axis in axes.flat:
        axis.set_visible(bool(axis.lines))
    first = square[0]
    figure.suptitle(f"time of one product, {first.dtype}, {first.layout.replace('_', '-')}", fontsize=11)
    add_legend(figure, axes.flat)
    return figure


def _two_lines(axes: Any, panels: Sequence[tuple[str, int, Any]]) -> list[Any]:
    """Axes of the panels: those over width above, those over the batch below."""
    columns = {"width": 0, "batch": 0}
    chosen = []
    for over, *_ in panels:
        chosen.append(axes[0 if over == "width" else 1][columns[over]])
        columns[over] += 1
    return chosen


def chain_speedups(rows: Sequence[CaseRow]) -> Any | None:
    """Time of dense over that of the planned chain, a cell for each width and batch; one map for each number of blocks.

    Square chains with at least two batches or widths.
    """
    square = [row for row in rows if row.kind == CHAIN and row.in_features == row.out_features and row.suite == "sweep"]
    square = square or [row for row in rows if row.kind == CHAIN and row.suite != "frozen"]
    groups: dict[str, list[CaseRow]] = {}
    for row in square:
        if row.ratio(PLANNED) is not None:
            groups.setdefault(f"{row.dtype}, {row.layout.replace('batch_', 'batch-')}", []).append(row)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    if not groups:
        return None
    figure = new_figure(12, sum(1.4 + 0.3 * len({_label(r) for r in group}) for group in groups.values()))
    heights = [1.4 + 0.3 * len({_label(row) for row in group}) for group in groups.values()]
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
    for axis, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
        lines = sorted({(row.in_features, row.out_features, _label(row)) for row in group})
        batches = sorted({row.n for row in group})
        values = {(_label(row), row.n): row.ratio(PLANNED) for row in group}

        def value(line: str, n: int, values: dict[tuple[str, int], float | None] = values) -> float | None:
            return values.get((line, n))

        draw_heat_map(axis, [label for *_, label in lines], batches, value)
        axis.set_xlabel("batch")
        axis.set_title(f"times faster than dense, planned chain, {name}", fontsize=10)
    return figure


def _label(row: CaseRow) -> str:
    return row.case if len(row.case) < 45 else f"{row.in_features} -> {row.out_features}"


def plot_chains(rows: Sequence[CaseRow], path: Path) -> None:
    """Write dense, bmm, unfused and planned against the floor as a PNG; ``DataError`` if there is too little for it."""
    figure = chain_times(rows)
    if figure is None:
        raise DataError("no square chain was timed at two widths or batches, so there is nothing to plot")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _one_family(rows: Sequence[CaseRow]) -> list[CaseRow]:
    """Rows of one dtype and layout, the most frequent, and for each width of the chain with the fewest parameters."""
    kinds = [(row.dtype, row.layout) for row in rows]
    if not kinds:
        return []
    kind = max(dict.fromkeys(kinds), key=kinds.count)
    chosen: dict[tuple[int, int], CaseRow] = {}
    for row in rows:
        if (row.dtype, row.layout) == kind and "butterfly" not in row.case:
            place = (row.in_features, row.n)
            if place not in chosen or _kept(row) < _kept(chosen[place]):
                chosen[place] = row
    return list(chosen.values())


def _kept(row: CaseRow) -> float:
    return Chain.parse(row.spec).kept


def _width(row: CaseRow) -> int:
    return row.in_features


def _batch(row: CaseRow) -> int:
    return row.n


def _unique(rows: Iterable[CaseRow], key: Callable[[CaseRow], int]) -> list[CaseRow]:
    return sorted({key(row): row for row in rows}.values(), key=key)


def _three(values: Sequence[int]) -> list[int]:
    """The smallest, the middle and the largest of sorted values."""
    return sorted({values[0], values[len(values) // 2], values[-1]})
