"""One batched matrix product over the ``a*d`` blocks, between two permutations.

Without interleaving (d = 1) the permutations are views: input and output are read and written in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structlayers.backends.base import Backend
from structlayers.patterns import Pattern
from structlayers.problem import Layout


def multiply(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    a, b, c, d = Pattern.of_weight(weight.shape)
    blocks = weight.reshape(a * d, b, c)
    if layout is Layout.BATCH_FIRST:
        n = x.shape[0]
        # (a*d, n, c): a view where d = 1 and the last dimension has stride 1
        inputs = x.unflatten(1, (a, c, d)).permute(1, 3, 0, 2).reshape(a * d, n, c)
        y = x.new_empty(n, a * b * d)
        if d == 1:
            torch.bmm(inputs, blocks.mT, out=y.view(n, a, b).transpose(0, 1))
        else:
            y.view(n, a, b, d).copy_(torch.bmm(inputs, blocks.mT).view(a, d, n, b).permute(2, 0, 3, 1))
        return y
    n = x.shape[1]
    inputs = x.unflatten(0, (a, c, d)).transpose(1, 2).reshape(a * d, c, n)  # a view where a = 1 or d = 1
    y = x.new_empty(a * b * d, n)
    outputs = y.view(a, b, d, n).transpose(1, 2)  # (a, d, b, n)
    if a == 1 or d == 1:
        torch.bmm(blocks, inputs, out=outputs.view(a * d, b, n))
    else:
        outputs.copy_(torch.bmm(blocks, inputs).view(a, d, b, n))
    return y


BACKEND = Backend("bmm", multiply)
