"""Benchmark rows: one JSON line each, append-only, and the table on the screen."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from structlayers.bench.jsonl import append_lines, read_lines
from structlayers.errors import DataError

TIMED, DISAGREES, FAILED = "timed", "disagrees", "failed"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Row:
    """One variant of one case, measured or not: ``status`` is "timed", "disagrees" (with the oracle) or "failed".

    A row has latencies exactly if it is timed; otherwise ``reason`` is the sentence that says why it has none.
    None is "not measured".
    """

    case: str
    variant: str
    structure: str
    backend: str  # as requested
    layout: str
    compiled: str  # "no", or the mode of torch.compile
    dtype: str
    device: str
    batch: int
    status: str
    reason: str = ""
    resolved_backend: str | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    throughput_per_s: float | None = None  # batch entries per second, at the median
    baseline: str | None = None  # the variant that speedup is against, timed in the same interleaved run
    speedup: float | None = None  # the baseline's median over this one's
    floor_ms: float | None = None  # weights, input and output moved once, FLOPs at the best measured rate
    parameters: int | None = None
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None  # allocated by one call beyond weights and input
    memory_source: str | None = None
    flops: int | None = None  # of one call
    energy_j: float | None = None  # of one call, by NVML's counter
    energy_per_sample_j: float | None = None
    energy_window_s: float | None = None
    power_w: float | None = None  # mean while it was called without a pause
    idle_power_w: float | None = None
    energy_reason: str = ""  # why an energy that was asked for is not there
    state: dict[str, float] = field(default_factory=dict)  # clocks, temperature, power and load before the case
    error: float | None = None  # ||out - oracle|| / ||oracle||
    worst_element: float | None = None
    tolerance: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the trained model, by the name of the metric
    machine: dict[str, object] = field(default_factory=dict)
    command: str = ""
    time: str = field(default_factory=_now)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a JSON-lines file. What is there stays, except for a last line that a killed run cut short."""
    append_lines(path, [asdict(row) for row in rows])


def read_rows(path: Path, broken: list[str] | None = None) -> list[Row]:
    """Read what ``append_rows`` wrote; ``broken`` as in :func:`structlayers.bench.jsonl.read_lines`.

    Raises ``DataError``, naming file and line, if the file cannot be read or a whole line is no row.
    """
    if not path.exists():
        raise DataError(f"{path}: cannot be read: no such file")
    return read_lines(path, parse_row, "benchmark row", broken)


def parse_row(values: dict[str, Any]) -> Row:
    """The row of one line; raises what a line that is none raises."""
    known = {entry.name for entry in fields(Row)}
    return Row(**{name: value for name, value in values.items() if name in known})


def table(rows: Sequence[Row]) -> str:
    """Rows as text for the screen: one line each, then the reasons of those without a time."""
    header = ["batch", "dtype", "variant", "backend", "p50 ms", "[p20, p80]", "samples/s", "x base", "floor"]
    header += ["peak MB", "params", "MFLOP", "error (tolerance)"]
    lines = [header, *(_cells(row) for row in rows)]
    # Text to the left, numbers to the right.
    left = {1, 2, 3, 12}
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    untimed: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.reason:
            untimed.setdefault((row.dtype, row.variant), []).append(row)
    for (dtype, variant), group in untimed.items():
        batches = ", ".join(str(row.batch) for row in group)
        text.append(f"not timed: {variant}, {dtype}, batch {batches}: {group[0].reason}")
    return "\n".join(text)


def _cells(row: Row) -> list[str]:
    backend = row.backend
    if row.resolved_backend and row.resolved_backend != row.backend:
        backend = f"{row.backend} -> {row.resolved_backend}"
    cells = [str(row.batch), row.dtype, row.variant, backend]
    if row.p20_ms is None or row.p50_ms is None or row.p80_ms is None:
        cells += [row.status, "", "", "", ""]
    else:
        cells += [
            _short(row.p50_ms),
            f"[{_short(row.p20_ms)}, {_short(row.p80_ms)}]",
            _count(row.throughput_per_s),
            "" if row.speedup is None else f"{row.speedup:.2f}",
            "" if row.floor_ms is None else f"{row.floor_ms / row.p50_ms:.0%}",
        ]
    memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.2f}"
    flops = "" if row.flops is None else f"{row.flops / 1e6:,.1f}"
    error = "" if row.error is None or row.tolerance is None else f"{row.error:.1e} ({row.tolerance:.1e})"
    return [*cells, memory, _count(row.parameters), flops, error]


def _short(value_ms: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value_ms:.3g}" if value_ms < 100 else f"{value_ms:,.0f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
