"""BLAST layers: blocks that share their left and right factors and differ by a diagonal."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from structlayers.errors import ShapeError
from structlayers.formats.matrix import FactoredMatrix, check_tensors
from structlayers.formats.refusal import Source, refuse, without_padding, without_permutations
from structlayers.patterns import Chain, Pattern


class BLASTTensors(NamedTuple):
    """``B`` ``(b1, p, r)``, ``D`` ``(b1, b2, r)`` and ``C`` ``(b2, r, q)``."""

    B: Tensor
    D: Tensor
    C: Tensor


def from_blast(
    B: Tensor,  # (b1, p, r)
    D: Tensor,  # (b1, b2, r)
    C: Tensor,  # (b2, r, q)
) -> FactoredMatrix:
    """The chain ``(b1, p, r, 1)(1, b1, b2, r)(b2, r, q, 1)`` of a BLAST layer; composable, not chainable.

    Block ``(i, j)`` of the matrix, ``p x q``, is ``B[i] diag(D[i, j]) C[j]``: ``C`` holds the paper's ``V`` transposed,
    as its code does; for ``(b2, q, r)`` pass ``C.transpose(1, 2)``. The order is that of the product.
    Raises :class:`ShapeError` for sizes that do not fit. Source: Lee et al., arXiv:2410.21262, and its code.
    """
    check_tensors(B=(B, "(b1, p, r)"), D=(D, "(b1, b2, r)"), C=(C, "(b2, r, q)"))
    (b1, p, r), (b2, _, q) = B.shape, C.shape
    if tuple(D.shape) != (b1, b2, r) or C.shape[1] != r:
        hint = ""
        if tuple(D.shape) == (b1, b2, r) and q == r:
            hint = "; C seems to be (b2, q, r): transpose its last two axes"
        raise ShapeError(
            f"B, D, C of shapes {tuple(B.shape)}, {tuple(D.shape)}, {tuple(C.shape)}: "
            f"expected (b1, p, r), (b1, b2, r), (b2, r, q){hint}"
        )
    chain = Chain([Pattern(b1, p, r, 1), Pattern(1, b1, b2, r), Pattern(b2, r, q, 1)])
    return FactoredMatrix(chain, (B[:, None], D.permute(2, 0, 1)[None], C[:, None]))


def to_blast(source: Source) -> BLASTTensors:
    """The three tensors of a chain ``(b1, p, r, 1)(1, b1, b2, r)(b2, r, q, 1)``.

    Raises :class:`ChainError` for any other chain, a padded one, and where features are permuted.
    """
    matrix = FactoredMatrix.of(source)
    without_permutations("blast", matrix)
    without_padding("blast", matrix)
    chain = matrix.chain
    fits = len(chain) == 3
    if fits:
        (b1, p, r, _), (_, _, b2, _), (_, _, q, _) = chain
        fits = chain.patterns == (Pattern(b1, p, r, 1), Pattern(1, b1, b2, r), Pattern(b2, r, q, 1))
    if not fits:
        refuse("blast", matrix, "expected three factors (b1, p, r, 1)(1, b1, b2, r)(b2, r, q, 1)")
    left, middle, right = matrix.weights
    return BLASTTensors(left[:, 0], middle[0].permute(1, 2, 0).contiguous(), right[:, 0])
