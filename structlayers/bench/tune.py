"""Measure which backend and which tile are fastest, and keep that in the tuning cache.

    from structlayers.bench.tune import problems_of, tune
    tune(problems_of(layer.chain, batches=[1, 4096], dtypes=["bfloat16"]))

Only this, or ``python -m structlayers.bench.kernels --tune``, measures; ordinary calls read what it wrote.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from structlayers.backends import tuning
from structlayers.backends.auto import GPU_CANDIDATES
from structlayers.backends.tuning import Entry
from structlayers.bench.products import DENSE, contenders_for, time_product
from structlayers.bench.results import Result
from structlayers.bench.timing import TimingPlan, check_batches
from structlayers.errors import BackendError, ConfigError
from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem

# Names of what is computed; "tf32" is float32 that may round its operands.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
QUICK = TimingPlan(warmup=2, budget_s=0.05, min_samples=10, max_samples=50)


def problems_of(
    patterns: Iterable[Pattern],
    batches: Sequence[int],
    dtypes: Sequence[str] = ("bfloat16",),
    layouts: Sequence[str] = ("batch_first",),
    device: str = "cuda",
) -> list[Problem]:
    """All combinations, dtype by dtype; ``patterns`` may be a chain. Raises ``ConfigError`` for an unknown dtype,
    and for a batch below 1.
    """
    patterns, where = list(patterns), torch.device(device)
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"dtype = {name!r}: expected one of {', '.join(DTYPES)}")
    check_batches(batches)
    return [
        replace(Problem.on(where, pattern, n, DTYPES[name], Layout(layout)), tf32=name == "tf32")
        for name in dtypes
        for layout in layouts
        for n in batches
        for pattern in patterns
    ]


def tune(
    problems: Iterable[Problem], path: str | os.PathLike[str] | None = None, plan: TimingPlan = QUICK
) -> dict[Problem, Entry]:
    """Check and time every backend and tile on each problem, and store the fastest in the cache file as it goes.

    Costs a second or so per problem. Raises ``BackendError`` for a problem on a CPU, where nothing is tuned, for an
    empty batch, and where no backend gave a right result.
    """
    return dict(_tune(problems, path, plan))


def _tune(
    problems: Iterable[Problem], path: str | os.PathLike[str] | None, plan: TimingPlan
) -> Iterator[tuple[Problem, Entry]]:
    for problem in problems:
        key = tuning.key(problem)
        if key is None:
            raise BackendError(f"cannot tune {problem}: expected a batch of at least 1 on a CUDA device")
        contenders = [name for name in contenders_for(problem, tiles=True) if name not in (DENSE, "cuda", "auto")]
        entry = fastest(problem, time_product(problem, contenders, plan))
        tuning.store({key: entry}, path)
        yield problem, entry


def fastest(problem: Problem, results: Iterable[Result]) -> Entry:
    """The entry that ``results`` amount to."""
    times = {result.contender: result for result in results if result.p50_ms is not None}
    tiles = [result for result in times.values() if result.tile is not None]
    candidates = [result for result in times.values() if result.resolved in GPU_CANDIDATES]
    if not candidates:
        reasons = "; ".join(f"{result.contender}: {result.reason}" for result in results)
        raise BackendError(f"no backend computed {problem}: {reasons}")

    def time_ms(result: Result) -> float:
        assert result.p50_ms is not None
        return result.p50_ms

    best_tile = min(tiles, key=time_ms).tile if tiles else None
    best = min(candidates, key=time_ms)
    return Entry(str(best.resolved), best_tile, best.p50_ms)
