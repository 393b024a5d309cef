"""The compiled weight gradient on a GPU: values over a broad family of shapes, what it refuses, and how it runs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers import Layout, Pattern, ks_linear
from structlayers._extension import why_missing
from structlayers.backends import cuda
from structlayers.backends.weight_grad_tiles import GRAD_TILES_HOPPER, GradChoice, choose_grad_tile, grad_tiles_for
from structlayers.bench.products import float32_precision
from structlayers.bench.verify import agreement
from structlayers.problem import Problem
from structlayers.tolerances import tolerance

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else why_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]

DEVICE = torch.device("cuda")
KINDS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
SIZES = (1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 48, 64, 65, 96, 128, 130, 200)
RUNS = (1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 32, 33)
BATCHES = (0, 1, 2, 7, 16, 31, 33, 64, 65, 127, 129, 257, 640, 1000)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float32, device=DEVICE, generator=generator).to(dtype)


def within_nan(x: Tensor, columns: int) -> Tensor:
    """The same values, with ``columns`` of NaN on either side and a row of them above and below."""
    around = x.new_full((x.shape[0] + 2, x.shape[1] + 2 * columns), float("nan"))
    around[1:-1, columns : columns + x.shape[1]] = x
    return around[1:-1, columns : columns + x.shape[1]]


def expected(dy: Tensor, x: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """The definition in float64; missing features are zeros."""
    a, b, c, d = pattern
    if layout is Layout.BATCH_LAST:
        dy, x = dy.T, x.T
    n = dy.shape[0]
    dy = F.pad(dy.double(), (0, pattern.out_features - dy.shape[1])).view(n, a, b, d)
    x = F.pad(x.double(), (0, pattern.in_features - x.shape[1])).view(n, a, c, d)
    return torch.einsum("nijl,nikl->iljk", dy, x)


def poison(pattern: Pattern, dtype: torch.dtype, splits: int) -> None:
    """Leave NaN in memory of the sizes that the allocator hands out next: what nobody writes is seen."""
    torch.full((pattern.nnz,), float("nan"), dtype=dtype, device=DEVICE)
    torch.full((splits * pattern.nnz,), float("nan"), dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_tile_and_split_agrees_with_float64(kind, layout, seed):
    dtype, tf32 = KINDS[kind]
    precision = "high" if tf32 else "highest"
    pick = random.Random(f"{kind} {layout.value} {seed}")
    for case in range(12):
        pattern = Pattern(pick.choice((1, 1, 2, 3, 9)), pick.choice(SIZES), pick.choice(SIZES), pick.choice(RUNS))
        n = pick.choice(BATCHES)
        rows = max(1, pattern.out_features - pick.choice((0, 0, 1, 5)))
        columns = max(1, pattern.in_features - pick.choice((0, 0, 1, 5)))
        first = layout is Layout.BATCH_FIRST
        dy, x = (draw(*((n, f) if first else (f, n)), dtype=dtype, seed=case + f) for f in (rows, columns))
        truth = expected(dy, x, pattern, layout)
        margin = pick.choice((0, 0, 1, 8))
        dy, x = within_nan(dy, margin), within_nan(x, margin)
        bound = tolerance(dtype, max(n, 1), float32_precision=precision)
        with float32_precision(tf32):
            problem = Problem.on(DEVICE, pattern, n, dtype, layout)
            for tile, splits in itertools.product(grad_tiles_for(problem), (1, 1 + case % 5)):
                poison(pattern, dtype, splits)
                dw = cuda.weight_grad(dy, x, pattern, layout, GradChoice(tile, splits))
                where = f"{tile.name} in {splits} splits: {problem}, features {rows}, {columns}, margin {margin}"
                assert (dw.shape, dw.dtype, dw.is_contiguous()) == (pattern.weight_shape, dtype, True), where
                if not truth.any():
                    assert not dw.any(), where
                    continue
                found = agreement(dw, truth, bound)
                assert found.agrees, f"{where}: {found}"


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no wgmma")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", GRAD_TILES_HOPPER, ids=lambda tile: tile.name)
def test_wgmma_tiles_agree_with_float64_at_every_edge(tile, dtype):
    for a, b, c in ((1, 128, tile.columns), (1, 136, 264), (1, 1, 8), (2, 72, 40), (3, 200, 136)):
        pattern = Pattern(a, b, c, tile.run)
        # Features that are left out, and columns of NaN on either side; 3 leaves rows that only the other tiles take.
        for n, fewer, margin in ((1, 0, 0), (16, 0, 8), (33, 8, 8), (257, 3, 8), (1000, 0, 0), (100, 0, 3)):
            rows, columns = max(1, pattern.out_features - fewer), pattern.in_features - fewer
            if columns < 1:
                continue
            dy, x = draw(n, rows, dtype=dtype, seed=1), draw(n, columns, dtype=dtype, seed=2)
            truth = expected(dy, x, pattern, Layout.BATCH_FIRST)
            dy, x = within_nan(dy, margin), within_nan(x, margin)
            for splits in (1, 3, 9):
                poison(pattern, dtype, splits)
                dw = cuda.weight_grad(dy, x, pattern, Layout.BATCH_FIRST, GradChoice(tile, splits))
                found = agreement(dw, truth, tolerance(dtype, n))
                assert found.agrees, f"{pattern}, n={n}, {splits} splits, {fewer} fewer, margin {margin}: {found}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 512, 512, 4), (4, 192, 192, 1), (1, 64, 64, 64), (1, 256, 128, 4)])
def test_a_long_batch_twice_gives_the_same_bits(shape, dtype):
    pattern, n = Pattern(*shape), 25_088
    dy, x = draw(n, pattern.out_features, dtype=dtype), draw(n, pattern.in_features, dtype=dtype, seed=1)
    first = cuda.weight_grad(dy, x, pattern, Layout.BATCH_FIRST)
    found = agreement(first, expected(dy, x, pattern, Layout.BATCH_FIRST), tolerance(dtype, n))
    assert found.agrees, found
    for _ in range(3):
        assert torch.equal(cuda.weight_grad(dy, x, pattern, Layout.BATCH_FIRST), first)


def test_float32_at_a_long_batch_is_no_worse_than_twice_cublas():
    pattern, n = Pattern(1, 128, 128, 1), 25_088
    dy, x = draw(n, 128, dtype=torch.float32), draw(n, 128, dtype=torch.float32, seed=1)
    truth = expected(dy, x, pattern, Layout.BATCH_FIRST)
    with float32_precision(False):
        ours = cuda.weight_grad(dy, x, pattern, Layout.BATCH_FIRST)
        theirs = (dy.T @ x).view_as(truth)
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


def test_the_operator_takes_it_with_logical_sizes_and_strided_gradients():
    pattern = Pattern(2, 24, 40, 4)
    weight = draw(*pattern.weight_shape, dtype=torch.float32).requires_grad_()
    x = draw(70, pattern.in_features - 3, dtype=torch.float32)
    y = ks_linear(x, weight, in_features=x.shape[1], out_features=100, backend="cuda")
    (dw,) = torch.autograd.grad(y.sum(), weight)  # an expanded gradient
    truth = expected(torch.ones_like(y), x, pattern, Layout.BATCH_FIRST)
    found = agreement(dw, truth, tolerance(torch.float32, 70))
    assert found.agrees, found


def test_it_is_captured_in_a_graph_and_does_not_wait():
    pattern = Pattern(1, 48, 48, 16)
    dy, x = (draw(4096, 768, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    choice = choose_grad_tile(Problem.on(DEVICE, pattern, 4096, torch.bfloat16, Layout.BATCH_FIRST), 132)
    assert choice.splits > 1
    right = cuda.weight_grad(dy, x, pattern, Layout.BATCH_FIRST, choice)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.weight_grad(dy, x, pattern, Layout.BATCH_FIRST, choice)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, right)


def test_it_refuses_what_does_not_fit():
    kernel = torch.ops.structlayers.cuda_weight_grad
    dy, x = draw(8, 16, dtype=torch.float32), draw(8, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="one dtype"):
        kernel(dy.half(), x, 1, 16, 16, 1, False, False, 2, 1)
    with pytest.raises(RuntimeError, match="one batch"):
        kernel(dy[:4], x, 1, 16, 16, 1, False, False, 2, 1)
    with pytest.raises(RuntimeError, match="more features"):
        kernel(dy, x, 1, 8, 16, 1, False, False, 2, 1)
    with pytest.raises(RuntimeError, match="at least one split"):
        kernel(dy, x, 1, 16, 16, 1, False, False, 2, 0)
    with pytest.raises(RuntimeError, match=r"tile 99 of the weight gradient .* did not start"):
        kernel(dy, x, 1, 16, 16, 1, False, False, 99, 1)
