"""The oracle against sums of explicit Kronecker products."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from structlayers import Pattern
from structlayers.reference import reference


def unit(size: int, index: int) -> np.ndarray:
    matrix = np.zeros((size, size))
    matrix[index, index] = 1
    return matrix


def kronecker_sparse(weight: np.ndarray) -> np.ndarray:
    """``sum_{i,l} E_ii (x) w[i, l] (x) E_ll``: the definition of a factor with blocks ``w[i, l]``."""
    a, d, _, _ = weight.shape
    terms = [np.kron(np.kron(unit(a, i), weight[i, l]), unit(d, l)) for i in range(a) for l in range(d)]
    return np.sum(terms, axis=0)


@pytest.mark.parametrize("entries", list(itertools.product((1, 2, 3), (1, 2, 5), (1, 3, 4), (1, 2, 7))))
@pytest.mark.parametrize("n", [0, 1, 4])
def test_reference_is_the_kronecker_matrix(entries, n):
    pattern = Pattern(*entries)
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal(pattern.weight_shape), rng.standard_normal((n, pattern.in_features))
    y = reference(torch.from_numpy(x), torch.from_numpy(weight))
    assert y.shape == (n, pattern.out_features)
    np.testing.assert_allclose(y.numpy(), x @ kronecker_sparse(weight).T, rtol=1e-12, atol=1e-12)


def test_index_map_of_the_pattern():
    """``y[n, (i*b + j)*d + l] = sum_k w[i, l, j, k] * x[n, (i*c + k)*d + l]``, spelt out."""
    a, b, c, d = pattern = Pattern(2, 3, 4, 5)
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal(pattern.weight_shape), rng.standard_normal((2, pattern.in_features))
    y = reference(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    for n, i, j, l in itertools.product(range(2), range(a), range(b), range(d)):
        expected = sum(w[i, l, j, k] * x[n, (i * c + k) * d + l] for k in range(c))
        assert y[n, (i * b + j) * d + l] == pytest.approx(expected, rel=1e-12)
