"""Make a report from result files: ``python -m structlayers.bench report FILES [--out FOLDER]``.

``report.md`` with its pictures in ``figures/``, and ``report.html``, one file that needs no network. Rows of every
benchmark of this project may stand in the files; lines that are none are named in the report and left out.
"""

import argparse
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from structlayers.bench import chain_calls, chain_figures, chain_training, factor_figures, figures
from structlayers.bench.case_rows import CHAIN, CHAIN_TRAINING, TRAINING_STEP, CaseRow, other_cells, time_cells
from structlayers.bench.chains import never_slower
from structlayers.bench.document import Block, Code, Heading, Picture, Table, Text, write_report
from structlayers.bench.heuristic import RULES, Score, model_choices, score
from structlayers.bench.kernel_rows import EXISTING, KernelRow, summary
from structlayers.bench.measurements import Measurement, ResultFiles, read_files
from structlayers.bench.rows import TIMED, Row
from structlayers.errors import ConfigError, DataError

_TITLE = "structlayers: benchmark report"


def report_blocks(found: ResultFiles) -> list[Block]:
    """The report on the rows that were found: only the parts that they speak about."""
    blocks = [
        *_where(found),
        *_chains(found.of_kind(CHAIN)),
        *_training(found.of_kind(CHAIN_TRAINING), found.of_kind(TRAINING_STEP)),
        *_factors(found.factors),
        *_models(found.models),
        *_energy(found),
        *_heuristic(found.factors),
        *_untimed(found),
    ]
    return blocks


def _where(found: ResultFiles) -> list[Block]:
    times = sorted(row.time for row in found.rows)
    blocks: list[Block] = [
        Heading("Where and how"),
        Text(
            "Every time is that of an output that agreed with the float64 oracle, on random data; medians, with the "
            "20th and 80th percentile as spread. Contenders of one case were timed in turns in one run. The floor is "
            "the larger of least traffic over the measured copy rate and FLOPs over the best measured matrix product."
        ),
        Text(f"Measured {times[0]} to {times[-1]} on:"),
        Code("\n".join(found.machines())),
    ]
    rates = {
        (row.dtype, f"{row.copy_gb_per_s:,.0f}", f"{row.matmul_gflop_per_s / 1e3:,.1f}")
        for row in found.with_rates
        if row.copy_gb_per_s is not None and row.matmul_gflop_per_s is not None
    }
    if rates:
        header = ["dtype", "copy GB/s", "matrix product TFLOP/s"]
        blocks.append(Table([header, *map(list, sorted(rates))], "rates of the machine, best over several shapes"))
    states = [row.state for row in found.rows if row.state]
    if states:
        blocks.append(Text(_state_text(states)))
    commands = list(dict.fromkeys(row.command for row in found.rows if row.command))
    if commands:
        blocks += [Text("Commands:"), Code("\n".join(commands))]
    return blocks


def _state_text(states: Sequence[dict[str, float]]) -> str:
    units = {"sm_clock_mhz": "SM clock, MHz", "memory_clock_mhz": "memory clock, MHz"}
    units |= {"temperature_c": "temperature, degrees Celsius", "power_w": "power between cases, W"}
    parts = []
    for name, what in units.items():
        values = [state[name] for state in states if name in state]
        if values:
            parts.append(f"{what}: {min(values):.0f} to {max(values):.0f}")
    return f"While it was measured: {'; '.join(parts)}."


def _chains(rows: list[CaseRow]) -> list[Block]:
    if not rows:
        return []
    meaning = "; ".join(f"{name}: {what}" for name, what in chain_calls.MEANING.items())
    blocks: list[Block] = [Heading("Chains"), Text(meaning + ".")]
    blocks += _picture("chain-times", chain_figures.chain_times(rows), "dense, bmm, unfused and planned, and the floor")
    blocks += _picture(
        "chain-speedups", chain_figures.chain_speedups(rows), "times faster than dense over shape and batch"
    )
    others, frozen = [row for row in rows if row.suite != "frozen"], [row for row in rows if row.suite == "frozen"]
    if others:
        blocks.append(Table(time_cells(others), "x NAME: time of dense over that of NAME"))
        blocks += [Table(cells) for cells in (other_cells(others),) if cells]
        blocks.append(Table(_plan_cells(others), "which plan or backend ran, and which contender was fastest"))
    if frozen:
        blocks += [Heading("Frozen layers against dense", 3), Code(never_slower(frozen)), Table(time_cells(frozen))]
    return blocks


