"""Every way to compute one product with one factor, checked against the float64 oracle and timed in turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers.backends import BACKENDS, available_backends, cuda, resolve
from structlayers.backends.dense import dense_weight
from structlayers.backends.tiles import tiles_for
from structlayers.bench.compare import describe_error
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.results import Result
from structlayers.bench.rows import DISAGREES, FAILED, TIMED
from structlayers.bench.timing import (
    Timing,
    TimingPlan,
    call_to_time,
    make_room,
    release_memory,
    takes_turns,
    time_interleaved,
    way_of_timing,
)
from structlayers.bench.verify import agreement
from structlayers.errors import BackendError
from structlayers.ops import ks_linear
from structlayers.problem import Layout, Problem
from structlayers.reference import reference
from structlayers.tolerances import tolerance

SKIPPED = "skipped"
# A dense product with a weight that is there already, as a dense layer has it; the backend of that name builds it.
DENSE = "dense"
DENSE_BUILT = "dense_built"
# "cuda/run4": the compiled kernels with that tile.
_TILE = "cuda/"
# Above what today's GPUs reach, in FLOP/s and bytes/s, so that what is skipped as hopeless could not have won.
_BEST_RATES = {"16bit": 2.5e15, "tf32": 1.2e15, "float32": 8e13}
_BEST_COPY = 8e12
_HOPELESS = 20.0


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Set ``torch.set_float32_matmul_precision``, and set it back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def way_of_product(problem: Problem, timing: str) -> str:
    """:func:`way_of_timing` of a product with one factor."""
    device = torch.device(problem.device_type, problem.device_index)
    return way_of_timing(device, timing, problem.n, problem.pattern.bytes(problem.n, problem.dtype.itemsize))


def contenders_for(problem: Problem, tiles: bool = False) -> list[str]:
    """Everything that ``auto`` may choose, ``auto`` itself, a dense layer, and with ``tiles`` every compiled tile."""
    names = ["einsum", "bmm", DENSE, DENSE_BUILT]
    if "cuda" in available_backends(problem):
        names.append("cuda")
        if tiles:
            names += [_TILE + tile.name for tile in tiles_for(problem)]
    return [*names, "auto"]


def check_contender(name: str) -> str:
    """The name itself; ``BackendError`` if it is no contender. Tiles are looked up when a problem is there."""
    if name not in {*BACKENDS, "auto", DENSE_BUILT} and not name.startswith(_TILE):
        raise BackendError(f"contender {name!r}: expected one of {[*BACKENDS, DENSE_BUILT, 'auto', _TILE + 'TILE']}")
    return name


def rows_to_check(n: int) -> list[int]:
    """The first and last 48 rows, and 32 between: comparing all would take longer than all the rest."""
    return sorted({*range(min(n, 48)), *range(max(0, n - 48), n), *(q * (n - 1) // 33 for q in range(1, 33) if n > 96)})


@torch.inference_mode()
def time_product(
    problem: Problem,
    contenders: Sequence[str],
    plan: TimingPlan,
    seed: int = 0,
    energy: EnergyColumn | None = None,
    timing: str = "graph",
) -> list[Result]:
    """Check and time ``contenders`` on random data, in their order; one that fails or disagrees gets no time.

    Runs under the float32 precision that ``problem`` names. With ``energy`` those that were timed get their joules.
    ``timing`` as in :func:`way_of_timing`.
    """
    with float32_precision(problem.tf32):
        return _time_product(problem, contenders, plan, seed, energy, timing)


def _time_product(
    problem: Problem, contenders: Sequence[str], plan: TimingPlan, seed: int, energy: EnergyColumn | None, timing: str
) -> list[Result]:
    first = problem.layout is Layout.BATCH_FIRST
    device = torch.device(problem.device_type, problem.device_index)
    way = way_of_product(problem, timing)
    make_room(device)
    generator = torch.Generator(device).manual_seed(seed)
    pattern, n = problem.pattern, problem.n
    draw = partial(torch.randn, generator=generator, dtype=problem.dtype, device=device)
    try:
        x = draw(n, pattern.in_features) if first else draw(pattern.in_features, n)
        # Scaled for outputs of size one, which 16 bits hold.
        weight = draw(pattern.weight_shape).mul_(pattern.c**-0.5)
        rows = torch.tensor(rows_to_check(n), device=device)
        expected = reference((x[rows] if first else x[:, rows].T).double(), weight.double())
    except Exception as error:  # out of memory: the rows say so, and the next case may be smaller
        return without_oracle(contenders, error, device)
    bound = tolerance(problem.dtype, pattern.c, float32_precision=torch.get_float32_matmul_precision())

    results: list[Result] = []
    single: dict[str, Callable[[], object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in contenders:
        results.append(result := Result(name))
        try:
            result.reason = _hopeless(name, problem)
            if result.reason:
                result.status = SKIPPED
                continue
            call = _build(name, problem, x, weight, result)
            check_output(result, call, (n, pattern.out_features), problem.dtype, rows, expected, bound, problem.layout)
            if result.status == TIMED:
                single[name] = call
                read = weight.nbytes if name != DENSE else pattern.in_features * pattern.out_features * weight.itemsize
                calls[name], result.copies = call_to_time(
                    way, call, partial(_build_copy, name, problem, x, weight), read, device
                )
        except Exception as error:  # out of memory, an unsupported dtype, a launch that failed: the row says which
            result.status, result.reason = FAILED, describe_error(error)
            release_memory(device)
    fill_timings(results, calls, device, plan, way)
    if energy is not None:
        fill_energy(results, calls if takes_turns(way) else single, n, energy)
    return results


def without_oracle(contenders: Sequence[str], error: Exception, device: torch.device) -> list[Result]:
    """The results of a case whose data or oracle cannot be had: nothing may be timed."""
    release_memory(device)
    reason = f"no oracle to check against: {describe_error(error)}"
    return [Result(name, FAILED, reason) for name in contenders]


def check_output(
    result: Result,
    call: Callable[[], Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Tensor,
    expected: Tensor,
    bound: float,
    layout: Layout,
) -> None:
    """Call once, and fill in the error on ``rows`` against ``expected``, and whether it is to be timed.

    ``shape`` is (N, out_features), the output's, batch-last transposed, and ``dtype`` the output's.
    """
    # Memory of the output's size that the allocator hands out next: what nobody writes is seen.
    torch.full(shape, float("nan"), dtype=dtype, device=rows.device)
    y = call()
    found = agreement(y[rows] if layout is Layout.BATCH_FIRST else y[:, rows].T, expected, bound)
    result.error = found.error if found.error == found.error else None
    result.reason = found.reason
    if not result.reason and not torch.isfinite(y.sum(dtype=torch.float32)):
        result.reason = "an output outside the rows compared is NaN or infinite"
    result.status = DISAGREES if result.reason else TIMED


def fill_timings(
    results: Sequence[Result],
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    plan: TimingPlan,
    way: str = "",
) -> None:
    """Time ``calls``, named as the results are, in turns ``way``; one that raises leaves the reason in its result."""
    if takes_turns(way):
        # Clean lines between replays with weights in turn; and a flush hides what the host needs to launch a graph.
        plan = replace(plan, flush_by="read")
    by_name = {result.contender: result for result in results}
    for name, found in time_interleaved(calls, device, plan).items():
        result = by_name[name]
        if isinstance(found, Timing):
            result.set_timing(found.per_call(result.copies or 1))
        else:
            result.status, result.reason = FAILED, describe_error(found)


# The busy power of a GPU varies by less than this, so what takes so much longer than another uses more energy.
_HOPELESSLY_SLOW = 2


def fill_energy(
    results: Sequence[Result], calls: Mapping[str, Callable[[], object]], n: int, energy: EnergyColumn
) -> None:
    """Measure the energy of our own kernels, and of every other contender that may be the one that uses least."""
    others = [r.p50_ms for r in results if not _is_own(r.contender) and r.p50_ms is not None]
    limit = _HOPELESSLY_SLOW * min(others, default=0.0)
    for result in results:
        if result.p50_ms is None:
            continue
        if not _is_own(result.contender) and result.p50_ms > limit:
            result.energy_reason = f"not measured: more than {_HOPELESSLY_SLOW} times the time of another"
        else:
            energy.fill(result, calls[result.contender], n, calls=result.copies)


def _is_own(contender: str) -> bool:
    return contender in ("cuda", "auto") or contender.startswith(_TILE)


def _build(name: str, problem: Problem, x: Tensor, weight: Tensor, result: Result) -> Callable[[], Tensor]:
    """The call of a contender; notes in ``result`` what it resolves to."""
    if name == DENSE:
        result.resolved = "torch"
        matrix = dense_weight(weight)
        if problem.layout is Layout.BATCH_FIRST:
            return lambda: F.linear(x, matrix)
        return lambda: torch.mm(matrix, x)
    if name.startswith(_TILE):
        tile = next((t for t in tiles_for(problem) if _TILE + t.name == name), None)
        if tile is None:
            raise BackendError(f"{name}: expected a tile of {[t.name for t in tiles_for(problem)]}")
        resolve("cuda", problem)
        result.resolved, result.tile = "cuda", tile.name
        product = cuda.prepare(problem, "none", problem.pattern.out_features, tile)
        return lambda: product(x, weight, None)
    backend = "dense" if name == DENSE_BUILT else name
    result.resolved = resolve(backend, problem).name
    if result.resolved == "cuda":
        result.tile = cuda.tile_of(problem).name
    return lambda: ks_linear(x, weight, layout=problem.layout, backend=backend)


def _build_copy(name: str, problem: Problem, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return _build(name, problem, x, weight.clone(), Result(name))


def _hopeless(name: str, problem: Problem) -> str:
    """Why a dense product is not worth its time on a GPU; empty where it is, and for other contenders."""
    if name not in (DENSE, DENSE_BUILT) or problem.device_type != "cuda":
        return ""
    pattern, n, itemsize = problem.pattern, problem.n, problem.dtype.itemsize
    elements = pattern.in_features * pattern.out_features
    kind = "16bit" if itemsize == 2 else "tf32" if problem.tf32 else "float32"
    least_s = max(2 * n * elements / _BEST_RATES[kind], elements * itemsize / _BEST_COPY)
    floor_s = max(pattern.bytes(n, itemsize) / _BEST_COPY, pattern.flops(n) / _BEST_RATES[kind])
    if least_s <= _HOPELESS * floor_s:
        return ""
    return f"a dense product takes at least {least_s / floor_s:.0f} times the floor of the factor"
