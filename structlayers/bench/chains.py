"""Time products with whole chains beside dense: ``python -m structlayers.bench chains [options]``.

Every output is checked against the float64 oracle first. A captured graph is replayed, so that the host takes no part:
up to a batch of 64 with calls that use copies of the weights in turn, so that they come from memory; else with one
call, after the L2 was flushed. Rows go to a JSON-lines file, which a later run goes on with.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from structlayers.bench.case_rows import CHAIN, DENSE, CaseRow, append_row, read_rows, table
from structlayers.bench.chain_calls import (
    CONTENDERS,
    DENSE_FACTOR,
    EINSUM_COMPILED,
    FROZEN,
    PLANNED,
    UNFUSED,
    ChainCall,
    build,
    oracle,
)
from structlayers.bench.chain_cases import SUITES, ChainCase, chain_cases
from structlayers.bench.compare import describe_error, room_to_compile
from structlayers.bench.cost import peak_memory
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.jsonl import check_appendable
from structlayers.bench.machine import Roofline, measure_roofline
from structlayers.bench.products import check_output, fill_timings, float32_precision, rows_to_check, without_oracle
from structlayers.bench.results import Result
from structlayers.bench.rows import FAILED, TIMED
from structlayers.bench.sweep import (
    LOST_CONTEXT,
    Deadline,
    Rooflines,
    StateSampler,
    WandbLog,
    add_sweep_options,
    command_line,
    device_of,
    lost_context,
    machine_of,
)
from structlayers.bench.timing import (
    LARGEST_SMALL_BATCH,
    TIMINGS,
    TimingPlan,
    call_to_time,
    make_room,
    release_memory,
    way_of_timing,
)
from structlayers.bench.tune import DTYPES
from structlayers.errors import BackendError, ChainError, ConfigError, DataError
from structlayers.problem import Layout
from structlayers.tolerances import tolerance


@dataclass(frozen=True)
class ChainConditions:
    """Where and how chains are timed. ``timing``: "graph", or "eager", where what the host needs for a call counts."""

    device: torch.device
    plan: TimingPlan
    timing: str = "graph"
    seed: int = 0

    def how(self, n: int) -> str:
        return way_of_timing(self.device, self.timing, n)


def default_contenders(case: ChainCase, suite: str) -> list[str]:
    """What a suite times a case by; the dense factor shows what of a float32 ratio the arithmetic alone brings."""
    if suite == "frozen":
        return [DENSE, FROZEN]
    names = [DENSE, "bmm", UNFUSED, PLANNED, FROZEN]
    if suite != "sweep" and case.n > LARGEST_SMALL_BATCH:
        names.insert(2, EINSUM_COMPILED)
    return [*names, DENSE_FACTOR] if case.dtype in ("float32", "tf32") else names


@torch.inference_mode()
def time_chain(
    case: ChainCase, contenders: Sequence[str], conditions: ChainConditions, energy: EnergyColumn | None = None
) -> list[Result]:
    """Check and time ``contenders`` on random data, in their order; one that fails or disagrees gets no time."""
    with float32_precision(case.dtype == "tf32"), room_to_compile(EINSUM_COMPILED in contenders):
        return _time_chain(case, contenders, conditions, energy)


def _time_chain(
    case: ChainCase, contenders: Sequence[str], conditions: ChainConditions, energy: EnergyColumn | None
) -> list[Result]:
    device, layout, chain, n = conditions.device, Layout(case.layout), case.chain, case.n
    make_room(device)
    first = layout is Layout.BATCH_FIRST
    generator = torch.Generator(device).manual_seed(conditions.seed)
    draw = partial(torch.randn, generator=generator, dtype=DTYPES[case.dtype], device=device)
    try:
        x = draw(n, chain.in_features) if first else draw(chain.in_features, n)
        # Scaled for outputs of size one, which 16 bits hold.
        weights = [draw(pattern.weight_shape).mul_(pattern.c**-0.5) for pattern in chain]
        rows = torch.tensor(rows_to_check(n), device=device)
        expected = oracle(chain, weights, x[rows] if first else x[:, rows].T)
    except Exception as error:  # out of memory: the rows say so, and the next case may be smaller
        return without_oracle(contenders, error, device)

    results: list[Result] = []
    single: dict[str, Callable[[], object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in contenders:
        results.append(result := Result(name))
        try:
            made = build(name, chain, weights, layout, n)
            result.resolved, result.plan, result.weight_bytes = made.resolved, made.plan, made.weight_bytes
            call = partial(made.call, x)
            bound = tolerance(
                x.dtype, made.reduction, max(len(chain), 2), float32_precision=torch.get_float32_matmul_precision()
            )
            check_output(result, call, (n, chain.out_features), x.dtype, rows, expected, bound, layout)
            if result.status == TIMED:
                result.peak_memory_bytes, _ = peak_memory(call, device)
                single[name] = call
                read = made.weight_bytes if made.read_bytes is None else made.read_bytes
                calls[name], result.copies = call_to_time(
                    conditions.how(n), call, partial(_copied_call, made, x), read, device
                )
        except Exception as error:  # out of memory, no kernels, a launch that failed: the row says which
            result.status, result.reason = FAILED, describe_error(error)
            release_memory(device)
    fill_timings(results, calls, device, conditions.plan, conditions.how(n))
    if energy is not None:
        for result in results:
            if result.p50_ms is not None:
                # A graph with weights in turn already has its calls; otherwise the meter makes a graph of many.
                made_calls = calls if result.copies else single
                energy.fill(result, made_calls[result.contender], n, calls=result.copies)
    return results


def _copied_call(made: ChainCall, x: Tensor) -> Callable[[], object]:
    return partial(made.copy().call, x)


def floor_ms(case: ChainCase, roofline: Roofline) -> float:
    """The least time of a case: factors, input and output moved once, the factors' FLOPs at the best measured rate."""
    itemsize = DTYPES[case.dtype].itemsize
    return roofline.floor_ms(case.chain.bytes(case.n, itemsize, fused=True), case.chain.flops(case.n))


