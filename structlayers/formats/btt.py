"""Block Tensor-Train layers of "Compute Better Spent"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structlayers.errors import ShapeError
from structlayers.formats.matrix import FactoredMatrix, check_permutation, check_tensors
from structlayers.formats.refusal import Source, refuse, without_padding
from structlayers.patterns import Chain, Pattern


class BTTTensors(NamedTuple):
    """Cores ``(m1, m0, n0*r)`` and ``(n0, m1*r, n1)``; permutations of the layer's own, None for the identity."""

    core1: Tensor
    core2: Tensor
    input_permutation: Tensor | None = None
    output_permutation: Tensor | None = None


def from_btt(
    core1: Tensor,  # (m1, m0, n0*r)
    core2: Tensor,  # (n0, m1*r, n1)
    input_permutation: Tensor | Sequence[int] | None = None,
    output_permutation: Tensor | Sequence[int] | None = None,
) -> FactoredMatrix:
    """The chain ``(1, n1, m1*r, n0)(m1, r*n0, m0, 1)`` of a two-core BTT layer, and the order of its outputs.

    The layer computes, for ``i0 < m0``, ``i1 < m1``, ``j0 < n0``, ``j1 < n1`` and ``t < r``,
    ``z[i1,j0,t] = sum_i0 core1[i1, i0, j0*r + t] x[i1*m0 + i0]`` and
    ``y[j0*n1 + j1] = sum_(i1,t) core2[j0, i1*r + t, j1] z[i1,j0,t]``. The chain keeps the pair ``(j0, t)`` of the
    middle index in the other order, ``t*n0 + j0``, and writes output ``(j0, j1)`` at ``j1*n0 + j0``: that is the
    result's ``output_permutation``. The arguments ``input_permutation`` and ``output_permutation`` are those that the
    layer applies besides: ``y = btt(x[input_permutation])[output_permutation]``. Cores are taken as they are
    multiplied: where the layer normalises its cores in each call, pass the normalised ones.
    Raises :class:`ShapeError` for sizes that do not fit. Source: Qiu et al., arXiv:2406.06248, and its code.
    """
    check_tensors(core1=(core1, "(m1, m0, n0*r)"), core2=(core2, "(n0, m1*r, n1)"))
    (m1, m0, middle1), (n0, middle2, n1) = core1.shape, core2.shape
    rank = middle2 // m1
    if middle1 != n0 * rank or middle2 != m1 * rank or not rank:
        raise ShapeError(
            f"core1 of shape {(m1, m0, middle1)} and core2 of shape {(n0, middle2, n1)}: expected (m1, m0, n0*r) and "
            f"(n0, m1*r, n1), but {middle1} / {n0} and {middle2} / {m1} are not one integer rank r"
        )
    chain = Chain([Pattern(1, n1, m1 * rank, n0), Pattern(m1, rank * n0, m0, 1)])
    right = core1.reshape(m1, m0, n0, rank).permute(0, 3, 2, 1).reshape(chain[1].weight_shape)
    left = core2.transpose(1, 2)[None]
    order = _output_order(n0, n1)
    inputs = check_permutation("input_permutation", input_permutation, chain.in_features)
    outputs = check_permutation("output_permutation", output_permutation, chain.out_features)
    return FactoredMatrix(chain, (left, right), inputs, order if outputs is None else order[outputs.cpu()])


def to_btt(source: Source) -> BTTTensors:
    """The cores of a chain ``(1, n1, m1*r, n0)(m1, r*n0, m0, 1)`` and the permutations that the layer has to apply.

    BTT writes its outputs in an order of its own. A matrix from :func:`from_btt` goes back without permutations; a
    plain chain with ``n0`` and ``n1`` above 1 needs the ``output_permutation`` that is returned with its cores.
    Raises :class:`ChainError` for any other chain, a padded one, and one that drops outputs.
    """
    matrix = FactoredMatrix.of(source)
    without_padding("btt", matrix)
    chain = matrix.chain
    if len(chain) != 2 or chain[0].a != 1 or chain[1].d != 1:
        refuse("btt", matrix, "expected two factors (1, n1, m1*r, n0)(m1, r*n0, m0, 1)")
    (_, n1, middle2, n0), (m1, middle1, m0, _) = chain
    if middle2 % m1:
        refuse("btt", matrix, f"expected the left factor's c = {middle2} to be a multiple of m1 = {m1}")
    if matrix.out_features != chain.out_features:
        refuse("btt", matrix, f"expected all {chain.out_features} outputs, found {matrix.out_features}")
    rank = middle2 // m1
    left, right = matrix.weights
    core1 = right.reshape(m1, rank, n0, m0).permute(0, 3, 2, 1).reshape(m1, m0, middle1).contiguous()
    core2 = left[0].transpose(1, 2).contiguous()
    # y[i] = z[total[i]], and BTT's output j is z[order[j]]: i reads the j with order[j] == total[i].
    order, total = _output_order(n0, n1), matrix.output_permutation
    inverse = order.argsort()
    own = inverse if total is None else inverse[total.cpu()]
    outputs = check_permutation("output_permutation", own, chain.out_features)
    return BTTTensors(core1, core2, matrix.input_permutation, outputs)


def _output_order(n0: int, n1: int) -> Tensor:
    """The row of the chain, ``j1*n0 + j0``, that BTT's output ``j0*n1 + j1`` reads."""
    return torch.arange(n0 * n1).view(n1, n0).T.reshape(-1)
