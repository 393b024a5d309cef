"""The blocks that two chainable factors share, and what truncates and orthonormalises them.

The product of a :class:`Link` has one block per ``(i < left.a, p < delta, l < right.d, s < alpha)``: a ``b x rank``
piece of the left factor times a ``rank x c`` piece of the right one. These blocks are disjoint, so that whatever is
done to each of them is done to the pair. Source: arXiv:2411.04506.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from structlayers.patterns import Link, Pattern

# Blocks are handled in pieces of about this many elements, so that temporaries stay small beside the weight.
_CHUNK_ELEMENTS = 2**24

# The Gram matrix squares singular values: what is below their largest by more than the root of the roundoff drowns. A
# block goes through a full SVD where that can be seen: hardly anything is left over and the kept part is that uneven.
_SMALL_REST = 1e-8
_SMALL_KEPT = 1e-6


def left_blocks(weight: Tensor, link: Link) -> Tensor:
    """The left factor's pieces, a view: ``(a1, d1, b1, c1)`` to ``(i, p, l, s, b1, rank)``."""
    left, right = link.left, link.right
    pieces = weight.reshape(left.a, link.delta, right.d, left.b, link.alpha, -1)
    return pieces.permute(0, 1, 2, 4, 3, 5)


def right_blocks(weight: Tensor, link: Link) -> Tensor:
    """The right factor's pieces, a view: ``(a2, d2, b2, c2)`` to ``(i, p, l, s, rank, c2)``."""
    left, right = link.left, link.right
    pieces = weight.reshape(left.a, link.alpha, right.d, -1, link.delta, right.c)
    return pieces.permute(0, 4, 2, 1, 3, 5)


def product_blocks(weight: Tensor, link: Link) -> Tensor:
    """The product's blocks, a view: a factor of pattern ``link.product`` to ``(i, p, l, s, b1, c2)``."""
    left, right = link.left, link.right
    blocks = weight.reshape(left.a, right.d, left.b, link.delta, link.alpha, right.c)
    return blocks.permute(0, 3, 1, 4, 2, 5)


def left_weight(blocks: Tensor) -> Tensor:
    """The inverse of :func:`left_blocks`, for blocks of any rank."""
    i, p, l, s, b, rank = blocks.shape
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(i, p * l, b, s * rank)


def right_weight(blocks: Tensor) -> Tensor:
    """The inverse of :func:`right_blocks`, for blocks of any rank."""
    i, p, l, s, rank, c = blocks.shape
    return blocks.permute(0, 3, 2, 4, 1, 5).reshape(i * s, l, rank * p, c)


def product_weight(blocks: Tensor) -> Tensor:
    """The inverse of :func:`product_blocks`."""
    i, p, l, s, b, c = blocks.shape
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(i, l, b * p, s * c)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Double precision: Gram matrices need it, and no setting of the matmul precision touches it."""
    return torch.complex128 if dtype.is_complex else torch.float64


def truncate(
    blocks: Tensor,  # (..., b, c), double precision
    rank: int,
    centre: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:  # (..., b, k), (..., k, c), (...) with k = min(rank, b, c)
    """The nearest product of rank at most ``rank`` to every block, and the squared distances.

    ``centre``: ``"right"`` gives the left pieces orthonormal columns, ``"left"`` the right pieces orthonormal rows,
    ``"even"`` shares the singular values evenly.
    """
    *shape, b, c = blocks.shape
    kept = min(rank, b, c)
    flat = blocks.reshape(-1, b, c)
    lefts, rights = flat.new_empty(len(flat), b, kept), flat.new_empty(len(flat), kept, c)
    squares = flat.new_empty(len(flat), dtype=flat.real.dtype)
    step = max(1, _CHUNK_ELEMENTS // (b * c))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        if b <= c:
            lefts[part], rights[part], squares[part] = _truncate_wide(flat[part], kept, centre)
        else:
            mirrored = {"left": "right", "right": "left"}.get(centre, centre)
            right, left, squares[part] = _truncate_wide(flat[part].mH, kept, mirrored)
            lefts[part], rights[part] = left.mH, right.mH
    return lefts.reshape(*shape, b, kept), rights.reshape(*shape, kept, c), squares.reshape(shape)


def _truncate_wide(blocks: Tensor, rank: int, centre: str) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`truncate` of blocks ``(n, b, c)`` with ``b <= c``: the small Gram matrix costs least."""
    values, vectors = torch.linalg.eigh(blocks @ blocks.mH)
    total, largest = values.sum(-1), values[..., -1]
    rest, smallest = values[..., : values.shape[-1] - rank].sum(-1), values[..., -rank]
    lefts = vectors[..., -rank:].flip(-1)
    drowned = (rest <= _SMALL_REST * total) & (smallest <= _SMALL_KEPT * largest)
    if bool(drowned.any()):
        lefts[drowned] = torch.linalg.svd(blocks[drowned], full_matrices=False)[0][..., :rank]
    rights = lefts.mH @ blocks
    if rank < blocks.shape[-2]:
        squares = torch.linalg.vector_norm(torch.baddbmm(blocks, lefts, rights, alpha=-1), dim=(-2, -1)).square()
    else:
        squares = values.new_zeros(len(blocks))
    if centre == "left":
        rights, mix = orthonormalize_rows(rights)
        lefts = lefts @ mix
    elif centre == "even":
        root = torch.linalg.vector_norm(rights, dim=-1, keepdim=True).sqrt()
        rights = rights / root.where(root > 0, 1)
        lefts = lefts * root.mT
    return lefts, rights, squares


