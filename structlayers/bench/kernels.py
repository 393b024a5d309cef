"""Time the product with one factor by every backend: ``python -m structlayers.bench.kernels [options]``.

Every output is checked against the float64 oracle first. A captured graph is replayed, so that the host takes no part:
up to a batch of 64 with copies of the weights in turn, so that they come from memory; else after the L2 was flushed.
Rows go to a JSON-lines file; cases that are in it already are skipped, so that a long sweep can be run in pieces
(``--minutes``). At the end, or with ``--summary`` alone, what the rows amount to.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from structlayers.backends import tuning
from structlayers.bench import grid
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.jsonl import check_appendable
from structlayers.bench.kernel_rows import HEADER, KernelRow, append_row, line, read_rows, summary
from structlayers.bench.machine import measure_roofline
from structlayers.bench.overhead import overhead_table
from structlayers.bench.products import check_contender, contenders_for, time_product, way_of_product
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
from structlayers.bench.timing import TIMINGS, TimingPlan
from structlayers.bench.tune import DTYPES, problems_of, tune
from structlayers.errors import BackendError, ChainError, ConfigError, DataError
from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem

DEFAULT_DTYPES = ("float16", "bfloat16", "float32", "tf32")
DEFAULT_LAYOUTS = tuple(layout.value for layout in Layout)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m structlayers.bench.kernels", description=(__doc__ or "").partition("\n\n")[2]
    )
    add = options.add_argument
    add(
        "--suite",
        choices=("standard", "sample", "outside", "grid", "odd"),
        default="standard",
        help="sample: --count patterns of the paper's grid; standard (default): sample and outside; odd: unaligned",
    )
    add("--count", type=int, default=80, help="size of the sample of 376 (default %(default)s)")
    add("--patterns", nargs="+", default=[], metavar="(a,b,c,d)", help="these patterns instead of a suite")
    add("--batches", nargs="+", type=int, default=[grid.PAPER_BATCH], metavar="N")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DEFAULT_DTYPES))
    add("--layouts", nargs="+", choices=DEFAULT_LAYOUTS, default=list(DEFAULT_LAYOUTS))
    add("--backends", nargs="+", default=[], help="contenders instead of all; dense has its weight built beforehand")
    add("--timing", choices=TIMINGS, default="graph", help="eager: with what the host needs for a call")
    add("--tiles", action="store_true", help="also every compiled tile by itself")
    add("--tune", action="store_true", help="first measure cases that the tuning cache does not have, and store them")
    add("--cache", type=Path, help="the tuning cache file (default: the user's)")
    add_sweep_options(options, "outputs/kernels.jsonl")
    add("--seconds", type=float, default=float("inf"), help="like --minutes, in seconds")
    add("--summary", action="store_true", help="only say what the rows in the file amount to")
    add("--overhead", action="store_true", help="time an eager call from Python to launch instead, in three modes")
    return options


def cases(options: argparse.Namespace) -> list[Problem]:
    """What the options ask for, dtype by dtype; batches that are named override those of a suite."""
    patterns = [pattern for text in options.patterns for pattern in grid.parse(text)]
    device, sweep = options.device, (options.dtypes, options.layouts)
    if options.suite == "odd" and not patterns:
        # An odd batch too, beside the neighbour's even one.
        n = grid.PAPER_BATCH
        problems = problems_of(grid.ODD, [n - 1], *sweep, device)
        return problems + problems_of([grid.neighbour(p) for p in grid.ODD], [n], *sweep, device)
    if not patterns:
        patterns = _suite(options.suite, options.count)
    return problems_of(patterns, options.batches, *sweep, device)


def _suite(name: str, count: int) -> list[Pattern]:
    if name == "grid":
        return grid.paper_grid()
    if name == "outside":
        return list(grid.OUTSIDE)
    sample = grid.sample(count)
    return sample if name == "sample" else sample + list(grid.OUTSIDE)


def measure(problems: Sequence[Problem], options: argparse.Namespace) -> Iterator[KernelRow]:
    """Rows of the problems that the file does not have yet, one after the other."""
    device = device_of(options.device)
    plan = TimingPlan(budget_s=options.budget, min_samples=options.samples[0], max_samples=options.samples[1])
    machine = machine_of(device, options.commit)
    energy = EnergyColumn(device, options.energy_window) if options.energy else None
    done: dict[tuple[object, ...], set[str]] = {}
    for row in read_rows(options.out):
        found = (r.contender for r in row.results if energy is None or r.has_energy or r.energy_reason)
        done.setdefault(row.case, set()).update(found)
    rooflines, sampler = Rooflines(device, measure_roofline), StateSampler(device)
    for problem in problems:
        contenders = options.backends or contenders_for(problem, options.tiles)
        dtype = "tf32" if problem.tf32 else str(problem.dtype).removeprefix("torch.")
        a, b, c, d = problem.pattern
        way = way_of_product(problem, options.timing)
        case = ((a, b, c, d), problem.n, dtype, problem.layout.value, options.tune, way)
        if done.get(case, set()) >= set(contenders):
            continue
        if options.tune and tuning.lookup(problem) is None:
            tune([problem], options.cache)
        roofline = rooflines.of(problem.dtype, problem.tf32)
        yield KernelRow(
            pattern=(a, b, c, d),
            n=problem.n,
            dtype=dtype,
            layout=problem.layout.value,
            tuned=options.tune,
            floor_ms=roofline.floor_ms(
                problem.pattern.bytes(problem.n, problem.dtype.itemsize), problem.pattern.flops(problem.n)
            ),
            results=time_product(problem, contenders, plan, energy=energy, timing=options.timing),
            timing=way,
            copy_gb_per_s=roofline.copy_gb_per_s,
            matmul_gflop_per_s=roofline.matmul_gflop_per_s,
            commit=_text(machine["commit"]),
            gpu=_text(machine.get("gpu", machine["cpu"])),
            driver=_text(machine.get("driver")),
            torch=_text(machine["torch"]),
            state=sampler.now(),
            idle_power_w=None if energy is None else energy.idle_power_w,
            busy=_text(machine.get("busy")),
            command=command_line(),
        )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def run(options: argparse.Namespace) -> None:
    """What the command does once its options are read."""
    if options.overhead:
        print(overhead_table(device_of(options.device)))
        return
    for name in options.backends:
        check_contender(name)
    if not options.summary:
        check_appendable(options.out)
        device_of(options.device)
        deadline, problems = Deadline(min(options.minutes, options.seconds / 60)), cases(options)
        if options.cache is not None:
            tuning.load(options.cache)
        print(HEADER)
        log = WandbLog(options.wandb, vars(options))
        for row in measure(problems, options):
            append_row(options.out, row)
            log.log_results(asdict(row))
            print(line(row), flush=True)
            if lost_context([result.reason for result in row.results]):
                sys.exit(LOST_CONTEXT)
            if deadline.over:
                print(deadline)
                break
        log.finish()
    print(summary(read_rows(options.out)))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (BackendError, ChainError, ConfigError, DataError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
