"""What the factorisation promises: exact recovery, block-SVD optima, error bounds, speed."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structlayers import Chain, Pattern
from structlayers.factorize import factorize, merge_weights, to_dense
from structlayers.transforms import hadamard


def random_like(shape, dtype, seed) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative_distance(weights, target, chain) -> float:
    product = to_dense(weights, chain.in_features, chain.out_features)
    return float((product - target).norm() / target.norm())


def chain_of(integer: Callable[[int, int], int], length: int) -> Chain:
    """Any chainable chain without redundant neighbours: all that defines one is drawn by ``integer(least, most)``."""
    ranks = [integer(1, 3) for _ in range(length - 1)]
    # A link is redundant unless its rank is below the rows b = ranks[q-1] * delta[q-1] before it and the columns
    # c = alpha[q] * ranks[q] behind it.
    delta, alpha = [], []
    for q, rank in enumerate(ranks):
        least_delta = ranks[q + 1] // rank + 1 if q + 1 < len(ranks) else 1
        least_alpha = ranks[q - 1] // rank + 1 if q else 1
        delta.append(integer(least_delta, least_delta + 1))
        alpha.append(integer(least_alpha, least_alpha + 1))
    rows = [integer(max(ranks[:1], default=0) + 1, 5), *(r * s for r, s in zip(ranks, delta, strict=True))]
    columns = [*(s * r for r, s in zip(ranks, alpha, strict=True)), integer(max(ranks[-1:], default=0) + 1, 5)]
    a, d = integer(1, 2), integer(1, 2)
    chain = Chain(
        [
            Pattern(a * math.prod(alpha[:q]), b, c, d * math.prod(delta[q:]))
            for q, (b, c) in enumerate(zip(rows, columns, strict=True))
        ]
    )
    assert chain.is_chainable and not chain.is_redundant
    return chain


@st.composite
def chains(draw, lengths=(1, 4), padded: bool = True) -> Chain:
    def integer(least: int, most: int) -> int:
        return draw(st.integers(least, most))

    chain = chain_of(integer, integer(*lengths))
    if not padded:
        return chain
    return Chain(chain.patterns, *(integer(max(1, n - 2), n) for n in (chain.in_features, chain.out_features)))


DTYPES = st.sampled_from([torch.float64, torch.complex128])


@given(chain=chains(), dtype=DTYPES, seed=st.integers(0, 99), data=st.data())
def test_a_product_of_any_chain_is_recovered(chain, dtype, seed, data):
    weights = [random_like(p.weight_shape, dtype, seed) for p in chain]
    dense = to_dense(weights, chain.in_features, chain.out_features)
    order = data.draw(
        st.sampled_from(["left_to_right", "balanced"]) | st.permutations(range(1, len(chain))), label="order"
    )
    found = factorize(dense, chain, order=order)
    assert [tuple(w.shape) for w in found.weights] == list(chain.weight_shapes)
    assert relative_distance(found.weights, dense, chain) < 1e-10
    # The report's error is that of the factors.
    assert float(found.report.relative_error) < 1e-10
    assert sorted(found.report.cuts) == list(range(1, len(chain)))
    assert found.report.cuts == tuple(range(1, len(chain))) or order != "left_to_right"


@given(chain=chains(), dtype=DTYPES, seed=st.integers(0, 99), wider=st.lists(st.integers(1, 3)))
def test_a_product_of_factors_is_factorised_as_its_dense_matrix_is(chain, dtype, seed, wider):
    """The same chain with larger ranks is truncated piece by piece; neighbours merged, it is split again."""
    patterns = list(chain)
    for q, more in enumerate(wider[: len(chain) - 1]):
        left, right = patterns[q], patterns[q + 1]
        patterns[q] = Pattern(left.a, left.b, left.c * more, left.d)
        patterns[q + 1] = Pattern(right.a, right.b * more, right.c, right.d)
    weights = [random_like(p.weight_shape, dtype, seed) for p in patterns]
    if seed % 2 and len(weights) > 1:
        weights[:2] = [merge_weights(weights[0], weights[1])]
    dense = to_dense(weights, chain.in_features, chain.out_features)
    order = "balanced" if seed % 3 else "left_to_right"
    ours = factorize(weights, chain, order=order, bounds=True)
    expected = factorize(dense, chain, order=order, bounds=True)
    assert [tuple(w.shape) for w in ours.weights] == list(chain.weight_shapes)
    norm = float(dense.norm())
    for name in ("norm", "error", "outside", "split_distances", "cut_distances"):
        found, reference = getattr(ours.report, name), getattr(expected.report, name)
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-10 * norm, msg=lambda m, name=name: f"{name}: {m}")
    product = to_dense(ours.weights, chain.in_features, chain.out_features)
    assert float((product - dense).norm()) == pytest.approx(float(ours.report.error), abs=1e-10 * norm)


def test_a_product_of_factors_is_never_formed():
    """The dense matrix of this one would have 10^12 entries."""
    n = 10**6
    left, right = random_like((n, 6), torch.float32, 0), random_like((6, n), torch.float32, 1)
    found = factorize([left, right], Chain.low_rank(n, n, rank=4), bounds=True)
    gram = (left.double().T @ left.double()) @ (right.double() @ right.double().T)
    tail = torch.linalg.eigvals(gram).real.sort().values[:2].sum().sqrt()
    assert float(found.report.error) == pytest.approx(float(tail), rel=1e-5)
    assert float(found.report.bound) == pytest.approx(float(tail), rel=1e-5)


def block_svd_distance(matrix: np.ndarray, left: Pattern, right: Pattern) -> float:
    """The distance to the products of two factors, from the supports alone: rows and columns that meet in the same
    features in between make a block."""
    rank_one = {}
    for i, l in itertools.product(range(left.a), range(left.d)):
        for k in range(left.c):
            middle = (i * left.c + k) * left.d + l
            rows = tuple((i * left.b + j) * left.d + l for j in range(left.b))
            block = middle // (right.b * right.d), middle % right.d
            columns = tuple((block[0] * right.c + k2) * right.d + block[1] for k2 in range(right.c))
            rank_one[rows, columns] = rank_one.get((rows, columns), 0) + 1
    rest = matrix.copy()
    for (rows, columns), rank in rank_one.items():
        u, s, vh = np.linalg.svd(matrix[np.ix_(rows, columns)], full_matrices=False)
        rest[np.ix_(rows, columns)] -= (u[:, :rank] * s[:rank]) @ vh[:rank]
    return float(np.linalg.norm(rest))


@given(
    chain=chains(lengths=(2, 2), padded=False),
    dtype=DTYPES,
    seed=st.integers(0, 99),
    noise=st.sampled_from([0, 1e-6, 1]),
)
def test_two_factors_are_the_block_svd_optimum(chain, dtype, seed, noise):
    dense = to_dense([random_like(p.weight_shape, dtype, seed) for p in chain])
    dense = dense + noise * random_like(dense.shape, dtype, seed + 1)
    found = factorize(dense, chain)
    optimum = block_svd_distance(dense.numpy(), *chain)
    norm = float(dense.norm())
    assert relative_distance(found.weights, dense, chain) == pytest.approx(optimum / norm, abs=1e-10)
    assert float(found.report.error) == pytest.approx(optimum, abs=1e-10 * norm)
    # Both factors are as large, and what every rank adds is shared evenly.
    left, right = found.weights
    assert float(left.norm()) == pytest.approx(float(right.norm()), rel=1e-6)


@pytest.mark.parametrize("smallest", [1e-3, 1e-7, 1e-9, 1e-11])
@pytest.mark.parametrize("noise", [0, 1e-13, 1e-9, 1e-5])
def test_two_factors_are_optimal_where_singular_values_are_uneven(smallest, noise):
    """Gram matrices alone lose singular values below the root of the roundoff."""
    chain = Chain.low_rank(40, 30, rank=3)
    u, v = (torch.linalg.qr(torch.randn(n, 30, dtype=torch.float64)).Q for n in (30, 40))
    sigma = torch.full((30,), noise, dtype=torch.float64)
    sigma[:3] = torch.tensor([1, smallest**0.5, smallest], dtype=torch.float64)
    sigma = sigma.sort(descending=True).values
    dense = (u * sigma) @ v.T
    found = factorize(dense, chain)
    optimum = float(sigma[3:].norm() / sigma.norm())
    assert relative_distance(found.weights, dense, chain) == pytest.approx(optimum, abs=1e-12)


def targets(count: int):
    """Random chains of at least three factors; targets on them, near them and far from them, some of uneven scale."""
    for seed in range(count):
        rng = random.Random(seed)
        chain = chain_of(rng.randint, rng.choice([3, 4]))
        dtype = rng.choice([torch.float64, torch.complex128])
        dense = to_dense([random_like(p.weight_shape, dtype, seed + q) for q, p in enumerate(chain)])
        noise = rng.choice([0, 0, 1e-9, 0.1, 10]) * random_like(dense.shape, dtype, seed + 100)
        # Where the support is not everything, noise off it would hide what the splits lose.
        dense = dense + (noise if seed % 4 == 0 else noise * (dense != 0))
        if seed % 3 == 0:
            dense = dense * 10 ** random_like((len(dense), 1), torch.float64, seed)
        yield chain, dense, seed


def test_the_bounds_hold():
    for chain, dense, seed in targets(200):
        # E_q, from the supports alone.
        at_cut = [
            block_svd_distance(dense.numpy(), chain[:q].merge()[0], chain[q:].merge()[0]) for q in range(1, len(chain))
        ]
        orders = ["left_to_right", "balanced", random.Random(seed).sample(range(1, len(chain)), len(chain) - 1)]
        for order in orders:
            found = factorize(dense, chain, order=order, bounds=True)
            error = relative_distance(found.weights, dense, chain) * float(dense.norm())
            distances = [at_cut[q - 1] for q in found.report.cuts]
            rounding = 1e-10 * float(dense.norm())
            assert found.report.cut_distances.tolist() == pytest.approx(distances, abs=rounding)
            assert error <= sum(distances) + rounding
            assert float(found.report.sum_bound) == pytest.approx(sum(distances), abs=rounding)
            if order == "left_to_right":
                assert error <= math.hypot(*distances) + rounding
                assert float(found.report.bound) == pytest.approx(math.hypot(*distances), abs=rounding)
                # From left to right the losses are orthogonal, to each other and to what is off the support.
                losses = [float(found.report.outside), *found.report.split_distances.tolist()]
                assert math.hypot(*losses) == pytest.approx(error, abs=rounding)
            # Nothing is nearer than the nearest product of two factors.
            assert error >= max(distances) - rounding


def test_the_left_to_right_bound_can_fail_without_orthonormalisation():
    """Where rows and columns differ in scale, the plain algorithm splits a partial product in the wrong norm."""
    chain = Chain.butterfly(16)
    worst = {True: 0.0, False: 0.0}
    for seed in range(20):
        dense = random_like((16, 16), torch.float64, seed)
        dense = dense * 100 ** random_like((16, 1), torch.float64, seed + 1)
        dense = dense * 100 ** random_like((1, 16), torch.float64, seed + 2)
        for orthonormalize in worst:
            report = factorize(dense, chain, orthonormalize=orthonormalize, bounds=True).report
            assert (report.bound is None) == (not orthonormalize)
            ratio = float(report.error / report.root_square_sum_bound)
            worst[orthonormalize] = max(worst[orthonormalize], ratio)
    assert worst[True] <= 1 + 1e-10
    assert worst[False] > 2


def test_plain_factorisation_recovers_products_too():
    for seed in range(24):
        chain = chain_of(random.Random(seed).randint, 3)
        dense = to_dense([random_like(p.weight_shape, torch.float64, seed + q) for q, p in enumerate(chain)])
        assert relative_distance(factorize(dense, chain, orthonormalize=False).weights, dense, chain) < 1e-10


@pytest.mark.slow
def test_speed():
    """Two seconds and eight on two cores, counted as CPU time of one thread, so that a busy machine passes too."""

    def cpu_seconds(target: torch.Tensor, chain: Chain) -> float:
        start = time.process_time()
        factorize(target, chain)
        return time.process_time() - start

    transform = hadamard(2048)
    assert cpu_seconds(to_dense(transform.weights), transform.chain) < 2 * 2
    weight = torch.randn(4096, 4096)
    seconds = {blocks: cpu_seconds(weight, Chain.monarch(4096, 4096, blocks=blocks)) for blocks in (4, 8, 16, 32, 64)}
    assert max(seconds.values()) < 2 * 8, seconds
