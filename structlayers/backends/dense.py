"""The factor written out as a dense matrix, then one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from structlayers.backends.base import Backend
from structlayers.patterns import Pattern
from structlayers.problem import Layout


def dense_weight(weight: Tensor) -> Tensor:
    """The dense ``(a*b*d, a*c*d)`` matrix of a factor stored as ``(a, d, b, c)``; differentiable."""
    a, b, c, d = Pattern.of_weight(weight.shape)
    matrix = weight.new_zeros(a, b, d, a, c, d)
    # The (i, l) diagonal of the six-dimensional view, as (a, d, b, c).
    support = matrix.diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).permute(2, 3, 0, 1)
    support.copy_(weight)
    return matrix.view(a * b * d, a * c * d)


def multiply(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    matrix = dense_weight(weight)
    if layout is Layout.BATCH_FIRST:
        return torch.mm(x, matrix.T)
    return torch.mm(matrix, x)


BACKEND = Backend("dense", multiply)
