"""The kernel of small batches: values over odd shapes, and kernels that begin before the last has ended."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers import Chain, KSLinear, Layout, Pattern
from structlayers._extension import why_missing
from structlayers.backends import cuda
from structlayers.backends.base import activate
from structlayers.backends.tiles import SMALL_BATCH, tiles_for
from structlayers.bench.verify import agreement
from structlayers.problem import ACTIVATIONS, Problem
from structlayers.reference import reference
from structlayers.tolerances import tolerance

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else why_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]

DEVICE = torch.device("cuda")
CAPABILITY = (8, 0) if NO_GPU else torch.cuda.get_device_capability()
KINDS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 47, 63, 64)
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 33, 48, 61, 64, 65, 96, 128, 130)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float32, device=DEVICE, generator=generator).to(dtype)


def problem_of(pattern: Pattern, n: int, kind: str = "bfloat16", layout: Layout = Layout.BATCH_FIRST) -> Problem:
    dtype, tf32 = KINDS[kind]
    return Problem(pattern, n, dtype, "cuda", layout, tf32, capability=CAPABILITY)


def product_of(problem: Problem, activation: str = "none", out_features: int | None = None):
    tile = next(tile for tile in tiles_for(problem) if tile.name == SMALL_BATCH)
    return cuda.prepare(problem, activation, out_features or problem.pattern.out_features, tile)


def check(problem: Problem, columns: int, rows: int, activation: str, bias: bool, shifted: bool, seed: int) -> None:
    """``columns`` and ``rows`` are the logical sizes; ``shifted``: x and weight are not aligned."""
    pattern, dtype, first = problem.pattern, problem.dtype, problem.layout is Layout.BATCH_FIRST
    x = draw(*((problem.n, columns) if first else (columns, problem.n)), dtype=dtype, seed=seed)
    weight = draw(*pattern.weight_shape, dtype=dtype, seed=seed + 1) * pattern.c**-0.5
    if shifted:
        around = x.new_full((x.shape[0] + 2, x.shape[1] + 3), float("nan"))
        around[1:-1, 1:-2] = x
        x = around[1:-1, 1:-2]
        weight = torch.cat((weight.new_full((1,), float("nan")), weight.flatten()))[1:].view(weight.shape)
    b = draw(rows, dtype=dtype, seed=seed + 2) if bias else None
    padded = F.pad((x if first else x.T).double(), (0, pattern.in_features - columns))
    truth = reference(padded, weight.double())[:, :rows]
    truth = activate(truth if b is None else truth + b.double(), activation)
    # Memory of the output's size, which the allocator hands out next: what nobody writes is seen.
    torch.full((problem.n, rows), float("nan"), dtype=dtype, device=DEVICE)
    y = product_of(problem, activation, rows)(x, weight, b)
    y = y if first else y.T
    where = f"{problem}, {columns} -> {rows}, {activation}, bias {bias}, shifted {shifted}"
    if not truth.any():
        assert not y.any(), where
        return
    precision = "high" if problem.tf32 else "highest"
    bound = tolerance(dtype, pattern.c + 1, 1 if activation == "none" else 2, float32_precision=precision)
    found = agreement(y, truth, bound)
    assert found.agrees, f"{where}: {found}"


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("kind", KINDS)
def test_values_over_odd_and_aligned_shapes(kind, layout):
    pick = random.Random(list(KINDS).index(kind))
    for seed in range(200):
        if seed % 2:
            sizes = pick.choice(SIZES), pick.choice(SIZES), pick.choice((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33))
        else:
            sizes = pick.choice((8, 16, 80, 192)), pick.choice((8, 40, 192, 1024)), pick.choice((1, 2, 4, 8, 16, 64))
        pattern = Pattern(pick.choice((1, 1, 2, 3, 16)), *sizes)
        pads = pick.random() < 0.4
        check(
            problem_of(pattern, pick.choice(ROWS), kind, layout),
            pick.randint(1, pattern.in_features) if pads else pattern.in_features,
            pick.randint(1, pattern.out_features) if pads else pattern.out_features,
            pick.choice(ACTIVATIONS),
            pick.random() < 0.5,
            pick.random() < 0.25,
            seed,
        )


def test_long_rows_go_through_shared_memory_in_steps():
    for entries, n in itertools.product(((1, 40, 4096, 4), (1, 17, 5000, 1), (2, 16, 2048, 16)), (5, 64)):
        pattern = Pattern(*entries)
        check(problem_of(pattern, n), pattern.in_features, pattern.out_features, "none", True, False, n)


def test_a_chain_of_kernels_waits_for_what_it_reads():
    """Each kernel may begin before the last has ended; a race would show as another number."""
    chain = Chain.monarch(2048, 2048, 32)
    weights = [draw(*p.weight_shape, dtype=torch.bfloat16, seed=q) * p.c**-0.5 for q, p in enumerate(chain)]
    left, right = (product_of(problem_of(pattern, 3)) for pattern in chain)
    x = draw(3, 2048, dtype=torch.bfloat16)

    def product(weights: list[Tensor], depth: int) -> Tensor:
        y = x
        for _ in range(depth):
            y = left(right(y, weights[1], None), weights[0], None)
        return y

    apart = [x]
    for _ in range(4):
        middle = right(apart[-1], weights[1], None)
        torch.cuda.synchronize()
        apart.append(left(middle, weights[0], None))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = product(weights, 4)
    for _ in range(200):
        assert torch.equal(product(weights, 4), apart[-1])
        # Weights that the kernel before has just written.
        assert torch.equal(product([weights[0] * 1.0, weights[1] * 1.0], 1), apart[1])
        graph.replay()
        assert torch.equal(replayed, apart[-1])


@pytest.mark.parametrize("n", [1, 64])
def test_a_layer_takes_it_for_a_small_batch(n):
    layer = KSLinear(Chain.monarch(4096, 4096, 64), backend="cuda", device=DEVICE, dtype=torch.bfloat16)
    oracle = KSLinear(layer.chain, backend="reference", device=DEVICE, dtype=torch.float64)
    oracle.load_state_dict(layer.state_dict())
    x = draw(n, 4096, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = agreement(layer(x), oracle(x.double()), tolerance(torch.bfloat16, 64, 2))
    assert found.agrees, str(found)
