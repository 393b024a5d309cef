"""The original Monarch layer: two block-diagonal weights with a transpose behind each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from structlayers.errors import ShapeError
from structlayers.formats.matrix import FactoredMatrix, check_tensors
from structlayers.formats.refusal import Source, refuse, without_permutations
from structlayers.patterns import Chain, Pattern


class MonarchTensors(NamedTuple):
    """``blkdiag1`` ``(k, q, p)`` and ``blkdiag2`` ``(l, s, r)``."""

    blkdiag1: Tensor
    blkdiag2: Tensor


def from_monarch(
    blkdiag1: Tensor,  # (k, q, p)
    blkdiag2: Tensor,  # (l, s, r)
    in_features: int | None = None,
    out_features: int | None = None,
) -> FactoredMatrix:
    """The chain ``(1, s, r, l)(k, q, p, 1)`` of a Monarch layer; any ``k`` and ``l`` with ``k*q == l*r``.

    The layer computes ``u[i*q + j] = sum_t blkdiag1[i,j,t] x[i*p + t]`` and
    ``y[j*l + i] = sum_t blkdiag2[i,j,t] u[t*l + i]``. It pads its input to ``k*p`` and crops its output from ``s*l``:
    ``in_features`` and ``out_features`` are the sizes before and after, those of the blocks by default.
    Weights share memory with the tensors. Raises :class:`ShapeError` or :class:`ChainError` for sizes that do not fit.
    Source: Dao et al., arXiv:2204.00595; layout of the project "fly" of the same authors.
    """
    check_tensors(blkdiag1=(blkdiag1, "(k, q, p)"), blkdiag2=(blkdiag2, "(l, s, r)"))
    (k, q, p), (l, s, r) = blkdiag1.shape, blkdiag2.shape
    if k * q != l * r:
        raise ShapeError(
            f"blkdiag1 of shape {(k, q, p)} writes {k}*{q} = {k * q} features and blkdiag2 of shape {(l, s, r)} reads "
            f"{l}*{r} = {l * r}: expected k*q == l*r"
        )
    chain = Chain([Pattern(1, s, r, l), Pattern(k, q, p, 1)], in_features, out_features)
    return FactoredMatrix(chain, (blkdiag2[None], blkdiag1[:, None]))


def to_monarch(source: Source) -> MonarchTensors:
    """The two weights of a chain ``(1, s, r, l)(k, q, p, 1)``, chainable or not; its crop is ``source``'s sizes.

    Raises :class:`ChainError` for any other chain and where features are permuted.
    """
    matrix = FactoredMatrix.of(source)
    without_permutations("monarch", matrix)
    chain = matrix.chain
    if len(chain) != 2 or chain[0].a != 1 or chain[1].d != 1:
        refuse("monarch", matrix, "expected two factors (1, s, r, l)(k, q, p, 1)")
    left, right = matrix.weights
    return MonarchTensors(right[:, 0], left[0])
