"""Alternating least squares: optimal where the optimum is known, never worse than the start, for any chain."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from structlayers import Chain
from structlayers.errors import ChainError, ShapeError
from structlayers.factorize import factorize, to_dense
from structlayers.refine import blast_start, is_blast, project, refine

ANY_CHAIN = [
    "(1,4,4,2)(2,4,3,1)",
    "(1,2,2,4)(2,2,2,2)(4,2,2,1)[:7,:6]",
    "(2,3,4,1)(1,2,3,4)(3,4,2,1)",
    "(4,2,3,1)(1,3,5,4)[:8,:17]",
    "(1,5,1,1)(1,1,6,1)",
    "(3,2,2,2)",
]


def blast(b1: int, b2: int, p: int, q: int, r: int) -> Chain:
    return Chain([(b1, p, r, 1), (1, b1, b2, r), (b2, r, q, 1)])


def draw(chain: Chain, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=dtype) for shape in chain.weight_shapes]


def dense_of(weights, chain: Chain) -> torch.Tensor:
    return to_dense(weights, chain.in_features, chain.out_features)


def distance(weights, target, moment=None) -> float:
    difference = to_dense([w.to(target.dtype) for w in weights], target.shape[1], target.shape[0]) - target
    if moment is None:
        return float(difference.norm() / target.norm())
    squares = [(x @ moment @ x.mH).trace().real.clamp(min=0) for x in (difference, target)]
    return float((squares[0] / squares[1]).sqrt())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@given(
    spec=st.sampled_from(ANY_CHAIN),
    dtype=st.sampled_from([torch.float64, torch.complex128, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
    sweeps=st.integers(0, 6),
)
@example(spec="(1,4,4,2)(2,4,3,1)", dtype=torch.float64, seed=16, weighted=True, sweeps=6)
def test_never_worse_than_the_start(spec, dtype, seed, weighted, sweeps):
    chain = Chain.parse(spec)
    torch.manual_seed(seed)
    start = draw(chain, dtype)
    target = torch.randn(chain.out_features, chain.in_features, dtype=dtype)
    working = torch.complex128 if dtype.is_complex else torch.float64
    moment = None
    if weighted:
        # Fewer inputs than features: singular.
        inputs = torch.randn(max(1, chain.in_features - 2), chain.in_features, dtype=working)
        moment = inputs.mT @ inputs.conj()
    double = target.to(working)
    kept = [w.clone() for w in start]
    found = refine(start, target, input_moment=moment, max_sweeps=sweeps, tolerance=0)
    assert all(torch.equal(w, k) for w, k in zip(start, kept, strict=True))
    assert [(w.dtype, tuple(w.shape)) for w in found.weights] == [(dtype, shape) for shape in chain.weight_shapes]
    assert found.history[0] == pytest.approx(distance(start, double, moment), rel=1e-6)
    assert found.error == pytest.approx(distance(found.weights, double, moment), rel=1e-6, abs=1e-7)
    assert found.error <= found.history[0]
    assert 1 <= len(found.history) <= sweeps + 1
    # Least squares for one factor after the other: no sweep makes it worse; one that rounding spoils is not kept.
    assert all(after <= before for before, after in itertools.pairwise(found.history))


@pytest.mark.parametrize("spec", ANY_CHAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_sweep_ends_with_a_least_squares_solution(spec, dtype):
    chain = Chain.parse(spec)
    target = torch.randn(chain.out_features, chain.in_features, dtype=dtype)
    found = refine(draw(chain, dtype), target, max_sweeps=1)
    weights = [w.requires_grad_() for w in found.weights]
    (dense_of(weights, chain) - target).abs().square().sum().backward()
    # The factor solved last; the others have moved from their optimum since.
    assert float(weights[-1].grad.norm()) < 1e-6 * float(target.norm())


def test_two_factors_reach_the_block_svd_optimum():
    chain = Chain.monarch(20, 24, blocks=4, rank=1)
    target = torch.randn(24, 20, dtype=torch.float64)
    optimum = float(factorize(target, chain).report.relative_error)
    found = refine(draw(chain), target, max_sweeps=2000, tolerance=0)
    assert found.error == pytest.approx(optimum, rel=1e-4)
    assert found.error >= optimum * (1 - 1e-12)
    assert project(target, chain).error == pytest.approx(optimum, rel=1e-12)


def test_longer_chains_improve_on_the_factorisation():
    chain = Chain.butterfly(32)
    target = torch.randn(32, 32, dtype=torch.float64)
    start = float(factorize(target, chain).report.relative_error)
    found = project(target, chain)
    assert found.history[0] == pytest.approx(start, rel=1e-10)
    assert found.error < 0.99 * start


def test_an_input_moment_weighs_the_error():
    """The optimum of rank r for inputs ``x = S z`` is the truncated SVD of ``T S``."""
    target = torch.randn(9, 12, dtype=torch.float64)
    scale = torch.randn(12, 12, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 12, dtype=torch.float64))
    moment = scale @ scale.T
    sigma = torch.linalg.svdvals(target @ scale)
    optimum = float(sigma[3:].norm() / sigma.norm())
    chain = Chain.low_rank(12, 9, rank=3)
    found = project(target, chain, input_moment=moment, max_sweeps=500, tolerance=1e-9)
    assert found.error == pytest.approx(optimum, rel=1e-5)
    assert distance(factorize(target, chain).weights, target, moment) > 1.2 * optimum


# ---- chains that are not chainable


def test_what_is_blast():
    assert is_blast(blast(3, 5, 4, 6, 7))
    for spec in ("(1,4,4,2)(2,4,3,1)", "(1,2,2,4)(2,2,2,2)(4,2,2,1)", "(2,3,4,1)(2,2,2,2)(4,2,3,1)"):
        assert not is_blast(Chain.parse(spec))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("b1", "b2"), [(3, 3), (2, 4), (4, 2), (1, 3)])
def test_blast_holds_low_rank_and_block_rank_matrices(b1, b2, dtype):
    p, q = 5, 6
    rank = max(b1, b2)
    chain = blast(b1, b2, p, q, 2 * rank)
    low_rank = torch.randn(b1 * p, 2, dtype=dtype) @ torch.randn(2, b2 * q, dtype=dtype)
    blocks = torch.randn(b1, b2, p, 2, dtype=dtype) @ torch.randn(b1, b2, 2, q, dtype=dtype)
    block_rank = blocks.transpose(1, 2).reshape(b1 * p, b2 * q)
    for target in (low_rank, block_rank):
        weights = blast_start(target, chain)
        assert [tuple(w.shape) for w in weights] == list(chain.weight_shapes)
        assert distance(weights, target) < 1e-10


def test_blast_start_shares_its_rank_and_refinement_improves_on_it():
    b, p, r = 4, 16, 16
    chain = blast(b, b, p, p, r)
    target = torch.randn(b * p, b * p, dtype=torch.float64)
    sigma = torch.linalg.svdvals(target)
    low_rank = float(sigma[r:].norm() / sigma.norm())
    of_blocks = torch.linalg.svdvals(target.reshape(b, p, b, p).transpose(1, 2))
    block_rank = float(of_blocks[..., r // b :].norm() / sigma.norm())
    start = distance(blast_start(target, chain), target)
    assert start <= min(low_rank, block_rank) + 1e-12
    found = project(target, chain)
    assert found.history[0] == pytest.approx(start, rel=1e-10)
    assert found.error < 0.85 * start


def test_a_blast_matrix_is_found_again_from_nearby():
    chain = blast(2, 3, 16, 14, 5)
    weights = draw(chain)
    target = dense_of(weights, chain)
    near = [w + 0.05 * torch.randn_like(w) for w in weights]
    found = refine(near, target, max_sweeps=1000)
    assert found.history[0] > 0.05
    assert found.error < 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
def test_any_chain_can_be_projected_on(dtype):
    """Two factors that only compose: every entry of the product is one product of entries, a matrix of rank one."""
    chain = Chain.parse("(4,2,3,1)(1,3,5,4)")
    assert not chain.is_chainable
    target = dense_of(draw(chain, dtype), chain)
    found = project(target, chain, generator=torch.Generator().manual_seed(0))
    assert found.error < 1e-6
    assert found.weights[0].dtype == dtype
    assert distance(found.weights, target) == pytest.approx(found.error, abs=1e-6)


def test_a_moment_that_rounding_made_indefinite_does_no_harm():
    inputs = torch.randn(6, 12)
    moment = (inputs.T @ inputs).bfloat16().double()
    assert float(torch.linalg.eigvalsh(moment)[0]) < -1e-3
    chain = Chain.monarch(12, 12, blocks=2, rank=1)
    target = torch.randn(12, 12, dtype=torch.float64)
    found = project(target, chain, input_moment=moment)
    assert found.error <= found.history[0]
    assert all(bool(torch.isfinite(w).all()) for w in found.weights)


def test_zero_and_padding():
    chain = Chain.parse("(2,3,4,1)(1,2,3,4)(3,4,2,1)[:5,:4]")
    found = project(torch.zeros(5, 4), chain)
    assert float(dense_of(found.weights, chain).abs().max()) == 0
    target = dense_of(draw(chain), chain)
    assert project(target, chain, max_sweeps=300).error < 0.05


# ---- the loop


def test_it_stops_early():
    chain = Chain.butterfly(16)
    target = torch.randn(16, 16, dtype=torch.float64)
    start = factorize(target, chain).weights
    long = refine(start, target, max_sweeps=200, tolerance=0).history
    short = refine(start, target, max_sweeps=200, tolerance=1e-2).history
    assert len(short) < len(long)
    assert short == long[: len(short)]
    assert short[-1] > short[-2] * (1 - 1e-2)
    assert all(after < before * (1 - 1e-2) for before, after in itertools.pairwise(short[:-1]))
    assert refine(start, target, max_sweeps=0).history == long[:1]


def test_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    chain = Chain.butterfly(8)
    target = torch.randn(8, 8)
    quiet = project(target, chain, max_sweeps=3, tolerance=0)
    assert capsys.readouterr() == ("", "")
    shown = project(target, chain, max_sweeps=3, tolerance=0, progress=True)
    assert shown.history == quiet.history
    assert "refine" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True shows a bar with tqdm"):
        project(target, chain, progress=True)


def test_errors():
    chain = Chain.monarch(16, 8, blocks=2)
    weights, target = draw(chain), torch.randn(8, 16, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"target of shape \(2, 8, 16\): expected \(out_features, in_features\)"):
        refine(weights, target.expand(2, 8, 16))
    with pytest.raises(ShapeError, match=r"target of shape \(9, 16\): expected at most \(8, 16\)"):
        refine(weights, torch.randn(9, 16))
    with pytest.raises(ShapeError, match=r"target of shape \(16, 8\): expected \(8, 16\) for \(1,4,4,2\)"):
        project(target.T, chain)
    with pytest.raises(ShapeError, match=r"input_moment of shape \(8, 8\): expected \(16, 16\)"):
        refine(weights, target, input_moment=torch.eye(8))
    with pytest.raises(ValueError, match="input_moment is not Hermitian"):
        refine(weights, target, input_moment=torch.randn(16, 16))
    with pytest.raises(ValueError, match=r"weights\[1\] has 1 values that are not finite"):
        refine(
            [weights[0], weights[1].clone().index_put_((torch.tensor(0),) * 4, torch.tensor(1e999).double())], target
        )
    with pytest.raises(ValueError, match="target has 128 values that are not finite"):
        project(target * float("nan"), chain)
    with pytest.raises(ValueError, match="max_sweeps = -1"):
        refine(weights, target, max_sweeps=-1)
    with pytest.raises(ChainError, match="expected a BLAST chain"):
        blast_start(target, chain)
