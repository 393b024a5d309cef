"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem

# (x, weight, bias) to the output, for one problem, activation and logical output size; x is two-dimensional.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


_EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation of that name of :data:`structlayers.problem.ACTIVATIONS`, as an operation of its own."""
    return _EPILOGUES[activation](z)


def supports_everything(problem: Problem) -> None:
    """No reason against any problem."""
    return None


@dataclass(frozen=True)
class Backend:
    """One way to multiply by a factor.

    ``multiply(x, weight, layout)`` takes a two-dimensional ``x`` of the padded size, ``(N, a*c*d)`` or ``(a*c*d, N)``
    with any strides, and a weight viewed as ``(a, d, b, c)`` with any strides; it returns the product, in memory of its
    own and in the same layout.
    ``reason_against(problem)`` is None, or the sentence that tells a user why this backend cannot compute it.
    ``prepare(problem, activation, out_features)`` returns the whole product as a function, for backends that take
    logical sizes, bias and activation along and write a contiguous output; None where ``multiply`` between padding and
    an epilogue serves.
    ``weight_grad(dy, x, pattern, layout)`` takes both of the padded size and returns ``(a, d, b, c)``, contiguous; None
    where that of the ``bmm`` backend serves. With ``weight_grad_of_logical_sizes`` it takes fewer features as well, and
    those that are missing count as zeros.
    ``reason_against_weight_grad(problem)`` is what stands against ``weight_grad`` alone.
    """

    name: str
    multiply: Callable[[Tensor, Tensor, Layout], Tensor]
    reason_against: Callable[[Problem], str | None] = supports_everything
    prepare: Callable[[Problem, str, int], Product] | None = None
    weight_grad: Callable[[Tensor, Tensor, Pattern, Layout], Tensor] | None = None
    weight_grad_of_logical_sizes: bool = False
    reason_against_weight_grad: Callable[[Problem], str | None] = supports_everything
