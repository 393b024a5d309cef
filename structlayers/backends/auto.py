"""``backend="auto"``: a pure function from the problem to the name of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from structlayers.backends.bmm import group_size
from structlayers.problem import Layout, Problem


@dataclass(frozen=True)
class CpuCosts:
    """Seconds that one backend takes on a CPU, term by term of :func:`cpu_cost_s`."""

    call: float
    # One call more and every input and output element once more, where blocks are interleaved.
    permute_call: float = 0.0
    permuted_element: float = 0.0
    element: float = 0.0
    # Every block, and every row of the batch in every block, whatever the size of the block.
    block: float = 0.0
    row_block: float = 0.0
    # Every element of the dense weight that is built first.
    dense_element: float = 0.0


# Fitted by non-negative least squares on relative errors to 46 patterns (blocks of 1 x 1 to 512 x 512, 4 to 1,024
# features, d = 1 to 512) at batches of 1, 8, 64, 512 and 4,096 in float32, torch 2.13, one thread of a Zen server CPU
# with AVX-512. The choices take 1.06 times (geometric mean) the time of the best of the three there, 1.06 in float64
# and 1.07 in bfloat16. Only ratios matter for the choice.
SECONDS_PER_FLOP = 1.2e-11
CPU_COSTS = {
    Layout.BATCH_FIRST: {
        "bmm": CpuCosts(14.0e-6, permute_call=17.3e-6, permuted_element=3.75e-10, row_block=7.6e-9),
        "dense": CpuCosts(11.9e-6, element=0.8e-10, dense_element=1.5e-10),
        "einsum": CpuCosts(16.2e-6, permute_call=7.0e-6, permuted_element=8.0e-10, element=2.0e-10, row_block=7.6e-9),
    },
    # Here einsum is bmm with more copies.
    Layout.BATCH_LAST: {
        "bmm": CpuCosts(
            14.7e-6, permute_call=4.8e-6, permuted_element=1.8e-10, element=0.7e-10, block=13.6e-9, row_block=2.5e-10
        ),
        "dense": CpuCosts(11.7e-6, element=0.6e-10, dense_element=1.6e-10),
    },
}


def cpu_cost_s(name: str, problem: Problem) -> float:
    """Estimated seconds of one product on a CPU: overheads, elements touched, FLOPs done."""
    pattern, n = problem.pattern, problem.n
    costs = CPU_COSTS[problem.layout][name]
    elements = n * (pattern.in_features + pattern.out_features)
    dense_elements = pattern.in_features * pattern.out_features
    if name == "dense":
        return (
            costs.call
            + costs.element * elements
            + costs.dense_element * dense_elements
            + SECONDS_PER_FLOP * 2 * n * dense_elements
        )
    group = group_size(pattern, n, "cpu") if name == "bmm" and problem.layout is Layout.BATCH_FIRST else 1
    blocks = pattern.n_blocks // group
    seconds = costs.call + costs.element * elements + (costs.block + costs.row_block * n) * blocks
    # Batch-last, the blocks of a factor with a = 1 are strided views.
    if pattern.d > 1 and not (problem.layout is Layout.BATCH_LAST and pattern.a == 1):
        seconds += costs.permute_call + costs.permuted_element * elements
    return seconds + SECONDS_PER_FLOP * pattern.flops(n) * group


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> str:
    """The backend expected to be fastest.

    On a CPU the cheapest by :func:`cpu_cost_s`; elsewhere ``bmm``, whose batched product every device has.
    """
    if problem.device_type != "cpu":
        return "bmm"
    return min(CPU_COSTS[problem.layout], key=lambda name: cpu_cost_s(name, problem))
