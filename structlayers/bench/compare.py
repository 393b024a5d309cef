"""The comparison that every benchmark runs: check each contender against the oracle, then time them in turns."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from structlayers.bench.cost import count_flops, peak_memory
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.machine import Roofline
from structlayers.bench.rows import DISAGREES, FAILED, TIMED, Row
from structlayers.bench.timing import Timing, TimingPlan, time_interleaved
from structlayers.bench.verify import agreement


@dataclass(frozen=True)
class Case:
    """One input and what the oracle makes of it: a factor, a chain, a layer, or a whole model."""

    name: str
    x: Tensor
    batch: int  # entries that throughput counts
    oracle: Callable[[], Tensor]  # float64, the part of the output that `part` cuts out
    part: Callable[[Tensor], Tensor]
    tolerance: float


@dataclass(frozen=True)
class Contender:
    """One way to compute a case, ready to be called."""

    call: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]  # the same without torch.compile, for counting FLOPs
    parameters: int
    weight_bytes: int
    resolved_backend: Callable[[Tensor], str | None] = lambda x: None
    check: Callable[[Tensor], str] = lambda x: ""  # a closer check than the output's: the reason against it, or ""
    allocates: bool = True  # not where a call replays a graph, whose memory was allocated when it was captured


@dataclass(frozen=True)
class Variant:
    """The columns of a contender, and how to build it; if building fails, its row says why."""

    name: str
    structure: str
    backend: str
    layout: str
    build: Callable[[], Contender]
    compiled: str = "no"
    baseline: str | None = None


@dataclass(frozen=True)
class Conditions:
    """Where and how a comparison runs."""

    device: torch.device
    dtype: torch.dtype
    plan: TimingPlan = field(default_factory=TimingPlan)
    roofline: Roofline | None = None
    machine: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    energy: EnergyColumn | None = None
    state: Mapping[str, float] = field(default_factory=dict)
    command: str = ""


@torch.inference_mode()
def compare(case: Case, variants: list[Variant], conditions: Conditions) -> list[Row]:
    """Rows of all ``variants`` on one case, in their order; a variant that fails or disagrees gets no time and stops no
    other.

    Every variant sees the same input. Those that agreed with the oracle are timed in interleaved rounds.
    """
    try:
        reference = case.oracle()
    except Exception as error:  # without an oracle nothing may be timed, and the next case may be smaller
        reason = f"no oracle to check against: {describe_error(error)}"
        return [replace(_empty_row(case, variant, conditions), status=FAILED, reason=reason) for variant in variants]
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    for variant in variants:
        rows[variant.name] = row = _empty_row(case, variant, conditions)
        try:
            contender = variant.build()
            _prepare(row, case, contender, reference, conditions)
        except Exception as error:  # out of memory, an unsupported dtype, a failed compilation: the row says which
            row.status, row.reason = FAILED, describe_error(error)
        else:
            if row.status == TIMED:
                calls[variant.name] = _bind(contender.call, case.x)
        if row.status == FAILED:
            _release_memory(conditions.device)
    timings = time_interleaved(calls, conditions.device, conditions.plan)
    for name, timing in timings.items():
        row = rows[name]
        if not isinstance(timing, Timing):
            row.status, row.reason = FAILED, describe_error(timing)
            continue
        row.p20_ms, row.p50_ms, row.p80_ms, row.samples = timing.p20_ms, timing.p50_ms, timing.p80_ms, timing.samples
        row.throughput_per_s = case.batch / (timing.p50_ms * 1e-3)
        base = timings.get(row.baseline or "")
        if isinstance(base, Timing):
            row.speedup = base.p50_ms / timing.p50_ms
        if conditions.energy is not None:
            row.idle_power_w = conditions.energy.idle_power_w
            conditions.energy.fill(row, calls[name], case.batch, calls=1)
    return list(rows.values())


@contextmanager
def room_to_compile(compiles: bool = True) -> Iterator[None]:
    """Let torch.compile make a program for every variant: beyond its limit it would run eagerly and not say so."""
    if not compiles:
        yield
        return
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield


def describe_error(error: BaseException) -> str:
    """One line: the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _prepare(row: Row, case: Case, contender: Contender, reference: Tensor, conditions: Conditions) -> None:
    """Check one contender, and fill in everything but its time."""
    out = contender.call(case.x)
    row.parameters, row.weight_bytes = contender.parameters, contender.weight_bytes
    row.resolved_backend = contender.resolved_backend(case.x)
    found = agreement(case.part(out), reference, case.tolerance)
    if found.error == found.error:
        row.error, row.worst_element = found.error, found.worst_element
    row.reason = found.reason or contender.check(case.x)
    if row.reason:
        row.status = DISAGREES
        return
    moved = contender.weight_bytes + case.x.nbytes + out.nbytes
    del out
    row.flops = count_flops(_bind(contender.eager, case.x))
    if contender.allocates:
        row.peak_memory_bytes, row.memory_source = peak_memory(_bind(contender.call, case.x), conditions.device)
    if conditions.roofline is not None:
        row.floor_ms = conditions.roofline.floor_ms(moved, row.flops)
    row.status = TIMED


def _empty_row(case: Case, variant: Variant, conditions: Conditions) -> Row:
    return Row(
        case=case.name,
        variant=variant.name,
        structure=variant.structure,
        backend=variant.backend,
        layout=variant.layout,
        compiled=variant.compiled,
        dtype=str(conditions.dtype).removeprefix("torch."),
        device=str(conditions.device),
        batch=case.batch,
        status=FAILED,
        baseline=variant.baseline,
        tolerance=case.tolerance,
        metrics=dict(conditions.metrics),
        machine=dict(conditions.machine),
        state=dict(conditions.state),
        command=conditions.command,
    )


def _bind(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: call(x)


def _release_memory(device: torch.device) -> None:
    # A failed variant may leave its activations in reference cycles; the next one needs the room.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
