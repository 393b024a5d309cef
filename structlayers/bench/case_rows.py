"""Rows of the chain and training benchmarks, one JSON line per case, and the table on the screen."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from structlayers.bench.jsonl import append_lines, compact, read_lines
from structlayers.bench.results import Result
from structlayers.bench.rows import TIMED

CHAIN, CHAIN_TRAINING, TRAINING_STEP = "chain", "chain_training", "training_step"
KINDS = (CHAIN, CHAIN_TRAINING, TRAINING_STEP)
DENSE = "dense"


@dataclass
class CaseRow:
    """One case by every contender, timed in turns in one run."""

    kind: str
    case: str  # "1024 -> 4096, 4 blocks"
    spec: str  # the chain, or what else the case is made of
    in_features: int
    out_features: int
    n: int
    dtype: str  # "tf32" is float32 under float32 matmul precision "high", "float32" under "highest"
    layout: str
    timing: str  # how: see the benchmark
    results: list[Result]
    floor_ms: float | None = None
    suite: str = ""
    contender: str = ""  # the one that the target is about
    target: float | None = None  # least time of dense over that of the contender
    like: str = ""  # the case whose time the contender is to reach within 5 %
    copy_gb_per_s: float | None = None
    matmul_gflop_per_s: float | None = None
    idle_power_w: float | None = None
    state: dict[str, float] = field(default_factory=dict)  # clocks, temperature, power and load before the case
    machine: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows the same measurement."""
        return (self.kind, self.case, self.spec, self.n, self.dtype, self.layout, self.timing)

    def result(self, contender: str) -> Result | None:
        return next((result for result in self.results if result.contender == contender), None)

    def p50_ms(self, contender: str) -> float | None:
        result = self.result(contender)
        return None if result is None else result.p50_ms

    def ratio(self, contender: str) -> float | None:
        """Time of dense over that of ``contender``, of one run; None where one of them has none."""
        dense, own = self.p50_ms(DENSE), self.p50_ms(contender)
        return None if dense is None or own is None else dense / own


def append_row(path: Path, row: CaseRow) -> None:
    """Append to a JSON-lines file; what a killed run left unfinished goes."""
    append_lines(path, [compact(asdict(row))])


def read_rows(path: Path, broken: list[str] | None = None) -> list[CaseRow]:
    """What :func:`append_row` wrote; ``broken`` as in :func:`structlayers.bench.jsonl.read_lines`."""
    return read_lines(path, parse_row, "row of the chain or training benchmark", broken)


def parse_row(values: dict[str, Any]) -> CaseRow:
    """The row of one line; raises what a line that is none raises."""
    known = {entry.name for entry in fields(CaseRow)}
    values = {name: value for name, value in values.items() if name in known}
    if values["kind"] not in KINDS:
        raise ValueError(f"kind = {values['kind']!r}: expected one of {list(KINDS)}")
    values["results"] = [Result(**result) for result in values["results"]]
    return CaseRow(**values)


# ---- text


def table(rows: Sequence[CaseRow]) -> str:
    """One line per case: times in microseconds, dense over each of the others, the share of the floor, the target.

    Below it what else was measured: wall times, peak memory, energy; then what was not timed, and why.
    """
    text = ["x NAME: time of dense over that of NAME, in one run", *aligned(time_cells(rows), left={0, 2, 3, -1})]
    more = other_cells(rows)
    if more:
        text += ["", *aligned(more, left={0, 2, 3})]
    return "\n".join([*text, *_untimed(rows)])


def time_cells(rows: Sequence[CaseRow]) -> list[list[str]]:
    """The cells of the table, its header first."""
    contenders = list(dict.fromkeys(result.contender for row in rows for result in row.results))
    others = [name for name in contenders if name != DENSE]
    header = ["case", "N", "dtype", "layout", "floor us", *(f"{name} us" for name in contenders)]
    lines = [[*header, *(f"x {name}" for name in others), "of floor", "target", "verdict"]]
    for row in rows:
        cells = [*_case_cells(row), micro(row.floor_ms)]
        cells += [_time(row, name) for name in contenders]
        ratios = [row.ratio(name) for name in others]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        own = row.p50_ms(row.contender)
        cells += ["" if own is None or row.floor_ms is None else f"{row.floor_ms / own:.0%}"]
        lines.append([*cells, "" if row.target is None else f"{row.target:.2f}", verdict(row, rows)])
    return lines


_OTHER_COLUMNS: dict[str, Callable[[Result], str]] = {
    "wall us": lambda result: micro(result.wall_ms),
    "peak MB": lambda result: "" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 1e6:.1f}",
    "mJ": lambda result: "" if result.energy_j is None else f"{result.energy_j * 1e3:.3g}",
    "W": lambda result: "" if result.power_w is None else f"{result.power_w:.0f}",
}


def other_cells(rows: Sequence[CaseRow]) -> list[list[str]]:
    """Wall time, peak memory, energy and mean power by contender, the header first; empty if none was measured."""
    contenders = list(dict.fromkeys(result.contender for row in rows for result in row.results))
    columns = [
        (what, name, show)
        for what, show in _OTHER_COLUMNS.items()
        for name in contenders
        if any(show(result) for row in rows for result in row.results if result.contender == name)
    ]
    if not columns:
        return []
    lines = [["case", "N", "dtype", "layout", *(f"{name} {what}" for what, name, _ in columns)]]
    for row in rows:
        found = [(show, row.result(name)) for _, name, show in columns]
        lines.append([*_case_cells(row), *("" if result is None else show(result) for show, result in found)])
    return lines


def _case_cells(row: CaseRow) -> list[str]:
    return [row.case, str(row.n), row.dtype, row.layout.removeprefix("batch_")]


def _untimed(rows: Sequence[CaseRow]) -> list[str]:
    """What has no time and why, one line for each reason."""
    found: dict[tuple[str, str, str], list[CaseRow]] = {}
    for row in rows:
        for result in row.results:
            if result.status != TIMED:
                found.setdefault((result.contender, result.status, result.reason), []).append(row)
    return [
        f"{contender} {status} in {len(group)} case(s), {group[0].case}, N = {group[0].n}, {group[0].dtype}: {reason}"
        for (contender, status, reason), group in found.items()
    ]


def verdict(row: CaseRow, rows: Sequence[CaseRow]) -> str:
    """Whether a row's contender reaches what it is to reach: "met", "missed", or "" where nothing is asked or known."""
    ratio, own = row.ratio(row.contender), row.p50_ms(row.contender)
    if row.like:
        twin = next((r for r in rows if r.case == row.like and r.key[3:] == row.key[3:]), None)
        other = None if twin is None else twin.p50_ms(row.contender)
        if own is None or other is None:
            return ""
        return f"{'met' if own <= 1.05 * other else 'missed'} ({own / other:.2f} of {row.like})"
    if row.target is None or ratio is None:
        return ""
    return "met" if ratio >= row.target else "missed"


def aligned(lines: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Lines of cells as text under a header line: columns of ``left`` (from the end below 0) to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if column in left or column - len(line) in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return text


def micro(time_ms: float | None) -> str:
    """A time in microseconds as text; "" for None."""
    return "" if time_ms is None else f"{time_ms * 1e3:.1f}"


def _time(row: CaseRow, contender: str) -> str:
    result = row.result(contender)
    return "" if result is None else micro(result.p50_ms) or result.status