def orthonormalize_columns(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR: the orthonormal columns ``(..., b, k)`` of pieces ``(..., b, rank)``, and the factor behind them."""
    q, r = torch.linalg.qr(blocks)
    return q, r


def orthonormalize_rows(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Thin LQ: the orthonormal rows ``(..., k, c)`` of pieces ``(..., rank, c)``, and the factor before them."""
    q, r = torch.linalg.qr(blocks.mH)
    return q.mH, r.mH


def pad_rank(left: Tensor, right: Tensor, link: Link) -> tuple[Tensor, Tensor]:
    """Two factors with fewer ranks than ``link`` has, brought to its shapes by zero columns and rows."""
    a, d, b, columns = left.shape
    missing = link.rank - columns // link.alpha
    if not missing:
        return left, right
    left = pad(left.reshape(a, d, b, link.alpha, -1), (0, missing)).flatten(-2)
    a, d, _, c = right.shape
    right = pad(right.reshape(a, d, -1, link.delta, c), (0, 0, 0, 0, 0, missing)).flatten(2, 3)
    return left, right


def split_redundant(weight: Tensor, link: Link) -> tuple[Tensor, Tensor]:
    """Any factor of pattern ``link.product`` as a redundant pair, exactly: one of the two holds identities."""
    blocks = product_blocks(weight, link)
    b, c = blocks.shape[-2:]
    identity = torch.eye(min(b, c), dtype=weight.dtype, device=weight.device).expand(*blocks.shape[:-2], -1, -1)
    lefts, rights = (identity, blocks) if b <= c else (blocks, identity)
    return pad_rank(left_weight(lefts), right_weight(rights), link)


class PartialProduct:
    """A product of chainable factors, some still merged, on its way to a chain of ``patterns``.

    ``weights[j]`` stands for the patterns from ``starts[j]`` up to the next start, merged, though the ranks it shares
    with its neighbours may differ from the patterns'. While ``orthonormal``, all pieces left of ``weights[centre]``
    have orthonormal columns and all right of it orthonormal rows, so that a change of the centre is a change of the
    product of the same norm, and the centre's nearest pair gives the product's.
    """

    def __init__(
        self, patterns: Sequence[Pattern], weights: Sequence[Tensor], starts: Sequence[int], orthonormal: bool = True
    ) -> None:
        self.patterns, self.weights, self.starts = list(patterns), list(weights), list(starts)
        self.orthonormal = orthonormal
        self.centre = len(self.weights) - 1
        self.move_centre(0)

    def move_centre(self, position: int) -> None:
        """Make ``weights[position]`` the centre by thin QRs on the way there; the product stays."""
        if not self.orthonormal:
            return
        while self.centre != position:
            j = min(self.centre, self.centre + (1 if position > self.centre else -1))
            link = self._link(j)
            lefts, rights = left_blocks(self.weights[j], link), right_blocks(self.weights[j + 1], link)
            if position > self.centre:
                lefts, mix = orthonormalize_columns(lefts)
                rights = mix @ rights
            else:
                rights, mix = orthonormalize_rows(rights)
                lefts = lefts @ mix
            self.weights[j : j + 2] = left_weight(lefts), right_weight(rights)
            self.centre = j + 1 if position > self.centre else j

    def norm(self, n_batch: int) -> Tensor:
        """Frobenius norms ``(n_batch,)`` of the product, whose blocks come batch by batch; needs ``orthonormal``."""
        return torch.linalg.vector_norm(self.weights[self.centre].reshape(n_batch, -1), dim=1)

    def distance(self, cut: int) -> Tensor:
        """Squared distances, one per block, of the product to those with the target's rank at ``cut``."""
        blocks, _ = self._blocks(cut)
        return truncate(blocks, self._target(cut).rank)[2]

    def split(self, cut: int, following: int | None) -> Tensor:
        """Replace the product by the nearest with the target's rank at ``cut`` and one more piece, or none if the cut
        was there; squared distances, one per block. ``following`` is the next cut, to which the centre moves on."""
        blocks, rest = self._blocks(cut)
        rank = self._target(cut).rank
        if rest is not None and blocks.shape[-1] <= rank:
            return blocks.real.new_zeros(blocks.shape[:-2])
        towards = "right" if following is not None and following > cut else "left"
        keeps_centre = self.orthonormal and following is not None
        lefts, rights, squares = truncate(blocks, rank, towards if keeps_centre else "even")
        j = bisect(self.starts, cut - 1) - 1
        if rest is None:
            self.starts.insert(j + 1, cut)
        else:
            rights = rights @ rest
        self.weights[j : j + (1 if rest is None else 2)] = left_weight(lefts), right_weight(rights)
        self.centre = j + (towards == "right")
        return squares

    def padded_weights(self) -> list[Tensor]:
        """The factors in the target's shapes, when every cut is made."""
        weights = self.weights
        for j in range(len(weights) - 1):
            weights[j : j + 2] = pad_rank(weights[j], weights[j + 1], self._target(j + 1))
        return weights

    def _blocks(self, cut: int) -> tuple[Tensor, Tensor | None]:
        """What a cut truncates, with the centre there: a piece's blocks or, where two pieces meet, the left piece's
        blocks, and the right one's that they multiply."""
        j = bisect(self.starts, cut - 1) - 1
        self.move_centre(j)
        if cut in self.starts:
            link = self._link(j)
            return left_blocks(self.weights[j], link), right_blocks(self.weights[j + 1], link)
        target = self._target(cut)
        link = Pattern.of_weight(self.weights[j].shape).split(target.right.a, target.left.d, target.rank)
        return product_blocks(self.weights[j], link), None

    def _target(self, cut: int) -> Link:
        return _existing(self.patterns[cut - 1].link(self.patterns[cut]))

    def _link(self, j: int) -> Link:
        left, right = (Pattern.of_weight(weight.shape) for weight in self.weights[j : j + 2])
        return _existing(left.link(right))


def _existing(link: Link | None) -> Link:
    assert link is not None, "pieces of a chainable chain are chainable"
    return link


def subtract(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> list[Tensor]:
    """The difference of two products with the same cuts, as a product of the same cuts with the ranks of both.

    Its norm is found without cancellation, however near the two are, and without forming either.
    """
    if len(lefts) == 1:
        return [lefts[0] - rights[0]]
    last = len(lefts) - 1
    patterns = [Pattern.of_weight(weight.shape) for weight in lefts]
    links = [_existing(left.link(right)) for left, right in pairwise(patterns)]
    pieces = []
    for j, pair in enumerate(zip(lefts, rights, strict=True)):
        # (a, d, left rank, delta, alpha, right rank), where the outer ends have no rank to share.
        delta = links[j - 1].delta if j else pair[0].shape[2]
        alpha = links[j].alpha if j < last else pair[0].shape[3]
        x, y = (w.reshape(*w.shape[:2], w.shape[2] // delta, delta, alpha, w.shape[3] // alpha) for w in pair)
        y = -y if j == last else y
        if j == 0:
            piece = torch.cat([x, y], dim=5)
        elif j == last:
            piece = torch.cat([x, y], dim=2)
        else:
            piece = torch.cat([pad(x, (0, y.shape[5])), pad(y, (x.shape[5], 0))], dim=2)
        pieces.append(piece.flatten(4).flatten(2, 3))
    return pieces
