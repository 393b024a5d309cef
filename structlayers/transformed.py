"""Products under ``torch.func`` and forward-mode differentiation, which registered operators take no part in.

An operator that is registered from Python refuses ``torch.func.grad``, with a list of tensors ``vmap`` too, and loses
tangents without a word. Here a product is a few operations of PyTorch itself, which know all of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from structlayers.backends import check_backend, einsum
from structlayers.backends.base import activate
from structlayers.backends.prepare import resize_features
from structlayers.errors import BackendError
from structlayers.problem import Layout, check_product


def is_transformed(backend: str) -> bool:
    """Whether a call is for :func:`multiply`; only asked where it would go to the dispatcher.

    Raises :class:`BackendError` where tangents are asked for and ``backend`` names one that would lose them.
    """
    tangents = forward_ad._current_level >= 0
    if not tangents and not torch._C._are_functorch_transforms_active():
        return False
    if backend in ("auto", "einsum"):
        return True
    if tangents:
        raise BackendError(f"backend = {check_backend(backend)!r} has no tangents: expected 'auto' or 'einsum'")
    return False


def multiply(
    x: Tensor,  # (..., in_features), batch-last (in_features, ...)
    weights: Sequence[Tensor],  # one (a, d, b, c) per factor, written order
    bias: Tensor | None,  # (out_features,)
    in_features: int | None,
    out_features: int | None,
    layout: str,
    activation: str,
) -> Tensor:  # (..., out_features), batch-last (out_features, ...)
    """What the operators compute, and raise, by operations that can be differentiated and batched in any way."""
    patterns, rows = check_product(x, weights, bias, out_features, in_features, layout, activation)
    order = Layout(layout)
    first = order is Layout.BATCH_FIRST
    batch = x.shape[:-1] if first else x.shape[1:]
    y = x.reshape(batch.numel(), x.shape[-1]) if first else x.reshape(x.shape[0], batch.numel())
    for pattern, weight in zip(reversed(patterns), reversed(weights), strict=True):
        y = einsum.multiply(resize_features(y, pattern.in_features, order), weight, order)
    y = resize_features(y, rows, order)
    if bias is not None:
        y = y + (bias if first else bias[:, None])
    return activate(y, activation).reshape((*batch, rows) if first else (rows, *batch))
