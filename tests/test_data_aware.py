"""Calibration and data-aware factorisation: moments by definition, outputs nearer than by plain block SVD."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from structlayers import Chain, SwapRule, swap_linears
from structlayers.calibrate import collect_moments
from structlayers.data_aware import project_data
from structlayers.errors import DataError, ShapeError
from structlayers.factorize import factorize, to_dense


def inputs(rows: int, features: int) -> torch.Tensor:
    """Correlated, of very different sizes, with a mean."""
    torch.manual_seed(0)
    mix = torch.randn(features, features) * torch.logspace(0, -2, features)
    return torch.randn(rows, features) @ mix + 0.3


def test_moments_are_those_of_the_inputs():
    x = inputs(300, 12)
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))
    moments = collect_moments(model, [x[:100], x[100:]])
    assert list(moments) == ["0", "2"]
    hidden = model[1](model[0](x)).double()
    for name, data in (("0", x.double()), ("2", hidden)):
        assert moments[name].rows == 300
        torch.testing.assert_close(moments[name].mean, data.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments[name].second, data.T @ data / 300, rtol=1e-5, atol=1e-6)


def test_moments_in_inference_mode():
    x = inputs(300, 12)
    model = nn.ModuleDict({"one": nn.Linear(12, 7), "two": nn.Linear(12, 7), "three": nn.Linear(12, 7)})

    def forward(model, batch):
        model["one"](batch)
        model["two"](batch)
        # Tensors of inference mode do not count their changes.
        model["three"](batch.mul_(2))

    expected = collect_moments(model, [x[:100].clone(), x[100:].clone()], forward=forward)
    with torch.inference_mode():
        found = collect_moments(model, [x[:100].clone(), x[100:].clone()], forward=forward)
    for name, moments in expected.items():
        torch.testing.assert_close(found[name].second, moments.second)
    assert swap_linears(model, SwapRule("low_rank", {"rank": 2}), init="project_data", moments=found).swapped


@pytest.mark.parametrize(
    "chain",
    [Chain.monarch(24, 36, 2), Chain.low_rank(24, 36, 5), Chain.btt(24, 36, rank=2)],
    ids=lambda c: c.spec,
)
def test_outputs_are_nearer_than_by_plain_block_svd(chain):
    x = inputs(2000, 24)
    weight = torch.randn(36, 24)
    moments = collect_moments(nn.Sequential(nn.Linear(24, 36)), [x])["0"]
    found = project_data(weight, chain, moments, ridge=1e-6)
    plain = to_dense(factorize(weight, chain).weights, 24, 36)
    ours = to_dense(found.weights, 24, 36)
    error = [float((x @ (weight - w).T).norm() / (x @ weight.T).norm()) for w in (ours, plain)]
    assert error[0] < 0.8 * error[1]
    assert error[0] == pytest.approx(found.error, rel=0.05)
    assert all(after <= before * (1 + 1e-9) for before, after in zip(found.history, found.history[1:], strict=False))


def test_swapping_by_calibration():
    x = inputs(500, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    expected = model(x)
    moments = collect_moments(model, [x])
    swap_linears(model, SwapRule("monarch", {"blocks": 4}), init="project_data", moments=moments)
    assert torch.isfinite(model(x)).all()
    assert (model(x) - expected).norm() < expected.norm()


def test_too_little_data_is_named():
    model = nn.Sequential(nn.Linear(16, 8))
    few = collect_moments(model, [inputs(3, 16)])["0"]
    with pytest.raises(DataError, match="3 rows for 16"):
        few.moment(ridge=0)
    with pytest.warns(UserWarning, match="3 rows for 16"):
        few.moment(ridge=0.1)


def test_low_rank_is_the_optimum_in_closed_form():
    """With ``S = R R^T`` the output error is ``||(W - W_hat) R||``: the truncated SVD of ``W R`` cannot be beaten."""
    x, weight = inputs(500, 24), torch.randn(36, 24, dtype=torch.float64)
    moments = collect_moments(nn.Sequential(nn.Linear(24, 36)), [x])["0"]
    root = torch.linalg.cholesky(moments.moment(1e-3))
    sigma = torch.linalg.svdvals(weight @ root)
    found = project_data(weight, Chain.low_rank(24, 36, 5), moments, ridge=1e-3)
    assert found.error == pytest.approx(float(sigma[5:].norm() / sigma.norm()), abs=1e-8)
    difference = (weight - to_dense(found.weights, 24, 36)) @ root
    assert float(difference.norm() / sigma.norm()) == pytest.approx(found.error, abs=1e-8)


@pytest.mark.parametrize("spec", ["(1,6,6,4)(2,6,6,2)(4,6,6,1)", "(2,12,3,1)(1,2,2,3)(2,3,12,1)"])
def test_longer_chains_and_those_not_chainable(spec):
    chain = Chain.parse(spec)
    x, weight = inputs(500, chain.in_features), torch.randn(chain.out_features, chain.in_features)
    moments = collect_moments(nn.Sequential(nn.Linear(chain.in_features, chain.out_features)), [x])["0"]
    found = project_data(weight, chain, moments, ridge=1e-6)
    error = float((x @ (weight - to_dense(found.weights)).T).norm() / (x @ weight.T).norm())
    assert error == pytest.approx(found.error, rel=0.05)
    assert found.error < 1 and found.error <= found.history[0]


def test_what_does_not_fit_is_named():
    moments = collect_moments(nn.Sequential(nn.Linear(16, 8)), [inputs(50, 16)])["0"]
    chain = Chain.low_rank(16, 8, 2)
    with pytest.raises(ShapeError, match=r"weight of shape \(16, 8\): expected \(8, 16\)"):
        project_data(torch.randn(16, 8), chain, moments)
    with pytest.raises(ShapeError, match="moments of 16 features: expected 12"):
        project_data(torch.randn(8, 12), Chain.low_rank(12, 8, 2), moments)
    weight = torch.randn(8, 16)
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        project_data(weight, chain, moments)


def test_bad_calibration_is_named():
    model = nn.Sequential(nn.Linear(16, 8))
    x = inputs(50, 16)
    x[3, 2] = float("inf")
    with pytest.raises(DataError, match="calibration batch 0, input of 0: 1 of 800 values are not finite"):
        collect_moments(model, [x])
    with pytest.raises(DataError, match="the loader has no batches"):
        collect_moments(model, [])
    unused = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    moments = collect_moments(unused, [inputs(9, 4)], forward=lambda model, batch: model["used"](batch))
    with pytest.raises(DataError, match="unused: 0 rows of 4 features"):
        swap_linears(unused, SwapRule("low_rank", {"rank": 1}), init="project_data", moments=moments)
