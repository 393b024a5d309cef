"""One product as a function: a backend between padding and an epilogue."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from structlayers.backends import resolve
from structlayers.backends.base import Product, activate
from structlayers.problem import Layout, Problem


def resize_features(x: Tensor, size: int, layout: Layout) -> Tensor:
    """Zero-pad or crop a two-dimensional ``x`` to ``size`` features."""
    axis = 1 if layout is Layout.BATCH_FIRST else 0
    missing = size - x.shape[axis]
    if missing == 0:
        return x
    if missing < 0:
        return x.narrow(axis, 0, size)
    return F.pad(x, (0, missing) if axis == 1 else (0, 0, 0, missing))


def prepare(problem: Problem, activation: str, out_features: int, backend: str) -> Product:
    """One factor times a two-dimensional ``x``, whose missing features count as zeros; then bias and activation."""
    chosen, layout, in_features = resolve(backend, problem), problem.layout, problem.pattern.in_features
    if chosen.prepare is not None:
        return chosen.prepare(problem, activation, out_features)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = chosen.multiply(resize_features(x, in_features, layout), weight, layout)
        y = resize_features(y, out_features, layout)
        if bias is not None:
            # In place: every product writes a fresh tensor.
            y.add_(bias if layout is Layout.BATCH_FIRST else bias[:, None])
        return activate(y, activation).contiguous()

    return product
