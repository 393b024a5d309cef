"""Rows of the kernel benchmark, one JSON line per case, and what they amount to."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from structlayers.bench.grid import neighbour
from structlayers.bench.jsonl import append_lines, compact, read_lines
from structlayers.bench.products import DENSE, DENSE_BUILT
from structlayers.bench.results import Result
from structlayers.bench.timing import EAGER
from structlayers.patterns import Pattern

# What the kernels are measured against: the best of what PyTorch offers.
EXISTING = ("einsum", "bmm", DENSE)
# What auto chooses from.
_CHOICES = ("cuda", "einsum", "bmm", DENSE_BUILT)
# Below this floor a launch is a large part of the time.
_SHORTEST_FLOOR_MS = 0.020
_WIDE = 768


@dataclass
class KernelRow:
    """One product with one factor, by every contender, timed in turns in one run."""

    pattern: tuple[int, int, int, int]
    n: int
    dtype: str  # "tf32" is float32 under float32 matmul precision "high", "float32" under "highest"
    layout: str
    tuned: bool  # whether the tuning cache had this case
    floor_ms: float
    results: list[Result]
    copy_gb_per_s: float
    matmul_gflop_per_s: float
    commit: str | None = None
    gpu: str | None = None
    driver: str | None = None
    torch: str | None = None
    clocks: str | None = None  # of older rows, as the driver's command prints them
    state: dict[str, float] = field(default_factory=dict)  # clocks, temperature, power and load after the case
    idle_power_w: float | None = None
    busy: str | None = None  # why the timings are doubtful
    command: str | None = None
    timing: str = EAGER  # as of older rows
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def case(self) -> tuple[object, ...]:
        """What makes two rows the same measurement."""
        return (self.pattern, self.n, self.dtype, self.layout, self.tuned, self.timing)

    def result(self, contender: str) -> Result | None:
        return next((result for result in self.results if result.contender == contender), None)

    def p50_ms(self, contender: str) -> float | None:
        result = self.result(contender)
        return None if result is None else result.p50_ms

    def best(self, contenders: Iterable[str]) -> tuple[str, float] | None:
        """The fastest of some contenders and its median; None where none was timed."""
        timed = [(time, name) for name in contenders if (time := self.p50_ms(name)) is not None]
        return (min(timed)[1], min(timed)[0]) if timed else None


def append_row(path: Path, row: KernelRow) -> None:
    """Append to a JSON-lines file, after cutting off a last line that a killed run left unfinished."""
    append_lines(path, [compact(asdict(row))])


def read_rows(path: Path, broken: list[str] | None = None) -> list[KernelRow]:
    """What :func:`append_row` wrote; ``broken`` as in :func:`structlayers.bench.jsonl.read_lines`."""
    return read_lines(path, parse_row, "row of the kernel benchmark", broken)


def parse_row(values: dict[str, Any]) -> KernelRow:
    """The row of one line; raises what a line that is none raises."""
    known = {entry.name for entry in fields(KernelRow)}
    values = {name: value for name, value in values.items() if name in known}
    values["pattern"] = tuple(Pattern.of_entries(values["pattern"]))
    values["results"] = [Result(**result) for result in values["results"]]
    return KernelRow(**values)


# ---- text


HEADER = (
    f"{'pattern':>20} {'n':>6} {'dtype':>8} {'layout':>11} {'floor us':>9} {'best existing':>22} "
    f"{'cuda us':>9} {'tile':>12} {'share':>6} {'x best':>6}  auto"
)


def line(row: KernelRow) -> str:
    """One row as a line of the table under :data:`HEADER`, and one more for every contender that went wrong."""
    existing, cuda, auto = row.best(EXISTING), row.result("cuda"), row.result("auto")
    cells = [f"{row.pattern}".replace(" ", "").rjust(20), f"{row.n:>6} {row.dtype:>8} {row.layout:>11}"]
    cells += [
        f"{row.floor_ms * 1e3:>9.1f}",
        f"{existing[0]} {existing[1] * 1e3:.1f}".rjust(22) if existing else " " * 22,
    ]
    if cuda is not None and cuda.p50_ms is not None:
        cells += [f"{cuda.p50_ms * 1e3:>9.1f} {cuda.tile:>12} {row.floor_ms / cuda.p50_ms:>6.0%}"]
        cells += [f"{existing[1] / cuda.p50_ms:>6.2f}" if existing else " " * 6]
    else:
        cells += [" " * 36]
    if auto is not None and auto.p50_ms is not None:
        cells += [f" {auto.resolved} {auto.p50_ms * 1e3:.1f}"]
    wrong = [f"    {r.contender}: {r.status}: {r.reason}" for r in row.results if r.status in ("disagrees", "failed")]
    return "\n".join([" ".join(cells), *wrong])


def summary(rows: Sequence[KernelRow]) -> str:
    """What the targets of the kernels ask for, by dtype and layout, with the targets beside."""
    text = []
    for dtype, layout in sorted({(row.dtype, row.layout) for row in rows}):
        group = [row for row in rows if (row.dtype, row.layout) == (dtype, layout)]
        text.append(f"{dtype}, {layout}: {len(group)} cases, {_count_wrong(group)} wrong or failed results")
        text += [f"  {entry}" for entry in (*_speed(group), *_wide(group), *_accuracy(group), *_odd(group))]
    for tuned in (False, True):
        group = [row for row in rows if row.tuned is tuned]
        text += _regret(group, "tuned" if tuned else "untuned")
    return "\n".join(text)


def _count_wrong(rows: Sequence[KernelRow]) -> int:
    return sum(result.status in ("disagrees", "failed") for row in rows for result in row.results)


def _speed(rows: Sequence[KernelRow]) -> list[str]:
    shares = [(row.floor_ms / time, row) for row in rows if (time := row.p50_ms("cuda")) is not None]
    text = []
    long = [entry for entry in shares if entry[1].floor_ms >= _SHORTEST_FLOOR_MS]
    if shares:
        text.append(f"share of floor: median {statistics.median(share for share, _ in shares):.0%}")
    if long:
        worst, row = min(long, key=lambda entry: entry[0])
        median = statistics.median(share for share, _ in long)
        text.append(
            f"share of floor, floor >= 20 us ({len(long)} cases): median {median:.0%}, worst {worst:.0%} "
            f"at {row.pattern} (targets: 16-bit batch-first 80 % and 50 %, tf32 batch-first 70 %)"
        )
    ratios = [
        (best[1] / time, row)
        for row in rows
        if (time := row.p50_ms("cuda")) is not None and (best := row.best(EXISTING)) is not None
    ]
    if ratios:
        worst, row = min(ratios, key=lambda entry: entry[0])
        median = statistics.median(ratio for ratio, _ in ratios)
        text.append(
            f"times faster than the best of {', '.join(EXISTING)}: median {median:.2f}, worst {worst:.2f} "
            f"at {row.pattern} (targets: batch-first 3, batch-last 2)"
        )
    return text


def _wide(rows: Sequence[KernelRow]) -> list[str]:
    """Blocks so wide that arithmetic binds."""
    ratios = [
        (best[1] / time, row.pattern)
        for row in rows
        if row.pattern[1] == row.pattern[2] >= _WIDE
        and (time := row.p50_ms("cuda")) is not None
        and (best := row.best(EXISTING)) is not None
    ]
    if not ratios:
        return []
    worst, pattern = min(ratios)
    return [f"b = c >= {_WIDE}: {worst:.2f} times the speed of cuBLAS at worst, {pattern} (target 0.8)"]


def _accuracy(rows: Sequence[KernelRow]) -> list[str]:
    ratios = [
        (cuda.error / bmm.error, row.pattern)
        for row in rows
        if row.dtype == "float32"
        and (cuda := row.result("cuda")) is not None
        and (bmm := row.result("bmm")) is not None
        and cuda.error is not None
        and bmm.error
    ]
    if not ratios:
        return []
    text = []
    for c in (64, 256, 1024, None):
        found = [entry for entry in ratios if c is None or entry[1][2] == c]
        if found:
            worst, pattern = max(found)
            text.append(f"{'all c' if c is None else f'c = {c}'}: {worst:.2f} at {pattern}")
    return [f"error over that of cuBLAS float32 (bmm), worst: {'; '.join(text)} (target 2)"]


def _odd(rows: Sequence[KernelRow]) -> list[str]:
    """Time per byte of unaligned patterns over that of their aligned neighbours, where both are there."""

    def time_per_byte(row: KernelRow) -> float | None:
        time = row.p50_ms("cuda")
        return None if time is None else time / Pattern(*row.pattern).bytes(row.n, 1)

    ratios: dict[str, list[tuple[float, tuple[int, ...]]]] = {}
    for row in rows:
        pattern = Pattern(*row.pattern)
        twins = [r for r in rows if r.pattern == tuple(neighbour(pattern)) and r.n == row.n + 1]
        mine = time_per_byte(row)
        if neighbour(pattern) == pattern or not twins or mine is None:
            continue
        other = time_per_byte(twins[0])
        if other is None:
            continue
        lengths = (pattern.in_features, pattern.out_features) if row.layout == "batch_first" else (row.n,)
        kind = "odd" if any(length % 2 for length in lengths) else "even"
        ratios.setdefault(kind, []).append((mine / other, row.pattern))
    text = [f"{kind} rows {max(found)[0]:.2f} at {max(found)[1]}" for kind, found in sorted(ratios.items())]
    if not text:
        return []
    return [
        f"time per byte over the aligned neighbour's, worst: {'; '.join(text)} (targets: 1.4 even, 2 odd in 16 bits)"
    ]


def _regret(rows: Sequence[KernelRow], name: str) -> list[str]:
    """How much slower auto is than the best that it could have chosen: by its choice, and as timed itself."""
    text = []
    for n in sorted({row.n for row in rows}):
        group = [row for row in rows if row.n == n]
        chosen = _regrets(
            group, lambda row, auto: row.p50_ms(DENSE_BUILT if auto.resolved == "dense" else str(auto.resolved))
        )
        timed = _regrets(group, lambda row, auto: auto.p50_ms)
        if chosen and timed:
            text.append(
                f"auto, {name}, n = {n}: slower than the best by {_percentiles(chosen)} (choice), "
                f"{_percentiles(timed)} (timed)"
            )
    if not text:
        return []
    target = "max(5 %, 0.5 us) at worst" if name == "tuned" else "3 % in the median, 20 % at worst"
    return [*text, f"  (target: {target})"]


def _regrets(
    rows: Sequence[KernelRow], time_of: Callable[[KernelRow, Result], float | None]
) -> list[tuple[float, float, KernelRow]]:
    """(share, milliseconds, row) above the best."""
    found = []
    for row in rows:
        auto, best = row.result("auto"), row.best(_CHOICES)
        if auto is None or best is None:
            continue
        time = time_of(row, auto)
        if time is not None:
            found.append((max(0.0, time / best[1] - 1), max(0.0, time - best[1]), row))
    return found


def _percentiles(regrets: list[tuple[float, float, KernelRow]]) -> str:
    worst = max(regrets, key=lambda entry: entry[0])
    where = f"{worst[2].pattern} {worst[2].dtype} {worst[2].layout}"
    median = statistics.median(entry[0] for entry in regrets)
    return f"{median:.1%} median, {worst[0]:.0%} = {worst[1] * 1e3:.1f} us worst at {where}"
