"""How well two rules foretell which backend computes one factor fastest, and by how much.

The paper's rule: the kernel gains the more the larger (b + c) / (b c), the traffic of a block over its arithmetic, and
the density 1 / (a d) tells what dense loses (Gonon et al., arXiv:2405.15013). It is a correlation, so that it needs
rows to fit: a line through the logarithms, every row foretold by a fit without it. Our cost model is what
``backend="auto"`` chooses by; it is taken as it stands.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from structlayers.backends.auto import CPU_COSTS, cpu_cost_s, gpu_cost_s
from structlayers.bench.kernel_rows import KernelRow
from structlayers.bench.products import DENSE, DENSE_BUILT
from structlayers.bench.tune import DTYPES
from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem

# The kernel of this project against what PyTorch offers; without it, bmm against the rest.
_OTHERS = ("einsum", "bmm", DENSE)
_HOPPER = ("H100", "H200", "GH200", "H800", "H20")


@dataclass(frozen=True)
class Forecast:
    """One row: time of the best other backend over that of ``own``, measured and foretold."""

    row: KernelRow
    own: str
    measured: float
    foretold: float


@dataclass(frozen=True)
class Score:
    """How good forecasts are; shares and errors lie between 0 and 1 and above."""

    name: str
    rows: int
    winner_right: float  # share of rows where it says rightly which of the two is faster
    median_error: float  # median of |foretold / measured - 1|, the larger of the two over the smaller
    worst_error: float  # 90th percentile of the same
    rank_correlation: float


@dataclass(frozen=True)
class Choice:
    """What a rule chose for one row, and how much longer that took than the fastest."""

    row: KernelRow
    chosen: str
    best: str
    regret: float


def own_contender(row: KernelRow) -> str:
    """The contender that the rules are about: the compiled kernel where it was timed, else bmm."""
    return "cuda" if row.p50_ms("cuda") is not None else "bmm"


def measured_ratio(row: KernelRow, own: str) -> float | None:
    """Time of the best other backend over that of ``own``; None where one of them has none."""
    time, best = row.p50_ms(own), row.best(name for name in _OTHERS if name != own)
    return None if time is None or best is None else best[1] / time


def paper_forecasts(rows: Sequence[KernelRow]) -> list[Forecast]:
    """Every row foretold by a fit to the others of ``log ratio = x + y log((b+c)/(bc)) + z log density``.

    Empty for fewer than six rows: three numbers are fitted.
    """
    known = [(row, ratio) for row in rows if (ratio := measured_ratio(row, own_contender(row))) is not None]
    if len(known) < 6:
        return []
    features = torch.tensor([_features(row) for row, _ in known], dtype=torch.float64)  # (R, 3)
    target = torch.tensor([math.log(ratio) for _, ratio in known], dtype=torch.float64)  # (R,)
    # Leaving a row out changes its residual by 1 / (1 - its leverage).
    inverse = torch.linalg.pinv(features)  # (3, R)
    leverage = (features * inverse.T).sum(1).clamp(max=1 - 1e-9)
    residual = (target - features @ (inverse @ target)) / (1 - leverage)
    foretold = (target - residual).exp().tolist()
    return [
        Forecast(row, own_contender(row), ratio, guess) for (row, ratio), guess in zip(known, foretold, strict=True)
    ]


def _features(row: KernelRow) -> tuple[float, float, float]:
    pattern = Pattern(*row.pattern)
    return (1.0, math.log((pattern.b + pattern.c) / (pattern.b * pattern.c)), math.log(pattern.density))


def model_forecasts(rows: Sequence[KernelRow]) -> list[Forecast]:
    """Every row foretold by the cost model, among the backends that it knows and the row has."""
    found = []
    for row in rows:
        own, costs = own_contender(row), _costs_s(row)
        rest = [cost for name, cost in costs.items() if name != own and row.p50_ms(name) is not None]
        # The model's dense builds its weight first; it is compared with what did so too.
        times = [row.p50_ms(name) for name in costs if name != own]
        timed, mine = [time for time in times if time is not None], row.p50_ms(own)
        if own in costs and rest and timed and mine is not None:
            found.append(Forecast(row, own, min(timed) / mine, min(rest) / costs[own]))
    return found


def model_choices(rows: Sequence[KernelRow]) -> list[Choice]:
    """What the cost model chooses among the backends that were timed, and its regret."""
    found = []
    for row in rows:
        costs = {name: cost for name, cost in _costs_s(row).items() if row.p50_ms(name) is not None}
        best = row.best(costs)
        if len(costs) > 1 and best is not None:
            chosen = min(costs, key=lambda name: costs[name])
            found.append(Choice(row, chosen, best[0], (row.p50_ms(chosen) or math.inf) / best[1] - 1))
    return found


def _costs_s(row: KernelRow) -> dict[str, float]:
    """Estimated seconds by contender: "dense_built" is what the backend "dense" does."""
    problem = _problem(row)
    if problem.device_type == "cpu":
        names, cost = list(CPU_COSTS[problem.layout]), cpu_cost_s
    else:
        names, cost = ["cuda", "dense", "bmm"], gpu_cost_s
    return {DENSE_BUILT if name == "dense" else name: cost(name, problem) for name in names}


def _problem(row: KernelRow) -> Problem:
    on_gpu = row.driver is not None or row.result("cuda") is not None
    capability = (9, 0) if any(name in (row.gpu or "") for name in _HOPPER) else (8, 0)
    return Problem(
        Pattern(*row.pattern),
        row.n,
        DTYPES[row.dtype],
        "cuda" if on_gpu else "cpu",
        Layout(row.layout),
        tf32=row.dtype == "tf32",
        capability=capability,
    )


def score(name: str, forecasts: Sequence[Forecast]) -> Score | None:
    """How good forecasts are; None where there are fewer than two."""
    if len(forecasts) < 2:
        return None
    errors = sorted(max(f.foretold / f.measured, f.measured / f.foretold) - 1 for f in forecasts)
    right = statistics.fmean((f.foretold >= 1) == (f.measured >= 1) for f in forecasts)
    return Score(
        name,
        len(forecasts),
        right,
        statistics.median(errors),
        errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        rank_correlation([f.foretold for f in forecasts], [f.measured for f in forecasts]),
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation: 1 where both grow together, 0 where one says nothing about the other."""
    ranks = [torch.tensor(_ranks(values), dtype=torch.float64) for values in (first, second)]
    if any(float(r.std()) == 0 for r in ranks):
        return 0.0
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Places in the order of size; equal values share theirs."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            ranks[index] = (start + stop - 1) / 2
        start = stop
    return ranks


RULES: dict[str, Callable[[Sequence[KernelRow]], list[Forecast]]] = {
    "the paper's rule, fitted": paper_forecasts,
    "our cost model": model_forecasts,
}