def _plan_cells(rows: Sequence[CaseRow]) -> list[list[str]]:
    lines = [["case", "N", "dtype", "layout", "fastest", "planned ran"]]
    for row in rows:
        timed = [(result.p50_ms, result.contender) for result in row.results if result.p50_ms is not None]
        own = row.result(row.contender)
        ran = "" if own is None else own.plan or own.resolved or own.reason
        lines.append([row.case, str(row.n), row.dtype, row.layout, min(timed)[1] if timed else "none", ran])
    return lines


def _training(chains: list[CaseRow], steps: list[CaseRow]) -> list[Block]:
    blocks: list[Block] = []
    if chains:
        meaning = "; ".join(f"{name}: {what}" for name, what in chain_training.MEANING.items())
        blocks += [
            Heading("Training: forward and backward of chains"),
            Text(f"With all gradients, each checked. {meaning}."),
            Table(time_cells(chains), "x NAME: time of dense over that of NAME"),
            *(Table(cells, "wall time of an eager step; peak memory") for cells in (other_cells(chains),) if cells),
        ]
    if steps:
        blocks += [Heading("Training: whole steps"), *(Text(f"{row.case}: {row.spec}, {row.dtype}.") for row in steps)]
        blocks += [Table(time_cells(steps)), *(Table(cells) for cells in (other_cells(steps),) if cells)]
    return blocks


def _factors(rows: list[KernelRow]) -> list[Block]:
    if not rows:
        return []
    best = ", ".join(EXISTING)
    kernel = "the compiled kernel" if any(row.p50_ms("cuda") is not None for row in rows) else "auto"
    blocks: list[Block] = [Heading("One factor"), Code(summary(rows))]
    for name, figure, caption in (
        ("factor-speedups", factor_figures.factor_speedups(rows), "times faster than dense, auto, over width"),
        ("factor-floor", factor_figures.factor_floor_shares(rows), "share of the floor, all cases in order"),
        (
            "factor-blocks",
            factor_figures.factor_heat_maps(rows),
            f"{kernel} against the best of {best}: median over a, by block b x c and d",
        ),
        (
            "factor-winners",
            factor_figures.factor_winners(rows),
            "which backend wins most often, by block b x c and d, and in how many of the cases",
        ),
    ):
        blocks += _picture(name, figure, caption)
    return [*blocks, Table(_win_cells(rows), "how often each is the fastest"), Table(_factor_cells(rows), "all cases")]


def _win_cells(rows: Sequence[KernelRow]) -> list[list[str]]:
    names = ("cuda", *EXISTING)
    lines = [["dtype", "layout", "cases", *names]]
    for dtype, layout in sorted({(row.dtype, row.layout) for row in rows}):
        winners = [best[0] for row in rows if (row.dtype, row.layout) == (dtype, layout) and (best := row.best(names))]
        lines.append([dtype, layout, str(len(winners)), *(str(winners.count(name)) for name in names)])
    return lines


def _factor_cells(rows: Sequence[KernelRow]) -> list[list[str]]:
    names = list(dict.fromkeys(result.contender for row in rows for result in row.results))
    lines = [
        ["pattern", "N", "dtype", "layout", "floor us", *(f"{n} us" for n in names), "tile", "auto chose", "x best"]
    ]
    for row in rows:
        times = [row.p50_ms(name) for name in names]
        own, best, auto = row.result("cuda"), row.best(EXISTING), row.result("auto")
        mine = row.p50_ms("cuda") or row.p50_ms("auto")
        ratio = "" if best is None or mine is None else f"{best[1] / mine:.2f}"
        cells = [f"({','.join(map(str, row.pattern))})", str(row.n), row.dtype, row.layout, f"{row.floor_ms * 1e3:.1f}"]
        cells += ["" if time is None else f"{time * 1e3:.1f}" for time in times]
        lines.append([*cells, (own.tile or "") if own else "", (auto.resolved or "") if auto else "", ratio])
    return lines


