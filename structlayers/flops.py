"""FLOPs of the operators, for ``torch.utils.flop_counter``: those of the factors, however a product is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from structlayers.patterns import Pattern


def _of_factors(x_shape: Sequence[int], weight_shapes: Sequence[Sequence[int]], layout: str) -> int:
    n = torch.Size(x_shape[:-1] if layout == "batch_first" else x_shape[1:]).numel()
    return sum(Pattern.of_weight(shape).flops(n) for shape in weight_shapes)


def _chain(x_shape, weight_shapes, bias, in_features, out_features, layout, *rest, **kwargs) -> int:
    return _of_factors(x_shape, weight_shapes, layout)


def _linear(x_shape, weight_shape, bias, in_features, out_features, layout, *rest, **kwargs) -> int:
    return _of_factors(x_shape, [weight_shape], layout)


def _frozen(x_shape, weight_shapes, lengths, bias, in_features, out_features, layout, *rest, **kwargs) -> int:
    # The factors come first, whatever form is multiplied by.
    return _of_factors(x_shape, weight_shapes[: lengths[0]], layout)


def _weight_grad(dy_shape, x_shape, weight_shape, layout, *rest, **kwargs) -> int:
    return _of_factors(x_shape, [weight_shape], layout)


# By the operator's name; each takes the operator's arguments, tensors as their shapes.
FORMULAS = {"ks_linear": _linear, "ks_chain": _chain, "ks_frozen": _frozen, "ks_weight_grad": _weight_grad}
