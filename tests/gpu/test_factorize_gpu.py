"""Factorisation and refinement on a GPU give what they give on a CPU."""

from __future__ import annotations

import pytest
import torch

from structlayers import Chain
from structlayers.factorize import factorize, to_dense
from structlayers.refine import project
from structlayers.transforms import dft, hadamard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("spec", ["(1,3,4,4)(2,4,6,2)(4,6,3,1)[:11,:7]", "(1,6,3,1)(1,3,3,1)(1,3,5,1)", "(2,3,12,4)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["left_to_right", "balanced"])
def test_factorize(spec, dtype, order):
    chain = Chain.parse(spec)
    torch.manual_seed(0)
    weight = torch.randn(2, chain.out_features, chain.in_features, dtype=dtype)
    expected = factorize(weight, chain, order=order, bounds=True)
    found = factorize(weight.cuda(), chain, order=order, bounds=True)
    assert {w.device.type for w in found.weights} == {"cuda"}
    for name in ("norm", "error", "split_distances", "cut_distances"):
        torch.testing.assert_close(getattr(found.report, name), getattr(expected.report, name), rtol=1e-2, atol=1e-3)
    if dtype in (torch.float64, torch.complex128):
        torch.testing.assert_close(to_dense(found.weights).cpu(), to_dense(expected.weights), rtol=0, atol=1e-10)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_are_recovered_whatever_the_matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for transform in (hadamard(1024, device="cuda"), dft(1024, device="cuda")):
            found = factorize(to_dense(transform.weights), transform.chain)
            assert float(found.report.relative_error) < 1e-10
            again = factorize(transform.weights, Chain.butterfly(1024, [32, 32]))
            assert float(again.report.relative_error) < 1e-10
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("spec", ["(2,3,4,1)(1,2,3,4)(3,4,2,1)[:5,:5]", "(1,2,2,4)(2,2,2,2)(4,2,2,1)"])
def test_project(spec):
    chain = Chain.parse(spec)
    torch.manual_seed(0)
    target = torch.randn(chain.out_features, chain.in_features, dtype=torch.float64)
    expected = project(target, chain, max_sweeps=3, tolerance=0)
    found = project(target.cuda(), chain, max_sweeps=3, tolerance=0)
    assert {w.device.type for w in found.weights} == {"cuda"}
    assert found.history == pytest.approx(expected.history, rel=1e-6)