def _models(rows: list[Row]) -> list[Block]:
    if not rows:
        return []
    blocks: list[Block] = [Heading("Layers and whole models")]
    blocks += _picture("model-speedups", figures.model_speedups(rows), "times faster than dense in the same mode")
    split = latency_split(rows)
    blocks += _picture(
        "model-split",
        figures.model_split([(label, linear, other) for label, linear, other in split]),
        "latency of the linears that were replaced, and of all the rest (the model with each of them a free slice)",
    )
    header = ["case", "variant", "batch", "dtype", "mode", "p50 ms", "p20 ms", "p80 ms", "x dense", "of floor"]
    header += ["peak MB", "weights MB", "mJ", "resolved"]
    lines = [header]
    for row in rows:
        cells = [row.case, row.variant, str(row.batch), row.dtype, row.compiled]
        cells += ["" if time is None else f"{time:.4g}" for time in (row.p50_ms, row.p20_ms, row.p80_ms)]
        cells += ["" if row.speedup is None else f"{row.speedup:.2f}"]
        cells += ["" if row.floor_ms is None or not row.p50_ms else f"{row.floor_ms / row.p50_ms:.0%}"]
        sizes = (row.peak_memory_bytes, row.weight_bytes)
        cells += ["" if size is None else f"{size / 1e6:.1f}" for size in sizes]
        cells += ["" if row.energy_j is None else f"{row.energy_j * 1e3:.3g}", row.resolved_backend or ""]
        lines.append(cells)
    return [*blocks, Table(lines)]


