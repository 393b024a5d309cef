"""Time training beside dense: ``python -m structlayers.bench training [options]``.

Forward and backward passes of whole chains with all gradients: on a GPU the time of a captured step, the L2 flushed
before it, and the wall time of an eager one. With ``--step`` a whole training step of a GPT instead: forward, loss,
backward and AdamW under autocast, compiled, with its peak memory. Outputs and gradients are checked against the
float64 oracle first. Rows go to a JSON-lines file, which a later run goes on with.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields

from structlayers.bench import chain_training, training_step
from structlayers.bench.case_rows import CHAIN_TRAINING, TRAINING_STEP, CaseRow, append_row, read_rows, table
from structlayers.bench.chain_cases import chain_cases
from structlayers.bench.chain_training import CAPTURED, EAGER, time_training, training_floor_ms
from structlayers.bench.chains import line
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.jsonl import check_appendable
from structlayers.bench.machine import measure_roofline
from structlayers.bench.nvml import device_state
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
from structlayers.bench.timing import TimingPlan
from structlayers.bench.training_step import PRECISIONS, StepCase, time_step
from structlayers.bench.tune import DTYPES
from structlayers.errors import BackendError, ChainError, ConfigError, DataError
from structlayers.problem import Layout

# What is asked of a whole step.
_STEP_TARGET = 1.3
_SIZES = tuple(entry.name for entry in fields(StepCase) if entry.type in (int, "int"))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m structlayers.bench training", description=(__doc__ or "").partition("\n\n")[2]
    )
    add = options.add_argument
    add("--chains", nargs="+", default=[], metavar="(a,b,c,d)(a,b,c,d)", help="these instead of the table's")
    add("--batches", nargs="+", type=int, default=[], metavar="N", help="instead of 25,088")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=[], help="instead of the table's")
    add("--layouts", nargs="+", choices=[layout.value for layout in Layout], default=["batch_first"])
    names = dict.fromkeys((*chain_training.CONTENDERS, *training_step.CONTENDERS))
    add("--contenders", nargs="+", default=[], choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--most-features", type=int, default=2**31, help="leave wider chains out, on a small machine")
    add("--step", action="store_true", help="time whole training steps of a GPT instead")
    for name in _SIZES:
        default = getattr(StepCase(), name)
        add(f"--{name.replace('_', '-')}", type=int, default=default, help="of the GPT (default %(default)s)")
    add("--precision", choices=tuple(PRECISIONS), default="bf16", help="autocast of the GPT (default %(default)s)")
    add("--eager", action="store_true", help="do not compile the GPT")
    add("--summary", action="store_true", help="only print the table of the rows in the file")
    add_sweep_options(options, "outputs/training.jsonl")
    return options


def measure(options: argparse.Namespace) -> Iterator[CaseRow]:
    """Rows of the cases that the file does not have yet, one after the other."""
    done: dict[tuple[object, ...], set[str]] = {}
    for row in read_rows(options.out):
        found = (r.contender for r in row.results if not options.energy or r.has_energy or r.energy_reason)
        done.setdefault(row.key, set()).update(found)
    yield from _step_rows(options, done) if options.step else _chain_rows(options, done)


def _chain_rows(options: argparse.Namespace, done: dict[tuple[object, ...], set[str]]) -> Iterator[CaseRow]:
    device, plan = device_of(options.device), _plan(options)
    contenders = options.contenders or list(chain_training.CONTENDERS)
    machine: dict[str, object] = {}
    energy: EnergyColumn | None = None
    rooflines, sampler = Rooflines(device, measure_roofline), StateSampler(device)
    for case in chain_cases("training", options.chains, options.batches, options.dtypes, options.layouts):
        if max(case.chain.in_features, case.chain.out_features) > options.most_features:
            continue
        row = CaseRow(
            kind=CHAIN_TRAINING,
            case=case.name,
            spec=case.chain.spec,
            in_features=case.chain.in_features,
            out_features=case.chain.out_features,
            n=case.n,
            dtype=case.dtype,
            layout=case.layout,
            timing=CAPTURED if device.type == "cuda" else EAGER,
            results=[],
            suite="" if options.chains else "training",
            contender=chain_training.STRUCTURED,
            target=case.target,
            command=command_line(),
        )
        if done.get(row.key, set()) >= set(contenders):
            continue
        if not machine:
            machine = machine_of(device, options.commit)
            energy = EnergyColumn(device, options.energy_window) if options.energy else None
        roofline = rooflines.of(DTYPES[case.dtype], case.dtype == "tf32")
        row.machine, row.state = machine, sampler.now()
        row.floor_ms = training_floor_ms(case, roofline)
        row.copy_gb_per_s, row.matmul_gflop_per_s = roofline.copy_gb_per_s, roofline.matmul_gflop_per_s
        row.idle_power_w = None if energy is None else energy.idle_power_w
        row.results = time_training(case, contenders, device, plan, energy)
        yield row


def _step_rows(options: argparse.Namespace, done: dict[tuple[object, ...], set[str]]) -> Iterator[CaseRow]:
    device = device_of(options.device)
    case = StepCase(
        **{name: getattr(options, name) for name in _SIZES}, precision=options.precision, compiled=not options.eager
    )
    contenders = options.contenders or list(training_step.CONTENDERS)
    row = CaseRow(
        kind=TRAINING_STEP,
        case=case.name,
        spec=case.spec,
        in_features=case.dim,
        out_features=case.dim,
        n=case.batch * case.context,
        dtype=case.precision,
        layout=Layout.BATCH_FIRST.value,
        timing=CAPTURED if device.type == "cuda" else EAGER,
        results=[],
        contender=training_step.STRUCTURED,
        target=_STEP_TARGET if case == StepCase() else None,
        command=command_line(),
    )
    if done.get(row.key, set()) >= set(contenders):
        return
    row.machine, row.state = machine_of(device, options.commit), device_state(device)
    row.results = time_step(case, contenders, device, _plan(options))
    yield row


def _plan(options: argparse.Namespace) -> TimingPlan:
    return TimingPlan(budget_s=options.budget, min_samples=options.samples[0], max_samples=options.samples[1])


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
    print(table(rows) if rows else f"{options.out}: no rows")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (BackendError, ChainError, ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
