"""Every kind of benchmark row in one shape: what the report and the comparison of two files read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structlayers.bench import case_rows, kernel_rows, rows
from structlayers.bench.case_rows import CaseRow
from structlayers.bench.jsonl import read_lines
from structlayers.bench.kernel_rows import KernelRow
from structlayers.bench.rows import Row
from structlayers.errors import DataError

FACTOR, MODEL = "factor", "model"


@dataclass(frozen=True)
class Measurement:
    """One contender of one case, measured or not; None is "not measured"."""

    kind: str  # "factor", "chain", "chain_training", "training_step" or "model"
    case: str
    contender: str
    n: int
    dtype: str
    layout: str
    timing: str
    status: str
    reason: str = ""
    resolved: str | None = None
    plan: str | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    floor_ms: float | None = None
    energy_j: float | None = None
    energy_reason: str = ""
    peak_memory_bytes: int | None = None
    weight_bytes: int | None = None

    @property
    def case_key(self) -> tuple[object, ...]:
        """What all contenders of one case share."""
        return (self.kind, self.case, self.n, self.dtype, self.layout, self.timing)

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two measurements the same one, in two files."""
        return (*self.case_key, self.contender)


@dataclass
class ResultFiles:
    """The rows of one or more files by their kind, one of each case; ``broken`` are the lines that are none."""

    factors: list[KernelRow] = field(default_factory=list)
    cases: list[CaseRow] = field(default_factory=list)
    models: list[Row] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.factors or self.cases or self.models)

    def of_kind(self, kind: str) -> list[CaseRow]:
        return [row for row in self.cases if row.kind == kind]

    @property
    def rows(self) -> "list[KernelRow | CaseRow | Row]":
        """All of them."""
        return [*self.factors, *self.cases, *self.models]

    @property
    def with_rates(self) -> "list[KernelRow | CaseRow]":
        """The rows that name the rates of the machine."""
        return [*self.factors, *self.cases]

    def machines(self) -> list[str]:
        """The machines and versions that the rows were measured on, in words."""
        found = [
            f"{row.gpu}{f', driver {row.driver}' if row.driver else ''}, torch {row.torch}, commit {row.commit}"
            f"{f' ({row.busy})' if row.busy else ''}"
            for row in self.factors
            if row.gpu
        ]
        machines = [row.machine for row in self.cases] + [row.machine for row in self.models]
        found += [machine_text(machine) for machine in machines if machine]
        return list(dict.fromkeys(found))

    def measurements(self) -> list[Measurement]:
        """All of them in one shape."""
        return [
            *(entry for row in self.factors for entry in _of_factor(row)),
            *(entry for row in self.cases for entry in _of_case(row)),
            *(_of_model(row) for row in self.models),
        ]


def read_files(paths: Iterable[Path]) -> ResultFiles:
    """Rows of any benchmark of this project; a line that is none is noted in ``broken`` and the others are read.

    Raises ``DataError`` for a file that is not there.
    """
    found = ResultFiles()
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: cannot be read: no such file")
        found.paths.append(path)
        for row in read_lines(path, _parse, "benchmark row", found.broken):
            if isinstance(row, KernelRow):
                found.factors.append(row)
            elif isinstance(row, CaseRow):
                found.cases.append(row)
            else:
                found.models.append(row)
    found.factors = _merged(found.factors, lambda row: row.case)
    found.cases = _merged(found.cases, lambda row: row.key)
    newest = {_model_key(row): row for row in found.models}
    found.models = list(newest.values())
    return found


def machine_text(machine: dict[str, Any]) -> str:
    """A machine of a row in words."""
    where = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} thread(s)"
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    busy = f" ({machine['busy']})" if machine.get("busy") else ""
    return f"{where}{driver}, torch {machine.get('torch')}, commit {machine.get('commit')}{busy}"


def _parse(values: dict[str, Any]) -> KernelRow | CaseRow | Row:
    if "pattern" in values:
        return kernel_rows.parse_row(values)
    return case_rows.parse_row(values) if "kind" in values else rows.parse_row(values)


def _merged(found: list[Any], key: Callable[[Any], tuple[object, ...]]) -> list[Any]:
    """One row for each case, since ratios come from one run: that with the most contenders, the newest of several."""
    chosen: dict[tuple[object, ...], Any] = {}
    for row in found:
        other = chosen.get(key(row))
        if other is None or len(row.results) >= len(other.results):
            chosen[key(row)] = row
    return list(chosen.values())


def _model_key(row: Row) -> tuple[object, ...]:
    return (row.case, row.variant, row.batch, row.dtype, row.layout, row.device)


def _of_factor(row: KernelRow) -> Iterable[Measurement]:
    case = f"({','.join(map(str, row.pattern))}){' tuned' if row.tuned else ''}"
    for result in row.results:
        yield Measurement(
            FACTOR,
            case,
            result.contender,
            row.n,
            row.dtype,
            row.layout,
            row.timing,
            result.status,
            result.reason,
            result.resolved,
            result.tile,
            result.p20_ms,
            result.p50_ms,
            result.p80_ms,
            row.floor_ms,
            result.energy_j,
            result.energy_reason,
        )


def _of_case(row: CaseRow) -> Iterable[Measurement]:
    for result in row.results:
        yield Measurement(
            row.kind,
            row.case if row.spec in row.case else f"{row.case}: {row.spec}",
            result.contender,
            row.n,
            row.dtype,
            row.layout,
            row.timing,
            result.status,
            result.reason,
            result.resolved,
            result.plan,
            result.p20_ms,
            result.p50_ms,
            result.p80_ms,
            row.floor_ms,
            result.energy_j,
            result.energy_reason,
            result.peak_memory_bytes,
            result.weight_bytes,
        )


def _of_model(row: Row) -> Measurement:
    return Measurement(
        MODEL,
        row.case,
        row.variant,
        row.batch,
        row.dtype,
        row.layout,
        "",
        row.status,
        row.reason,
        row.resolved_backend,
        None,
        row.p20_ms,
        row.p50_ms,
        row.p80_ms,
        row.floor_ms,
        row.energy_j,
        row.energy_reason,
        row.peak_memory_bytes,
        row.weight_bytes,
    )
