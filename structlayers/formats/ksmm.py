"""Weight lists of ksmm: one ``(a, b, c, d)`` tensor per factor, the rightmost factor first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from structlayers.errors import ShapeError
from structlayers.formats.matrix import FactoredMatrix, check_tensors
from structlayers.formats.refusal import Source, without_padding, without_permutations
from structlayers.patterns import Chain, Pattern


def from_ksmm(
    weights: Sequence[Tensor],  # one (a, b, c, d) per factor, rightmost first
) -> FactoredMatrix:
    """The chain of a ksmm layer: ``y[i,j,l] = sum_k w[i,j,k,l] x[i,k,l]`` for each weight in the order of the list.

    The tensors are those that its constructor takes as ``weights`` (``algo="einsum"`` stores them so; its other
    algorithms pack them otherwise). Raises :class:`ShapeError` for other shapes, :class:`ChainError` where neighbours
    do not compose. Source: Gonon et al., arXiv:2405.15013, and its code.
    """
    if isinstance(weights, Tensor) or not weights:
        raise ShapeError("weights: expected a list of at least one tensor (a, b, c, d), the rightmost factor first")
    check_tensors(**{f"weights[{q}]": (weight, "(a, b, c, d)") for q, weight in enumerate(weights)})
    written = list(reversed(weights))
    chain = Chain([Pattern.of_entries(tuple(int(size) for size in weight.shape)) for weight in written])
    return FactoredMatrix(chain, tuple(weight.permute(0, 3, 1, 2) for weight in written))


def to_ksmm(source: Source) -> list[Tensor]:
    """One ``(a, b, c, d)`` tensor per factor of any chain, the rightmost first; their shapes are ksmm's ``patterns``.

    Raises :class:`ChainError` for a padded chain and where features are permuted.
    """
    matrix = FactoredMatrix.of(source)
    without_permutations("ksmm", matrix)
    without_padding("ksmm", matrix)
    return [weight.permute(0, 2, 3, 1).contiguous() for weight in reversed(matrix.weights)]
