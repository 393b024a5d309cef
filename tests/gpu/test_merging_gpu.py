"""Products of neighbouring factors by the compiled kernel: values over many shapes, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import reduce

import pytest
import torch
from torch import Tensor

from structlayers import Chain, KSLinear, Pattern
from structlayers._extension import why_missing
from structlayers.backends import cuda, merging
from structlayers.factorize import merge_weights
from structlayers.tolerances import tolerance

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else why_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
DEVICE = torch.device("cuda")


def weights_of(patterns: Sequence[Pattern], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(p.weight_shape, device=DEVICE, dtype=dtype) * p.c**-0.5 for p in patterns]


def random_run(rng: random.Random) -> list[Pattern]:
    """Chainable neighbours of any ranks, sizes and length."""
    a, d, b, c = rng.choice((1, 2, 3)), 1, rng.randint(1, 7), rng.randint(1, 7)
    for _ in range(rng.randint(1, 4)):
        d *= rng.choice((1, 2, 3))
    run = [Pattern(a, b, c, d)]
    for _ in range(rng.randint(1, 4)):
        left = run[-1]
        alphas = [q for q in range(1, left.a * left.c + 1) if (left.a * left.c) % (left.a * q) == 0]
        deltas = [q for q in range(1, left.d + 1) if left.d % q == 0]
        alpha, delta = rng.choice(alphas), rng.choice(deltas)
        rank = left.c // alpha
        run.append(Pattern(left.a * alpha, rank * delta, rng.randint(1, 7), left.d // delta))
    return run


def check(runs: Sequence[Sequence[Pattern]], dtype: torch.dtype) -> None:
    weights = [weights_of(run, dtype) for run in runs]
    with torch.no_grad():
        products = merging.merge(weights)
    for run, own, product in zip(runs, weights, products, strict=True):
        assert merging.fits(tuple(run))
        exact = reduce(merge_weights, [w.double() for w in own])
        assert product.shape == exact.shape and product.dtype == dtype
        error = (product.double() - exact).norm() / exact.norm()
        assert error <= tolerance(dtype, max(p.c for p in run)), (run, error)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_products_are_those_of_the_oracle(dtype):
    rng = random.Random(0)
    for _ in range(40):
        check([random_run(rng) for _ in range(rng.randint(1, 6))], dtype)
    check([Chain.butterfly(1024).patterns], dtype)
    for width in (64, 1024, 4096):
        patterns = Chain.butterfly(width).patterns
        half = len(patterns) // 2
        check([patterns[:half], patterns[half:]], dtype)


def test_a_butterfly_layer_gives_what_its_factors_give():
    layer = KSLinear(Chain.butterfly(1024), bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(4096, 1024, device=DEVICE, dtype=torch.bfloat16)
    assert any(operand.is_derived for operand in layer.plan(4096).operands)
    exact = x.double() @ layer.to_dense().double().T
    assert (layer(x).double() - exact).norm() / exact.norm() <= tolerance(torch.bfloat16, 32, 2)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([], "1 to 4 runs"), ([3], "of the weights"), ([1], "add up"), ([0, 2], "of the weights")],
)
def test_lengths_that_do_not_fit(lengths, message):
    weights = weights_of(Chain.butterfly(4).patterns, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.structlayers.cuda_merge(weights, lengths)


def test_neighbours_that_are_not_chainable():
    weights = weights_of((Pattern(1, 2, 3, 4), Pattern(5, 2, 3, 1)), torch.float32)
    with pytest.raises(RuntimeError, match="chainable"):
        torch.ops.structlayers.cuda_merge(weights, [2])
