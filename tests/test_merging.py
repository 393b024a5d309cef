"""Products of neighbouring factors: which of them the compiled kernel takes, and that torch's are the same."""

from __future__ import annotations

from functools import reduce
from types import SimpleNamespace

import pytest
import torch

from structlayers import Chain, Pattern
from structlayers.backends import cuda, merging
from structlayers.factorize import merge_weights


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Chain.butterfly(1024).patterns[:5], True),
        (Chain.butterfly(1024).patterns, True),
        (Chain.butterfly(4096).patterns, False),
        (Chain.monarch(64, 64, 8).patterns, True),
        (Chain.monarch(4096, 4096, 64).patterns, False),  # the tensor cores are faster
        (Chain.butterfly(2**13).patterns, False),  # a row of 8,192 elements
        (Chain.butterfly(2**5).patterns[:1], False),
        ((Pattern(1, 2, 3, 4), Pattern(5, 2, 3, 1)), False),  # not chainable
        ((Pattern(1, 1, 1, 1),) * 17, False),
    ],
    ids=str,
)
def test_what_the_compiled_kernel_is_made_for(run, expected):
    assert merging.fits(tuple(run)) is expected


def test_runs_are_multiplied_in_order_and_gradients_flow():
    chains = [Chain.butterfly(16), Chain.parse("(2,3,4,2)(4,4,5,1)")]
    runs = [[torch.randn(p.weight_shape, dtype=torch.float64, requires_grad=True) for p in chain] for chain in chains]
    products = merging.merge(runs)
    for run, product in zip(runs, products, strict=True):
        assert torch.equal(product, reduce(merge_weights, run))
    gradients = torch.autograd.grad(sum(product.sum() for product in products), [w for run in runs for w in run])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_only_runs_that_fit_go_to_the_kernel(monkeypatch):
    runs = [
        [torch.randn(p.weight_shape) for p in chain]
        for chain in [Chain.butterfly(8), Chain.monarch(16, 16, 4), *[Chain.butterfly(16)] * merging.MOST_RUNS]
    ]
    launches = []

    def kernel(weights, lengths):
        launches.append(lengths)
        parts = iter(weights)
        return [reduce(merge_weights, [next(parts) for _ in range(length)]) for length in lengths]

    monkeypatch.setattr(merging, "_takes_kernel", lambda run: len(run) > 2)
    monkeypatch.setattr(torch.ops.structlayers, "cuda_merge", kernel)
    for run, product in zip(runs, merging.merge(runs), strict=True):
        assert torch.equal(product, reduce(merge_weights, run))
    assert launches == [[3, *[4] * (merging.MOST_RUNS - 1)], [4]]


def test_a_gpu_too_old_for_the_kernels_multiplies_by_torch(monkeypatch):
    shapes = (1, 4, 2, 2), (2, 2, 2, 2)
    like = {"device": torch.device("cuda", 1), "dtype": torch.float32, "requires_grad": False}
    run = [SimpleNamespace(shape=shape, **like) for shape in shapes]
    monkeypatch.setattr(merging, "has_kernel", lambda: True)
    for reason, taken in ((None, True), ("compute capability 7.5", False)):
        monkeypatch.setattr(cuda, "why_device_does_not_serve", lambda device, reason=reason: reason)
        assert merging._takes_kernel(run) is taken
