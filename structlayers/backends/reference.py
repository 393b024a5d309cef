"""The oracle as a backend."""

from __future__ import annotations

from torch import Tensor

from structlayers.backends import einsum
from structlayers.backends.base import Backend
from structlayers.problem import Layout
from structlayers.reference import reference


def multiply(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    if layout is Layout.BATCH_FIRST:
        return reference(x, weight)
    return reference(x.T, weight).T


BACKEND = Backend("reference", multiply, weight_grad=einsum.weight_grad)
