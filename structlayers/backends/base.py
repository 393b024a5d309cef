"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem


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
    ``weight_grad(dy, x, pattern, layout)`` takes both of the padded size and returns ``(a, d, b, c)``, contiguous; None
    where that of the ``bmm`` backend serves.
    """

    name: str
    multiply: Callable[[Tensor, Tensor, Layout], Tensor]
    reason_against: Callable[[Problem], str | None] = supports_everything
    weight_grad: Callable[[Tensor, Tensor, Pattern, Layout], Tensor] | None = None