# ---- the command


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m structlayers.bench chains", description=(__doc__ or "").partition("\n\n")[2]
    )
    add = options.add_argument
    add(
        "--suite",
        choices=[name for name in SUITES if name != "training"],
        default="table",
        help="table (default): the shapes with targets; frozen: where frozen layers may not be slower than dense; "
        "sweep: over width and batch",
    )
    add("--chains", nargs="+", default=[], metavar="(a,b,c,d)(a,b,c,d)", help="these instead of a suite")
    add("--batches", nargs="+", type=int, default=[], metavar="N", help="instead of the suite's")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=[], help="instead of the suite's")
    add("--layouts", nargs="+", choices=[layout.value for layout in Layout], default=["batch_first"])
    add("--contenders", nargs="+", default=[], choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    add("--timing", choices=TIMINGS, default="graph", help="eager: with what the host needs for a call")
    add("--most-features", type=int, default=2**31, help="leave wider chains out, on a small machine")
    add("--plot", nargs="?", type=Path, const=Path(), help="write a PNG of the rows over width and batch (OUT.png)")
    add("--summary", action="store_true", help="only print the table of the rows in the file")
    add_sweep_options(options, "outputs/chains.jsonl")
    return options


def measure(options: argparse.Namespace) -> Iterator[CaseRow]:
    """Rows of the cases that the file does not have yet, one after the other."""
    device = device_of(options.device)
    plan = TimingPlan(budget_s=options.budget, min_samples=options.samples[0], max_samples=options.samples[1])
    conditions = ChainConditions(device, plan, options.timing)
    cases = chain_cases(options.suite, options.chains, options.batches, options.dtypes, options.layouts)
    done: dict[tuple[object, ...], set[str]] = {}
    for row in read_rows(options.out):
        found = (r.contender for r in row.results if not options.energy or r.has_energy or r.energy_reason)
        done.setdefault(row.key, set()).update(found)
    machine: dict[str, object] = {}
    energy: EnergyColumn | None = None
    rooflines, sampler = Rooflines(device, measure_roofline), StateSampler(device)
    for case in cases:
        if max(case.chain.in_features, case.chain.out_features) > options.most_features:
            continue
        contenders = options.contenders or default_contenders(case, options.suite)
        row = CaseRow(
            kind=CHAIN,
            case=case.name,
            spec=case.chain.spec,
            in_features=case.chain.in_features,
            out_features=case.chain.out_features,
            n=case.n,
            dtype=case.dtype,
            layout=case.layout,
            timing=conditions.how(case.n),
            results=[],
            suite=options.suite if not options.chains else "",
            contender=FROZEN if options.suite == "frozen" else PLANNED,
            target=case.target,
            like=case.like,
            command=command_line(),
        )
        if done.get(row.key, set()) >= set(contenders):
            continue
        if not machine:
            machine = machine_of(device, options.commit)
            energy = EnergyColumn(device, options.energy_window) if options.energy else None
        roofline = rooflines.of(DTYPES[case.dtype], case.dtype == "tf32")
        row.machine, row.state = machine, sampler.now()
        row.floor_ms = floor_ms(case, roofline)
        row.copy_gb_per_s, row.matmul_gflop_per_s = roofline.copy_gb_per_s, roofline.matmul_gflop_per_s
        row.idle_power_w = None if energy is None else energy.idle_power_w
        row.results = time_chain(case, contenders, conditions, energy)
        yield row


def run(options: argparse.Namespace) -> None:
    """What the command does once its options are read."""
    if not options.summary:
        check_appendable(options.out)
        deadline, log = Deadline(options.minutes), WandbLog(options.wandb, vars(options))
        for row in measure(options):
            append_row(options.out, row)
            log.log_results(asdict(row))
            print(line(row), flush=True)
            if lost_context([result.reason for result in row.results]):
                sys.exit(LOST_CONTEXT)
            if deadline.over:
                print(deadline)
                break
        log.finish()
    rows = read_rows(options.out)
    if not rows:
        print(f"{options.out}: no rows")
    frozen = [row for row in rows if row.suite == "frozen"]
    others = [row for row in rows if row.suite != "frozen"]
    if others:
        print(table(others))
    if frozen:
        print(never_slower(frozen))
    if options.plot is not None:
        from structlayers.bench.chain_figures import plot_chains

        path = options.out.with_suffix(".png") if options.plot == Path() else options.plot
        plot_chains(rows, path)
        print(f"plot: {path}")


def line(row: CaseRow) -> str:
    """What a case came to, while the sweep goes on."""
    times = ", ".join(
        f"{r.contender} {r.p50_ms * 1e3:.1f} us" if r.p50_ms is not None else f"{r.contender} {r.status}: {r.reason}"
        for r in row.results
    )
    ratio = row.ratio(row.contender)
    shown = "" if ratio is None else f"; dense/{row.contender} {ratio:.2f}"
    return f"{row.case}, N = {row.n}, {row.dtype}, {row.layout}: {times}{shown}"


def never_slower(rows: Sequence[CaseRow], share: float = 0.05, allowed_ms: float = 0.0005) -> str:
    """How many frozen chains are slower than dense by more than ``max(share, allowed_ms)``, the worst of them named."""
    found = []
    for row in rows:
        dense, own = row.p50_ms(DENSE), row.p50_ms(row.contender)
        if dense is not None and own is not None:
            found.append((own - dense - max(share * dense, allowed_ms), own / dense, row))
    if not found:
        return "frozen against dense: no case was timed"
    slower = sorted((entry for entry in found if entry[0] > 0), key=lambda entry: -entry[1])
    text = [
        f"frozen against dense: {len(slower)} of {len(found)} cases slower by more than "
        f"max({share:.0%}, {allowed_ms * 1e3:g} us); {len(rows) - len(found)} not timed"
    ]
    for _, ratio, row in slower[:20]:
        result = row.result(row.contender)
        plan = "" if result is None else result.plan or result.resolved or ""
        text.append(f"  {row.case}, N = {row.n}: {ratio:.2f} of dense ({row.p50_ms(DENSE):.4g} ms); {plan}")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (BackendError, ChainError, ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
