"""One ``torch.einsum`` over the four indices of the pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from structlayers.backends.base import Backend
from structlayers.patterns import Pattern
from structlayers.problem import Layout


def multiply(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    a, b, c, d = Pattern.of_weight(weight.shape)
    if layout is Layout.BATCH_FIRST:
        n = x.shape[0]
        return torch.einsum("nikl,iljk->nijl", x.reshape(n, a, c, d), weight).reshape(n, a * b * d)
    n = x.shape[1]
    return torch.einsum("ikln,iljk->ijln", x.reshape(a, c, d, n), weight).reshape(a * b * d, n)


def weight_grad(dy: Tensor, x: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    a, b, c, d = pattern
    if layout is Layout.BATCH_FIRST:
        n = x.shape[0]
        return torch.einsum("nijl,nikl->iljk", dy.reshape(n, a, b, d), x.reshape(n, a, c, d)).contiguous()
    n = x.shape[1]
    return torch.einsum("ijln,ikln->iljk", dy.reshape(a, b, d, n), x.reshape(a, c, d, n)).contiguous()


BACKEND = Backend("einsum", multiply, weight_grad=weight_grad)
