"""The factor written out as a dense matrix, then one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers.backends.base import Backend, Product, activate
from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem


def dense_weight(weight: Tensor) -> Tensor:
    """The dense ``(a*b*d, a*c*d)`` matrix of a factor stored as ``(a, d, b, c)``; differentiable.

    A view where the factor is one block.
    """
    a, b, c, d = Pattern.of_weight(weight.shape)
    if a == d == 1:
        return weight.view(b, c)
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


def prepare(problem: Problem, activation: str, out_features: int) -> Product:
    """The product as ``F.linear`` computes it, on the part of the matrix that the logical sizes leave."""
    first = problem.layout is Layout.BATCH_FIRST

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = dense_weight(weight)[:out_features, : x.shape[1 if first else 0]]
        if first:
            y = F.linear(x, matrix, bias)
        else:
            y = torch.mm(matrix, x) if bias is None else torch.addmm(bias[:, None], matrix, x)
        return activate(y, activation).contiguous()

    return product


BACKEND = Backend("dense", multiply, prepare=prepare)
