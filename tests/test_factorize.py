"""Products of factors and factorisations, against dense matrices."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from structlayers import Chain, Pattern
from structlayers.errors import ChainError, ShapeError
from structlayers.factorize import factorize, merge_weights, project_factor, split_weight, to_dense

CHAINABLE = [
    (Pattern(1, 4, 4, 2), Pattern(2, 4, 3, 1)),
    (Pattern(2, 3, 4, 6), Pattern(4, 6, 5, 2)),
    (Pattern(1, 5, 3, 1), Pattern(1, 3, 6, 1)),
    (Pattern(2, 2, 2, 4), Pattern(4, 2, 2, 2)),
    (Pattern(3, 1, 2, 5), Pattern(6, 5, 7, 1)),
    (Pattern(1, 2, 12, 3), Pattern(2, 18, 2, 1)),
]


def draw(pattern: Pattern, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*pattern.weight_shape, dtype=torch.float64).to(dtype)


def chain_of(seed: int) -> Chain:
    """A random chainable chain: random link after random link."""
    rng = random.Random(seed)
    patterns = [Pattern(rng.choice((1, 2)), rng.choice((1, 2, 3)), rng.choice((2, 4, 6)), rng.choice((1, 2, 4, 6)))]
    while len(patterns) < 2 + seed % 3:
        left = patterns[-1]
        alpha = rng.choice([f for f in range(1, left.c + 1) if left.c % f == 0])
        delta = rng.choice([f for f in range(1, left.d + 1) if left.d % f == 0])
        rank = left.c // alpha
        patterns.append(Pattern(left.a * alpha, rank * delta, rng.choice((1, 2, 4)), left.d // delta))
    return Chain(patterns)


CHAINS = [chain_of(seed) for seed in range(24)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("left", "right"), CHAINABLE, ids=str)
def test_merge_is_the_exact_product(left, right):
    weights = [draw(left).requires_grad_(), draw(right).requires_grad_()]
    merged = merge_weights(*weights)
    assert merged.shape == left.link(right).product.weight_shape
    torch.testing.assert_close(to_dense([merged]), to_dense(weights))
    assert torch.autograd.gradcheck(merge_weights, weights)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.spec)
def test_merging_a_random_chain_in_any_order(chain):
    assert chain.is_chainable
    weights = [draw(p) for p in chain]
    dense = to_dense(weights)
    while len(weights) > 1:
        q = random.Random(len(weights)).randrange(len(weights) - 1)
        weights[q : q + 2] = [merge_weights(weights[q], weights[q + 1])]
        torch.testing.assert_close(to_dense(weights), dense)
    assert tuple(weights[0].shape) == chain.merge()[0].weight_shape


@pytest.mark.parametrize(("left", "right"), CHAINABLE, ids=str)
def test_split_recovers_a_product_and_cannot_be_improved(left, right):
    product = left.link(right).product
    exact = merge_weights(draw(left), draw(right))
    lefts, rights, distance = split_weight(exact, left, right)
    assert (lefts.shape, rights.shape) == (left.weight_shape, right.weight_shape)
    torch.testing.assert_close(merge_weights(lefts, rights), exact)
    assert float(distance) == pytest.approx(0, abs=1e-10 * float(exact.norm()))

    weight = draw(product)
    lefts, rights, distance = split_weight(weight, left, right)
    assert float((merge_weights(lefts, rights) - weight).norm()) == pytest.approx(float(distance), abs=1e-10)
    # At the optimum each factor is the least-squares solution for the other: the residual is orthogonal to every change
    # of one of them.
    lefts.requires_grad_()
    rights.requires_grad_()
    (merge_weights(lefts, rights) - weight).square().sum().backward()
    for factor in (lefts, rights):
        assert float(factor.grad.norm()) < 1e-9
    # Nor is a random restart better.
    for _ in range(3):
        left_try, right_try = draw(left), draw(right)
        for _ in range(20):
            left_try, right_try = improved(weight, left_try, right_try)
        found = float((merge_weights(left_try, right_try) - weight).norm())
        assert found >= float(distance) * (1 - 1e-9)


def improved(weight, left, right):
    """One round of alternating least squares for the two-factor product."""
    for which in (0, 1):
        pair = [left, right]
        shape = pair[which].shape
        basis = torch.eye(pair[which].numel(), dtype=torch.float64).view(-1, *shape)
        columns = []
        for direction in basis:
            trial = list(pair)
            trial[which] = direction
            columns.append(merge_weights(*trial).reshape(-1))
        matrix = torch.stack(columns, dim=1)
        solution = torch.linalg.lstsq(matrix, weight.reshape(-1, 1), driver="gelsd").solution
        pair[which] = solution.view(shape)
        left, right = pair
    return left, right


def relative_distance(weights, target, chain) -> float:
    product = to_dense(weights, chain.in_features, chain.out_features)
    return float((product - target).norm() / target.norm())


@pytest.mark.parametrize("chain", [*CHAINS, Chain.butterfly(32), Chain.btt(36, 25, 2)], ids=lambda c: c.spec)
def test_factorize_recovers_products_of_chainable_chains(chain):
    dense = to_dense([draw(p) for p in chain], chain.in_features, chain.out_features)
    factors = factorize(dense, chain).weights
    assert [tuple(f.shape) for f in factors] == list(chain.weight_shapes)
    assert all(f.is_contiguous() for f in factors)
    torch.testing.assert_close(to_dense(factors, chain.in_features, chain.out_features), dense)


@pytest.mark.parametrize(
    ("chain", "exact"),
    # Blocks of 5 x 8 and 5 x 4: rank 5 holds any, rank 1 does not.
    [(Chain.monarch(30, 18, blocks=4, rank=5), True), (Chain.monarch(10, 14, blocks=3, rank=1), False)],
    ids=["full rank", "rank 1"],
)
def test_factorize_pads(chain, exact):
    dense = torch.randn(chain.out_features, chain.in_features, dtype=torch.float64)
    factors = factorize(dense, chain).weights
    product = to_dense(factors, chain.in_features, chain.out_features)
    distance = float((product - dense).norm()) / float(dense.norm())
    assert (distance < 1e-10) if exact else (0.1 < distance < 1)
    # The padding of the product is zero: no energy goes where no feature is.
    padded = to_dense(factors)
    assert float(padded[chain.out_features :].norm()) < 1e-10
    assert float(padded[:, chain.in_features :].norm()) < 1e-10


def test_factorize_of_one_factor_is_a_projection():
    pattern = Pattern(2, 3, 4, 5)
    dense = torch.randn(pattern.out_features, pattern.in_features, dtype=torch.float64)
    (factor,) = factorize(dense, Chain([pattern])).weights
    assert torch.equal(factor, project_factor(dense, pattern))
    projected = to_dense([factor])
    assert torch.equal(projected[projected != 0], dense[projected != 0])
    assert int((projected != 0).sum()) == pattern.nnz


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factorize_keeps_the_dtype_and_detaches(dtype):
    chain = Chain.monarch(16, 16, blocks=4)
    weight = torch.randn(16, 16, dtype=dtype, requires_grad=True)
    factors = factorize(weight, chain).weights
    assert {f.dtype for f in factors} == {dtype}
    assert not any(f.requires_grad for f in factors)


def test_to_dense_of_chains_that_are_not_chainable():
    chain = Chain.parse("(4,2,3,1)(1,3,5,4)")
    assert not chain.is_chainable
    left, right = draw(chain[0]), draw(chain[1])
    matrices = []
    for weight in (left, right):
        a, d, b, c = weight.shape
        matrix = torch.zeros(a * b * d, a * c * d, dtype=torch.float64)
        for i, l, j, k in itertools.product(range(a), range(d), range(b), range(c)):
            matrix[(i * b + j) * d + l, (i * c + k) * d + l] = weight[i, l, j, k]
        matrices.append(matrix)
    torch.testing.assert_close(to_dense([left, right]), matrices[0] @ matrices[1])
    torch.testing.assert_close(to_dense([left, right], 7, 5), (matrices[0] @ matrices[1])[:5, :7])


REDUNDANT = [
    "(1,4,9,1)(1,9,6,1)",
    "(1,6,3,1)(1,3,3,1)(1,3,5,1)",
    "(1,2,4,4)(2,4,4,2)(2,4,4,2)(4,4,3,1)",
    "(2,3,12,4)(4,12,8,2)(16,4,2,1)",
]


@pytest.mark.parametrize("spec", REDUNDANT)
@pytest.mark.parametrize("order", ["left_to_right", "balanced"])
def test_redundant_chains_are_split_where_it_matters(spec, order):
    chain = Chain.parse(spec)
    assert chain.is_chainable and chain.is_redundant
    dense = to_dense([draw(p) for p in chain])
    found = factorize(dense, chain, order=order, bounds=True)
    assert [tuple(w.shape) for w in found.weights] == list(chain.weight_shapes)
    assert relative_distance(found.weights, dense, chain) < 1e-10
    assert len(found.report.cuts) < len(chain) - 1
    # As near as the chain with those neighbours merged, whose redundant cuts are gone.
    merged = chain
    while merged.is_redundant:
        q = next(q for q, link in enumerate(merged.links) if link.is_redundant)
        merged = merged.merge(q, q + 2)
    noisy = dense + torch.randn_like(dense)
    ours, expected = factorize(noisy, chain, order=order).report, factorize(noisy, merged, order=order).report
    assert float(ours.error) == pytest.approx(float(expected.error), rel=1e-10)


def test_redundant_ranks_are_zero():
    left, right = factorize(torch.randn(4, 6, dtype=torch.float64), Chain.low_rank(6, 4, rank=9)).weights
    used = (left[0, 0].abs().sum(0) > 0) & (right[0, 0].abs().sum(1) > 0)
    assert int(used.sum()) == 4


@pytest.mark.parametrize("batch", [(3,), (2, 3), (1,), (0,), (2, 0)])
def test_a_batch_is_every_matrix_by_itself(batch):
    chain = Chain.parse("(1,3,4,4)(2,4,6,2)(4,6,3,1)[:11,:7]")
    dense = torch.randn(*batch, 11, 7, dtype=torch.float64)
    found = factorize(dense, chain, bounds=True)
    assert [tuple(w.shape) for w in found.weights] == [(*batch, *shape) for shape in chain.weight_shapes]
    assert found.report.norm.shape == found.report.relative_error.shape == found.report.bound.shape == batch
    assert found.report.split_distances.shape == found.report.cut_distances.shape == (*batch, len(found.report.cuts))
    for index in itertools.product(*map(range, batch)):
        alone = factorize(dense[index], chain, bounds=True)
        torch.testing.assert_close(
            to_dense([w[index] for w in found.weights]), to_dense(alone.weights), rtol=0, atol=1e-12
        )
        for name in ("norm", "error", "cut_distances", "split_distances", "bound"):
            torch.testing.assert_close(getattr(found.report, name)[index], getattr(alone.report, name))
    again = factorize(found.weights, chain)
    torch.testing.assert_close(to_dense(again.weights), to_dense(found.weights), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_any_scale_will_do(scale):
    chain = Chain.butterfly(16)
    dense = torch.randn(16, 16, dtype=torch.float64)
    small, large = factorize(dense, chain, bounds=True), factorize(dense * scale, chain, bounds=True)
    assert float(large.report.relative_error) == pytest.approx(float(small.report.relative_error), rel=1e-9)
    assert float(large.report.bound) == pytest.approx(float(small.report.bound) * scale, rel=1e-9)
    norms = [float(w.norm()) for w in large.weights]
    assert norms == pytest.approx([norms[0]] * 4)


def test_zero_is_recovered():
    found = factorize(torch.zeros(16, 16), Chain.butterfly(16), bounds=True)
    assert float(to_dense(found.weights).abs().max()) == 0
    assert float(found.report.relative_error) == float(found.report.bound) == 0


def test_what_is_off_the_support_is_reported():
    chain = Chain.parse("(2,3,1,2)(2,2,4,1)")
    weights = [draw(p) for p in chain]
    outside = torch.randn(12, 8, dtype=torch.float64) * (to_dense(weights) == 0)
    found = factorize(to_dense(weights) + outside, chain, bounds=True)
    assert float(found.report.outside) == pytest.approx(float(outside.norm()))
    assert float(found.report.error) == pytest.approx(float(outside.norm()))
    assert float(found.report.bound) == pytest.approx(float(outside.norm()))
    # A product of factors of another support is multiplied out for it.
    dense = [torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)]
    torch.testing.assert_close(factorize(dense, chain).weights, factorize(dense[0] @ dense[1], chain).weights)


def test_the_report_reads_well():
    dense = torch.randn(2, 16, 16, dtype=torch.float64)
    weights, report = factorize(dense, "(1,2,2,8)(2,8,8,1)", bounds=True)
    assert len(weights) == 2
    assert str(report) == (
        f"relative error {report.relative_error.max():.3g} at most, {report.relative_error.median():.3g} in the median "
        f"of 2 matrices, bound {(report.bound / report.norm).max():.3g}"
    )
    plain = factorize(dense[0], Chain.butterfly(16)).report
    assert str(plain) == f"relative error {plain.relative_error:.3g}"
    with pytest.raises(ValueError, match="the bounds were not asked for"):
        _ = plain.sum_bound


def test_errors():
    chain = Chain.monarch(16, 8, blocks=2)
    with pytest.raises(ShapeError, match=r"weight of shape \(16, 8\): expected \(8, 16\)"):
        factorize(torch.randn(16, 8), chain)
    weight = torch.randn(8, 16)
    weight[0, :3] = float("nan")
    with pytest.raises(ValueError, match="weight has 3 values that are not finite"):
        factorize(weight, chain)
    with pytest.raises(ChainError, match="not chainable"):
        factorize(torch.randn(8, 8), Chain.parse("(4,2,2,1)(1,2,2,4)"))
    with pytest.raises(ChainError, match="not chainable"):
        merge_weights(torch.randn(4, 1, 2, 2), torch.randn(1, 4, 2, 2))
    with pytest.raises(ShapeError, match=r"expected \(1, 1, 8, 6\)"):
        split_weight(torch.randn(1, 1, 8, 5), *CHAINABLE[0])
    with pytest.raises(ValueError, match="order = 'random': expected 'left_to_right', 'balanced' or the cuts 1 to 3"):
        factorize(torch.randn(16, 16), Chain.butterfly(16), order="random")
    with pytest.raises(ValueError, match=r"order = \(1, 2\): expected"):
        factorize(torch.randn(16, 16), Chain.butterfly(16), order=(1, 2))
    with pytest.raises(ShapeError, match=r"torch.int64: expected a floating-point or complex dtype"):
        factorize(torch.ones(8, 16, dtype=torch.int64), chain)
    with pytest.raises(ShapeError, match="weight with 0 factors"):
        factorize([], chain)
    with pytest.raises(ShapeError, match=r"of 8 x 15: expected \(8, 16\)"):
        factorize([torch.randn(8, 2), torch.randn(2, 15)], chain)
    with pytest.raises(ShapeError, match=r"weight\[1\] of shape \(2, 1, 1, 2, 16\): expected"):
        factorize([torch.randn(8, 2), torch.randn(2, 1, 1, 2, 16)], chain)
    with pytest.raises(ShapeError, match="expected one dtype and device"):
        factorize([torch.randn(8, 2), torch.randn(2, 16).double()], chain)
    with pytest.raises(ChainError, match="do not compose"):
        factorize([torch.randn(8, 2), torch.randn(3, 16)], chain)
    broken = torch.randn(2, 16)
    broken[1, 3] = float("inf")
    with pytest.raises(ValueError, match="weight has 1 values that are not finite"):
        factorize([torch.randn(8, 2), broken], chain)
