"""Hadamard and Fourier transforms as chains, against their definitions and ``torch.fft``."""

from __future__ import annotations

import math

import pytest
import torch

from structlayers import Chain
from structlayers.errors import ChainError
from structlayers.factorize import factorize, to_dense
from structlayers.transforms import dft, hadamard


def popcount_hadamard(n: int) -> torch.Tensor:
    return torch.tensor([[(-1.0) ** (j & k).bit_count() for k in range(n)] for j in range(n)], dtype=torch.float64)


def fourier(n: int) -> torch.Tensor:
    """``F`` from its definition, by the transform of the identity's columns."""
    return torch.fft.fft(torch.eye(n, dtype=torch.complex128), dim=0)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64])
def test_hadamard_is_exact(n):
    transform = hadamard(n)
    assert torch.equal(to_dense(transform.weights), popcount_hadamard(n))
    assert torch.equal(transform.permutation, torch.arange(n))
    assert [tuple(w.shape) for w in transform.weights] == list(transform.chain.weight_shapes)
    assert len(transform.chain) == max(1, int(math.log2(n)))
    torch.testing.assert_close(to_dense(hadamard(n, norm="ortho").weights), popcount_hadamard(n) / math.sqrt(n))
    torch.testing.assert_close(to_dense(hadamard(n, norm="forward").weights), popcount_hadamard(n) / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hadamard_in_other_dtypes_is_as_exact(dtype):
    weights = hadamard(32, dtype=dtype).weights
    assert weights[0].dtype == dtype
    assert torch.equal(to_dense(weights).double(), popcount_hadamard(32))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 12, 30, 64, 90, 97, 128])
def test_dft_of_any_size(n):
    transform = dft(n)
    assert math.prod(p.b for p in transform.chain) == n
    assert torch.equal(transform.permutation.sort().values, torch.arange(n))
    w = to_dense(transform.weights)
    torch.testing.assert_close(w, fourier(n)[:, transform.permutation], rtol=0, atol=1e-12)
    x = torch.randn(n, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(w @ x[transform.permutation], torch.fft.fft(x), rtol=0, atol=1e-12 * n)


@pytest.mark.parametrize("radix", [(2, 3, 4, 5), (5, 4, 3, 2), (120,), (4, 30), (8, 1, 15)])
def test_dft_of_mixed_radices(radix):
    transform = dft(120, radix)
    assert [p.b for p in transform.chain] == list(radix)
    w = to_dense(transform.weights)
    torch.testing.assert_close(w, fourier(120)[:, transform.permutation], rtol=0, atol=1e-12)


def test_dft_reverses_bits():
    reversed_bits = [int(f"{k:04b}"[::-1], 2) for k in range(16)]
    assert dft(16).permutation.tolist() == reversed_bits


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize("inverse", [False, True])
def test_dft_norms_are_those_of_torch(norm, inverse):
    transform = dft(24, inverse=inverse, norm=norm)
    x = torch.randn(24, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    expected = (torch.fft.ifft if inverse else torch.fft.fft)(x, norm=norm)
    torch.testing.assert_close(to_dense(transform.weights) @ x[transform.permutation], expected)


def test_dft_in_single_precision_is_the_rounded_one():
    single, double = dft(64, dtype=torch.complex64), dft(64)
    assert all(torch.equal(s, d.to(torch.complex64)) for s, d in zip(single.weights, double.weights, strict=True))
    # Quarter turns are exact, so that a radix-4 transform of 4 has nothing but 1, -1, i and -i.
    (block,) = dft(4, (4,)).weights
    assert set(block.flatten().tolist()) <= {1, -1, 1j, -1j}


def test_factorize_finds_the_transforms_again():
    """Size 1024, dense and as the exact chain itself."""
    for transform in (hadamard(1024), dft(1024)):
        dense = to_dense(transform.weights)
        found = factorize(dense, transform.chain)
        assert float(found.report.relative_error) < 1e-12
        assert float((to_dense(found.weights) - dense).norm() / dense.norm()) < 1e-12
        coarse = factorize(transform.weights, Chain.butterfly(1024, [32, 32]))
        assert float((to_dense(coarse.weights) - dense).norm() / dense.norm()) < 1e-12


@pytest.mark.parametrize("n", [0, 3, 12, -4, 2.0, True])
def test_hadamard_refuses_other_sizes(n):
    with pytest.raises(ChainError, match=r"n = .*: expected a power of two"):
        hadamard(n)


def test_errors():
    with pytest.raises(ChainError, match="n = 0: expected an integer"):
        dft(0)
    with pytest.raises(ChainError, match=r"radix = \(2, 3\) multiplies to 6: expected n = 5"):
        dft(5, (2, 3))
    with pytest.raises(ChainError, match="radix"):
        dft(12, (2, 3))
    with pytest.raises(ValueError, match="norm = 'unitary': expected one of"):
        dft(4, norm="unitary")
    with pytest.raises(ValueError, match="norm = 'unitary': expected one of"):
        hadamard(4, norm="unitary")
    with pytest.raises(ValueError, match=r"dtype = torch.float64: expected a complex dtype"):
        dft(4, dtype=torch.float64)