def latency_split(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(variant in words, ms of the replaced linears, ms of the rest): against the free variant of the same mode."""
    free = {
        (row.case, row.dtype, row.batch, row.compiled): row.p50_ms
        for row in rows
        if row.structure == "free" and row.p50_ms is not None
    }
    several = len({row.case for row in rows}) > 1
    found = []
    for row in rows:
        other = free.get((row.case, row.dtype, row.batch, row.compiled))
        if row.structure != "free" and other is not None and row.p50_ms is not None:
            rest = min(other, row.p50_ms)
            label = f"{row.case}: " if several else ""
            found.append((f"{label}{row.variant}, {row.dtype}, batch {row.batch}", row.p50_ms - rest, rest))
    return found


def _energy(found: ResultFiles) -> list[Block]:
    entries = found.measurements()
    measured = [entry for entry in entries if entry.energy_j is not None and entry.p50_ms is not None]
    reasons = list(dict.fromkeys(entry.energy_reason for entry in entries if entry.energy_reason))
    if not measured and not reasons:
        return []
    blocks: list[Block] = [Heading("Energy")]
    if reasons:
        blocks.append(Text(f"Where no energy stands: {'; '.join(reasons)}."))
    if not measured:
        return blocks
    idle = [row.idle_power_w for row in found.rows if row.idle_power_w is not None]
    mean_idle = statistics.median(idle) if idle else None
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in measured:
        assert entry.p50_ms is not None and entry.energy_j is not None
        points.setdefault(entry.contender, []).append((entry.p50_ms, entry.energy_j))
    blocks.append(
        Text(
            "By NVML's total-energy counter over windows of many of its periods, the call repeated without a pause."
            + ("" if mean_idle is None else f" Idle, the device took {mean_idle:.0f} W.")
        )
    )
    blocks += _picture("energy", figures.energy_over_time(points, mean_idle), "energy over time of one call")
    ratios = _energy_ratios(measured)
    return [*blocks, *([Table(ratios, "energy of the kernel over that of the best other backend")] if ratios else [])]


def _energy_ratios(measured: Sequence[Measurement]) -> list[list[str]]:
    cases: dict[tuple[object, ...], dict[str, float]] = {}
    for entry in measured:
        if entry.kind == "factor" and entry.energy_j is not None:
            cases.setdefault(entry.case_key, {})[entry.contender] = entry.energy_j
    groups: dict[tuple[str, str], list[float]] = {}
    for key, energies in cases.items():
        others = [energy for name, energy in energies.items() if name in EXISTING]
        if "cuda" in energies and others:
            groups.setdefault((str(key[3]), str(key[4])), []).append(energies["cuda"] / min(others))
    if not groups:
        return []
    lines = [["dtype", "layout", "cases", "median", "worst", "kernel takes less in"]]
    for (dtype, layout), ratios in sorted(groups.items()):
        less = sum(ratio < 1 for ratio in ratios)
        median = f"{statistics.median(ratios):.2f}"
        lines.append([dtype, layout, str(len(ratios)), median, f"{max(ratios):.2f}", f"{less / len(ratios):.0%}"])
    return lines


def _heuristic(rows: list[KernelRow]) -> list[Block]:
    scores: list[tuple[str, Score]] = []
    groups: dict[str, list[KernelRow]] = {"all rows": rows}
    for row in rows:
        groups.setdefault(f"{row.dtype}, {row.layout}", []).append(row)
    for label, group in groups.items():
        scores += [(label, s) for name, rule in RULES.items() if (s := score(name, rule(group))) is not None]
    if not scores:
        return []
    lines = [["rows", "rule", "cases", "winner right", "median error", "90th percentile", "rank correlation"]]
    for label, s in scores:
        errors = [f"{s.winner_right:.0%}", f"{s.median_error:.0%}", f"{s.worst_error:.0%}"]
        lines.append([label, s.name, str(s.rows), *errors, f"{s.rank_correlation:.2f}"])
    blocks: list[Block] = [
        Heading("What the rules foretell"),
        Text(
            "The speed-up of the kernel (bmm, where none was timed) over the best other backend, foretold by two "
            "rules. The paper's: a line through the logarithms of (b + c) / (b c) and of the density 1 / (a d), every "
            "row foretold by a fit to the others. Ours: the cost model that auto chooses by, as it stands, against "
            "the backends that auto chooses from, of which dense builds its weight first. The error is the larger of "
            "foretold and measured speed-up over the smaller, less one."
        ),
        Table(lines),
        *_picture("forecasts", factor_figures.forecasts(rows), "measured over foretold speed-up"),
    ]
    choices = model_choices(rows)
    if choices:
        regrets = sorted(choice.regret for choice in choices)
        right = statistics.fmean(choice.chosen == choice.best for choice in choices)
        late = regrets[int(0.9 * (len(regrets) - 1))]
        worst = max(choices, key=lambda choice: choice.regret)
        where = f"{worst.row.pattern}, {worst.row.dtype}, {worst.row.layout}: {worst.chosen} instead of {worst.best}"
        blocks.append(
            Text(
                f"Choosing by the cost model: the fastest in {right:.0%} of {len(choices)} cases; slower than the "
                f"fastest by {statistics.median(regrets):.1%} in the median, {late:.0%} at the 90th percentile, "
                f"{worst.regret:.0%} at worst ({where})."
            )
        )
    return blocks


def _untimed(found: ResultFiles) -> list[Block]:
    groups: dict[tuple[str, str, str, str], list[Measurement]] = {}
    for entry in found.measurements():
        if entry.status != TIMED:
            # Reasons that differ in their numbers alone are one, with the numbers of the first.
            alike = re.sub(r"\d[\d.]*", "0", entry.reason)
            groups.setdefault((entry.kind, entry.contender, entry.status, alike), []).append(entry)
    if not groups and not found.broken:
        return []
    blocks: list[Block] = [Heading("What was not timed, and why")]
    if groups:
        lines = [["kind", "contender", "status", "cases", "first", "reason"]]
        for (kind, contender, status, _), group in groups.items():
            first = f"{group[0].case}, N = {group[0].n}, {group[0].dtype}"
            lines.append([kind, contender, status, str(len(group)), first, group[0].reason])
        blocks.append(Table(lines))
    if found.broken:
        blocks += [Text("Lines that are no rows, left out:"), Code("\n".join(found.broken))]
    return blocks


def _picture(name: str, figure: Any | None, caption: str) -> list[Block]:
    return [] if figure is None else [Picture(name, figures.svg(figure), caption)]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m structlayers.bench report", description=(__doc__ or "").partition("\n\n")[2]
    )
    options.add_argument("files", nargs="+", type=Path, help="JSON-lines files of the benchmark commands and infer.py")
    options.add_argument("--out", type=Path, default=Path("outputs/report"), help="folder (default %(default)s)")
    options.add_argument("--title", default=_TITLE)
    return options


def main(arguments: Sequence[str] | None = None, now: Callable[[], datetime] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        found = read_files(options.files)
        if not found:
            # A file of another kind is one error, not one for each of its lines.
            more = f" (and {len(found.broken) - 1} more lines)" if len(found.broken) > 1 else ""
            raise DataError(
                f"{', '.join(map(str, options.files))}: no benchmark row; {''.join(found.broken[:1])}{more}"
            )
        blocks = report_blocks(found)
        date = (now() if now else datetime.now(timezone.utc)).date()
        command = [
            "python",
            "-m",
            "structlayers.bench",
            "report",
            *(arguments if arguments is not None else sys.argv[1:]),
        ]
        blocks += [Heading("This report"), Text(f"Made on {date} by"), Code(shlex.join(map(str, command)))]
        try:
            paths = write_report(options.out, options.title, blocks)
        except OSError as error:
            raise DataError(f"{options.out}: cannot be written: {error}") from error
        print(*paths, sep="\n")
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
