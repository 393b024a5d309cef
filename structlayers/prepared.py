"""What a call needs before it multiplies, checked and chosen once: the operators look it up by the shapes they meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from structlayers.backends import check_backend, tuning
from structlayers.errors import ShapeError
from structlayers.patterns import Chain
from structlayers.plans import ChainProblem, ChainProduct, choose_form, plan_problem, prepare
from structlayers.problem import Layout, check_product, rounds_to_tf32


def batch_size(x: Tensor, layout: Layout) -> int:
    """The rows of the batch, whatever dimensions it has."""
    return (x.shape[:-1] if layout is Layout.BATCH_FIRST else x.shape[1:]).numel()


# What was checked and chosen for one combination of shapes, dtypes, devices and options: finding it again is all that
# an ordinary call does in Python. Emptied when full.
_plans: dict[tuple[Any, ...], ChainProduct] = {}
_MOST_PLANS = 4096


def plan(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, *options: Any) -> ChainProduct:
    """The product of a chain, or of one that is held in several forms, as a function."""
    dtype, device = x.dtype, x.device
    parameters = weights if bias is None else (*weights, bias)
    for tensor in parameters:
        if tensor.dtype is not dtype or tensor.device != device:
            # For its message.
            return _make_plan(x, weights, bias, *options)
    tf32 = rounds_to_tf32() if dtype is torch.float32 else None
    key = (x.shape, dtype, device, tf32, options, len(weights), tuning.generation, *[t.shape for t in parameters])
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _make_plan(x, weights, bias, *options)
    return plan


def _make_plan(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    in_features: int | None,
    out_features: int | None,
    layout: str,
    activation: str,
    backend: str,
    lengths: tuple[int, ...] | None = None,
) -> ChainProduct:
    check_backend(backend)
    order = Layout(layout)
    chains = []
    for form in forms(weights, lengths):
        patterns, rows = check_product(x, form, bias, out_features, in_features, layout, activation)
        chains.append(Chain(patterns, in_features, rows))
    problem = ChainProblem.on(x.device, chains[0], batch_size(x, order), x.dtype, order)
    if lengths is None:
        return prepare(plan_problem(problem, "inference", backend), activation)
    number, plan = choose_form(chains, problem, backend)
    product = prepare(plan, activation)
    held = slice(sum(lengths[:number]), sum(lengths[: number + 1]))
    return lambda x, weights, bias: product(x, weights[held], bias)


def forms(weights: Sequence[Tensor], lengths: Sequence[int] | None) -> list[Sequence[Tensor]]:
    """The weights of every form; all of them are one where no lengths are given."""
    if lengths is None:
        return [weights]
    if sum(lengths) != len(weights) or min(lengths, default=0) < 1:
        raise ShapeError(f"lengths = {list(lengths)} of {len(weights)} weights: expected numbers >= 1 that add up")
    stops = list(accumulate(lengths))
    return [weights[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
