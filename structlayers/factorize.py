"""From dense to chain and back: exact products of neighbours, and block-SVD factorisation.

Source: hierarchical factorisation of arXiv:2411.04506. Functions of tensors only; ``nn`` and ``surgery`` build on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structlayers.errors import ChainError, ShapeError
from structlayers.patterns import Chain, Link, Pattern


def _link(left: Pattern, right: Pattern) -> Link:
    link = left.link(right)
    if link is None:
        raise ChainError(f"{tuple(left)} and {tuple(right)} are not chainable")
    return link


def merge_weights(
    left: Tensor,  # (a1, d1, b1, c1)
    right: Tensor,  # (a2, d2, b2, c2)
) -> Tensor:  # (a1, d2, b1*d1/d2, a2*c2/a1)
    """The exact product of two chainable factors, as one factor of pattern :attr:`Link.product`; differentiable.

    Raises :class:`ChainError` if the pair is not chainable.
    """
    p, q = Pattern.of_weight(left.shape), Pattern.of_weight(right.shape)
    link = _link(p, q)
    # Row j1 of the left factor's block (i, p*d2 + l) meets column k2 of the right factor's block (i*alpha + s, l):
    # their common middle indices are t < rank.
    lefts = left.reshape(p.a, link.delta, q.d, p.b, link.alpha, link.rank)
    rights = right.reshape(p.a, link.alpha, q.d, link.rank, link.delta, q.c)
    return torch.einsum("ipljst,isltpk->iljpsk", lefts, rights).reshape(link.product.weight_shape)


def split_weight(
    weight: Tensor,  # of pattern link.product
    left: Pattern,
    right: Pattern,
) -> tuple[Tensor, Tensor, Tensor]:  # (a1, d1, b1, c1), (a2, d2, b2, c2), ()
    """The two-factor product nearest to ``weight`` in the Frobenius norm, and the distance.

    The product's blocks over ``(i, p, l, s)`` are disjoint, each of rank at most the link rank, so truncated SVDs of
    them are the exact optimum. The singular values are shared evenly between the two factors.
    """
    link = _link(left, right)
    if tuple(weight.shape) != link.product.weight_shape:
        raise ShapeError(f"weight of shape {tuple(weight.shape)}: expected {link.product.weight_shape}")
    rank, alpha, delta = link.rank, link.alpha, link.delta
    blocks = weight.reshape(left.a, right.d, left.b, delta, alpha, right.c).permute(0, 3, 1, 4, 2, 5)  # i p l s (j k)
    u, sigma, vh = torch.linalg.svd(blocks, full_matrices=False)
    kept = min(rank, sigma.shape[-1])
    root = sigma[..., :kept].sqrt()
    # Ranks beyond those of a block are zero columns and rows.
    lefts = weight.new_zeros(*blocks.shape[:4], left.b, rank)
    rights = weight.new_zeros(*blocks.shape[:4], rank, right.c)
    lefts[..., :kept] = u[..., :kept] * root[..., None, :]
    rights[..., :kept, :] = root[..., None] * vh[..., :kept, :]
    return (
        lefts.permute(0, 1, 2, 4, 3, 5).reshape(left.weight_shape),
        rights.permute(0, 3, 2, 4, 1, 5).reshape(right.weight_shape),
        sigma[..., kept:].square().sum().sqrt(),
    )


def project_factor(
    matrix: Tensor,  # (a*b*d, a*c*d)
    pattern: Pattern,
) -> Tensor:  # (a, d, b, c)
    """The entries of a dense matrix on the support of ``pattern``: its nearest factor."""
    a, b, c, d = pattern
    return matrix.reshape(a, b, d, a, c, d).diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).permute(2, 3, 0, 1)


def factorize(
    weight: Tensor,  # (out_features, in_features)
    chain: Chain,
) -> list[Tensor]:
    """Factors of a chainable chain whose product is near ``weight``, by block SVD from left to right.

    With one or two factors the result is the nearest in the Frobenius norm. Computed in float32, or float64 for a
    float64 weight; returned in the dtype of ``weight``.
    Raises :class:`ShapeError` if the sizes differ, :class:`ChainError` if the chain is not chainable, ``ValueError`` if
    ``weight`` has a value that is not finite.
    """
    expected = (chain.out_features, chain.in_features)
    if tuple(weight.shape) != expected:
        raise ShapeError(f"weight of shape {tuple(weight.shape)}: expected {expected} for {chain.spec}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weight has {int((~torch.isfinite(weight)).sum())} values that are not finite: expected none")
    if not chain.is_chainable:
        raise ChainError(f"{chain.spec} is not chainable: no factorisation by block SVD")
    working = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    padded = working.new_zeros(chain.padded_out_features, chain.padded_in_features)
    padded[: chain.out_features, : chain.in_features] = working
    rest = project_factor(padded, chain.merge()[0])
    factors = []
    for q in range(len(chain) - 1):
        factor, rest, _ = split_weight(rest, chain[q], chain[q + 1 :].merge()[0])
        factors.append(factor)
    factors.append(rest)
    return [factor.to(weight.dtype).contiguous() for factor in factors]


def to_dense(
    weights: Sequence[Tensor],  # one (a, d, b, c) per factor, written order
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:  # (out_features, in_features)
    """The product of any chain as a dense matrix; differentiable. 16-bit factors are multiplied in float32."""
    from structlayers.ops import ks_chain

    working = torch.promote_types(weights[0].dtype, torch.float32)
    columns = Pattern.of_weight(weights[-1].shape).in_features if in_features is None else in_features
    identity = torch.eye(columns, dtype=working, device=weights[0].device)
    with torch.autocast(identity.device.type, enabled=False):
        dense = ks_chain(identity, [w.to(working) for w in weights], in_features=columns, out_features=out_features)
    return dense.T.to(weights[0].dtype)
