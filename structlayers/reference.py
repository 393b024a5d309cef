"""The oracle: one Kronecker-sparse product, written as its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from structlayers.patterns import Pattern


def reference(
    x: Tensor,  # (N, a*c*d)
    weight: Tensor,  # (a, d, b, c)
) -> Tensor:  # (N, a*b*d)
    """Multiply by one factor, block by block: ``y[:, block (i, l)] = x[:, block (i, l)] @ w[i, l].T``."""
    a, b, c, d = Pattern.of_weight(weight.shape)
    y = x.new_empty(x.shape[0], a * b * d)
    for i in range(a):
        for l in range(d):
            rows = slice(i * b * d + l, (i + 1) * b * d, d)
            columns = slice(i * c * d + l, (i + 1) * c * d, d)
            y[:, rows] = torch.mm(x[:, columns], weight[i, l].T)
    return y
