"""From dense to chain and back: exact products of neighbours, and hierarchical block-SVD factorisation.

Source: arXiv:2411.04506. Functions of tensors only; ``nn`` and ``surgery`` build on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from structlayers import block_svd
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
    link = _link(Pattern.of_weight(left.shape), Pattern.of_weight(right.shape))
    return block_svd.product_weight(block_svd.left_blocks(left, link) @ block_svd.right_blocks(right, link))


def split_weight(
    weight: Tensor,  # of pattern link.product
    left: Pattern,
    right: Pattern,
) -> tuple[Tensor, Tensor, Tensor]:  # (a1, d1, b1, c1), (a2, d2, b2, c2), ()
    """The two-factor product nearest to ``weight`` in the Frobenius norm, and the distance.

    The product's blocks over ``(i, p, l, s)`` are disjoint, each of rank at most the link rank, so truncated SVDs of
    them are the exact optimum. The singular values are shared evenly between the two factors; ranks beyond those of a
    block are zeros. Computed in double precision, returned in the dtype of ``weight``.
    """
    link = _link(left, right)
    if tuple(weight.shape) != link.product.weight_shape:
        raise ShapeError(f"weight of shape {tuple(weight.shape)}: expected {link.product.weight_shape}")
    working = weight.to(block_svd.working_dtype(weight.dtype))
    lefts, rights, squares = block_svd.truncate(block_svd.product_blocks(working, link), link.rank)
    factors = block_svd.pad_rank(block_svd.left_weight(lefts), block_svd.right_weight(rights), link)
    distance = squares.sum().sqrt().to(weight.real.dtype)
    return factors[0].to(weight.dtype), factors[1].to(weight.dtype), distance


def project_factor(
    matrix: Tensor,  # (..., a*b*d, a*c*d)
    pattern: Pattern,
) -> Tensor:  # (..., a, d, b, c)
    """The entries of a dense matrix on the support of ``pattern``: its nearest factor, as a view where possible."""
    a, b, c, d = pattern
    entries = matrix.reshape(*matrix.shape[:-2], a, b, d, a, c, d)
    return entries.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2).movedim((-2, -1), (-4, -3))


def to_dense(
    weights: Sequence[Tensor],  # one (*batch, a, d, b, c) per factor, written order
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:  # (*batch, out_features, in_features)
    """The product of any chain as a dense matrix; differentiable. 16-bit factors are multiplied in float32.

    Raises :class:`ChainError` if the factors do not compose or a size exceeds that of the product.
    """
    chain = Chain([Pattern.of_weight(weight.shape[-4:]) for weight in weights], in_features, out_features)
    *others, last = (weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights)
    dense = last.new_zeros(*last.shape[:-4], chain[-1].out_features, chain[-1].in_features)
    project_factor(dense, chain[-1]).copy_(last)
    dense = dense[..., : chain.in_features]
    with torch.autocast(dense.device.type, enabled=False):
        for weight, p in zip(reversed(others), chain.patterns[-2::-1], strict=True):
            rows = dense.unflatten(-2, (p.a, p.c, p.d))
            dense = torch.einsum("...adbc,...acdn->...abdn", weight, rows).flatten(-4, -2)
    return dense[..., : chain.out_features, :].to(weights[0].dtype)


@dataclass(frozen=True, eq=False)
class FactorizationReport:
    """How far a factorisation is from its target, and how far it may be. Every tensor is float64, on the CPU.

    ``norm`` and ``error`` ``(*batch)``: Frobenius norms of the target and of the difference, of the factors returned.
    ``outside`` ``(*batch)``: norm of what the target has off the chain's support, which no factor can hold.
    ``cuts``: where the chain was cut, in the order of the cuts; cut ``q`` has ``q`` factors on its left. Cuts between
    redundant neighbours lose nothing and are absent.
    ``split_distances`` ``(*batch, len(cuts))``: what each cut lost, in that order.
    ``cut_distances`` ``(*batch, len(cuts))``, on request: ``E_q``, the distance of the target itself to the products of
    two factors, those left of the cut and those right of it, merged; in the same order. No chain is nearer than the
    largest of them.
    """

    norm: Tensor
    error: Tensor
    outside: Tensor
    cuts: tuple[int, ...]
    split_distances: Tensor
    cut_distances: Tensor | None
    orthonormalized: bool

    @property
    def relative_error(self) -> Tensor:
        """``error / norm``, 0 for a zero target; ``(*batch)``."""
        return self.error / self.norm.where(self.norm > 0, 1)

    @property
    def sum_bound(self) -> Tensor:
        """``sum of E_q``: with orthonormalisation the error is at most this, whatever the order; ``(*batch)``."""
        distances = self._requested_distances()
        return distances.sum(-1) if self.cuts else self.outside

    @property
    def root_square_sum_bound(self) -> Tensor:
        """``sqrt(sum of E_q^2)``: with orthonormalisation and from left to right, or right to left, the error is at
        most this; ``(*batch)``."""
        distances = self._requested_distances()
        if not self.cuts:
            return self.outside
        # Squares of the distances themselves could overflow.
        largest = distances.amax(-1)
        ratios = distances / largest.where(largest > 0, 1)[..., None]
        return largest * torch.linalg.vector_norm(ratios, dim=-1)

    @property
    def bound(self) -> Tensor | None:
        """The smaller bound that holds for this order, up to rounding; None without orthonormalisation."""
        if not self.orthonormalized:
            return None
        one_way = list(self.cuts) in (sorted(self.cuts), sorted(self.cuts, reverse=True))
        return self.root_square_sum_bound if one_way else self.sum_bound

    def _requested_distances(self) -> Tensor:
        if self.cut_distances is None:
            raise ValueError("the bounds were not asked for: expected factorize(..., bounds=True)")
        return self.cut_distances

    def __str__(self) -> str:
        if self.norm.numel() == 0:
            return "no matrices"
        worst = f"relative error {float(self.relative_error.max()):.3g}"
        if self.norm.dim():
            worst += (
                f" at most, {float(self.relative_error.median()):.3g} in the median of {self.norm.numel()} matrices"
            )
        if self.cut_distances is not None and self.bound is not None:
            worst += f", bound {float((self.bound / self.norm.where(self.norm > 0, 1)).max()):.3g}"
        return worst


class Factorization(NamedTuple):
    """The factors ``(*batch, a, d, b, c)`` of a chain in written order, and how near they are to the target."""

    weights: list[Tensor]
    report: FactorizationReport


@torch.no_grad()
def factorize(
    weight: Tensor | Sequence[Tensor],  # (*batch, out_features, in_features), or factors (*batch, a, d, b, c) of it
    chain: Chain | str,
    *,
    order: str | Sequence[int] = "left_to_right",
    orthonormalize: bool = True,
    bounds: bool = False,
) -> Factorization:
    """Factors of a chainable chain whose product is near ``weight``, by hierarchical block SVD, with a report.

    A chain of one or two factors gets the nearest product in the Frobenius norm; a target that is a product of the
    chain is recovered up to rounding. In between the error is bounded, see :class:`FactorizationReport`.

    ``weight`` may have leading batch dimensions, such as layers. It may also be a list of factors in written order,
    Kronecker-sparse ``(*batch, a, d, b, c)`` or dense ``(rows, columns)``: where they are cut as the chain is, they are
    truncated without their product ever being formed. Features beyond ``chain.out_features`` and ``chain.in_features``
    are padding: a list of factors may have them, they are ignored.

    ``order``: ``"left_to_right"``, ``"balanced"`` (halves first), or the cuts 1 to ``len(chain) - 1`` in the order to
    perform them. ``orthonormalize``: keep the other factors orthonormal while one is split, on which the bounds rest;
    costs nearly nothing. ``bounds``: also find the ``E_q`` of the report, one more block SVD of the target per cut.

    Computed in double precision on the device of ``weight``, without gradients; returned in its dtype. All factors of
    one product have the same Frobenius norm. Redundant neighbours are treated as one factor and split at the end, so
    that ranks beyond what they need are zeros.
    Raises :class:`ShapeError` if sizes or dtypes do not fit, :class:`ChainError` if the chain is not chainable,
    ``ValueError`` if ``weight`` has a value that is not finite or ``order`` is none.
    Source: arXiv:2411.04506.
    """
    chain = Chain.parse(chain) if isinstance(chain, str) else chain
    if not chain.is_chainable:
        raise ChainError(f"{chain.spec} is not chainable: no factorisation by block SVD")
    reduced, kept, redundant = _without_redundancy(chain)
    cuts = _ordered_cuts(order, chain, kept)
    factors, batch = _checked_factors(weight, chain)
    dtype, n_batch = factors[0].dtype, batch.numel()
    if n_batch == 0:
        return _no_matrices(factors[0], batch, chain, cuts, orthonormalize, bounds)

    with torch.autocast(factors[0].device.type, enabled=False):
        scaled, exponents = _scaled(factors)
        if isinstance(weight, Tensor):
            target, starts, outside = _from_dense(scaled[0], chain)
        else:
            target, starts, outside = _from_factors(scaled, chain, reduced, kept)
        # From here a batch is one chain, its matrices side by side: the first entry of every pattern is repeated.
        patterns = [_repeated(pattern, n_batch) for pattern in reduced]
        partial = block_svd.PartialProduct(patterns, target, starts)
        norm = partial.norm(n_batch)
        places = [kept.index(cut) + 1 for cut in cuts]
        cut_squares = [_by_batch(partial.distance(q), n_batch) for q in places] if bounds else None
        if not orthonormalize:
            partial = block_svd.PartialProduct(patterns, [_merged(target)], [0], orthonormal=False)
        split_squares = [
            _by_batch(partial.split(q, following), n_batch)
            for q, following in zip(places, [*places[1:], None], strict=False)
        ]
        weights = partial.padded_weights()
        for position, link in reversed(redundant):
            pair = Link(_repeated(link.left, n_batch), _repeated(link.right, n_batch))
            weights[position : position + 1] = block_svd.split_redundant(weights[position], pair)
        weights = [w.reshape(n_batch, *shape) for w, shape in zip(weights, chain.weight_shapes, strict=True)]
        scale = torch.exp2(exponents / len(chain))
        weights = [_times(scale, w).to(dtype).contiguous() for w in _equally_large(weights)]
        # Of what is returned, rounding included.
        found = [_times(1 / scale, w.to(target[0].dtype)).flatten(0, 1) for w in weights]
        ends = [*(kept[start - 1] for start in starts[1:]), len(chain)]
        parts = [_merged(found[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        difference = block_svd.PartialProduct([], block_svd.subtract(target, parts), starts).norm(n_batch)

    def unscaled(squares: list[Tensor]) -> Tensor:
        columns = [_times(torch.exp2(exponents), square.sqrt()) for square in squares]
        stacked = torch.stack(columns, dim=-1) if columns else norm.new_empty(n_batch, 0)
        return stacked.cpu().reshape(*batch, len(columns))

    off = outside.square()
    report = FactorizationReport(
        norm=unscaled([off + norm.square()])[..., 0],
        error=unscaled([off + difference.square()])[..., 0],
        outside=unscaled([off])[..., 0],
        cuts=cuts,
        split_distances=unscaled(split_squares),
        cut_distances=None if cut_squares is None else unscaled([off + square for square in cut_squares]),
        orthonormalized=orthonormalize,
    )
    return Factorization([w.reshape(*batch, *w.shape[1:]) for w in weights], report)


# ---- the chain: redundancy and order


def _without_redundancy(chain: Chain) -> tuple[Chain, list[int], list[tuple[int, Link]]]:
    """The chain with redundant neighbours merged, the cuts that are left of the given chain's, and every merge in turn:
    the position and the pair."""
    kept, merges = list(range(1, len(chain))), []
    while chain.is_redundant:
        position, link = next((q, link) for q, link in enumerate(chain.links) if link is not None and link.is_redundant)
        merges.append((position, link))
        chain = chain.merge(position, position + 2)
        del kept[position]
    return chain, kept, merges


def _ordered_cuts(order: str | Sequence[int], chain: Chain, kept: list[int]) -> tuple[int, ...]:
    """The kept cuts in the order to perform them."""
    if order == "left_to_right":
        return tuple(kept)
    if order == "balanced":

        def halves(cuts: list[int]) -> list[int]:
            middle = len(cuts) // 2
            return [cuts[middle], *halves(cuts[:middle]), *halves(cuts[middle + 1 :])] if cuts else []

        return tuple(halves(kept))
    if isinstance(order, str) or sorted(order) != list(range(1, len(chain))):
        raise ValueError(
            f"order = {order!r}: expected 'left_to_right', 'balanced' or the cuts 1 to {len(chain) - 1} of "
            f"{chain.spec} in some order"
        )
    return tuple(cut for cut in order if cut in kept)


# ---- the target


def _checked_factors(weight: Tensor | Sequence[Tensor], chain: Chain) -> tuple[list[Tensor], torch.Size]:
    """The target, one dense matrix ``(n_batch, out, in)`` or factors ``(n_batch, a, d, b, c)``; the batch's shape."""
    expected = (chain.out_features, chain.in_features)
    if isinstance(weight, Tensor):
        if weight.dim() < 2 or tuple(weight.shape[-2:]) != expected:
            raise ShapeError(
                f"weight of shape {tuple(weight.shape)}: expected {expected}, after any batch, for {chain.spec}"
            )
        factors, batch = [weight], weight.shape[:-2]
    else:
        factors = [f[None, None] if f.dim() == 2 else f for f in weight]
        if not factors:
            raise ShapeError(f"weight with 0 factors: expected at least one for {chain.spec}")
        batch = factors[0].shape[:-4]
        for q, factor in enumerate(factors):
            if factor.dim() < 4 or factor.shape[:-4] != batch:
                raise ShapeError(
                    f"weight[{q}] of shape {tuple(factor.shape)}: expected {(*batch, 'a', 'd', 'b', 'c')} or, without "
                    f"a batch, (rows, columns)"
                )
        source = Chain([Pattern.of_weight(factor.shape[-4:]) for factor in factors])
        padded = (chain.padded_out_features, chain.padded_in_features)
        for found, *allowed in zip((source.out_features, source.in_features), expected, padded, strict=True):
            if found not in allowed:
                raise ShapeError(
                    f"weight is the product {source.spec} of {source.out_features} x {source.in_features}: "
                    f"expected {expected} or, padded, {padded} for {chain.spec}"
                )
    for factor in factors:
        if not (factor.dtype.is_floating_point or factor.dtype.is_complex):
            raise ShapeError(f"weight of {factor.dtype}: expected a floating-point or complex dtype")
        if (factor.dtype, factor.device) != (factors[0].dtype, factors[0].device):
            raise ShapeError(
                f"weight has factors of {factors[0].dtype} on {factors[0].device} and of {factor.dtype} on "
                f"{factor.device}: expected one dtype and device"
            )
    return [factor.detach().reshape(batch.numel(), *factor.shape[len(batch) :]) for factor in factors], batch


def _scaled(factors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Every factor in double precision with entries near 1, so that no square overflows or vanishes, and the binary
    exponents ``(n_batch,)`` that were taken out of the product. Raises ``ValueError`` where a value is not finite."""
    scaled, exponents = [], torch.zeros(len(factors[0]), dtype=torch.float64, device=factors[0].device)
    for factor in factors:
        double = factor.to(block_svd.working_dtype(factor.dtype))
        largest = double.abs().flatten(1).amax(1)
        if not bool(torch.isfinite(largest).all()):
            count = int((~torch.isfinite(double)).sum())
            raise ValueError(f"weight has {count} values that are not finite: expected none")
        exponent = largest.where(largest > 0, 1).log2().floor().clamp(-1000, 1000)
        scaled.append(_times(torch.exp2(-exponent), double))
        exponents += exponent
    return scaled, exponents


def _from_dense(matrix: Tensor, chain: Chain) -> tuple[list[Tensor], list[int], Tensor]:
    """A dense target ``(n_batch, out, in)`` on the chain's support, as one piece ``(n_batch*a, d, b, c)``; where it
    starts in the chain; the norms of what is off the support."""
    rows, columns = chain.padded_out_features - chain.out_features, chain.padded_in_features - chain.in_features
    padded = torch.nn.functional.pad(matrix, (0, columns, 0, rows)) if chain.is_padded else matrix
    (whole,) = chain.merge()
    piece = project_factor(padded, whole)
    if whole.n_blocks == 1:
        outside = piece.real.new_zeros(len(matrix))
    else:
        rest = padded.clone()
        project_factor(rest, whole).zero_()
        outside = torch.linalg.vector_norm(rest, dim=(1, 2))
    return [piece.flatten(0, 1)], [0], outside


def _from_factors(
    factors: list[Tensor], chain: Chain, reduced: Chain, kept: list[int]
) -> tuple[list[Tensor], list[int], Tensor]:
    """A product of factors as pieces that meet where the reduced chain has cuts too; their starts in it; the norms of
    what is off the support."""
    source = Chain([Pattern.of_weight(factor.shape[1:]) for factor in factors])
    if not source.is_chainable or source.merge()[0] != chain.merge()[0]:
        return _from_dense(to_dense(factors, chain.in_features, chain.out_features), chain)
    first, last = source[0], source[-1]
    rows = torch.arange(source.out_features, device=factors[0].device) < chain.out_features
    columns = torch.arange(source.in_features, device=factors[0].device) < chain.in_features
    factors = list(factors)
    factors[0] = factors[0] * rows.view(first.a, first.b, first.d).mT[..., None]
    factors[-1] = factors[-1] * columns.view(last.a, last.c, last.d).mT[:, :, None]
    # A cut is known by what it fixes of its two neighbours. Of several cuts in the same place the narrowest says most.
    places = {(right.a, left.d): q for q, (left, right) in enumerate(pairwise(reduced), start=1)}
    common: dict[int, tuple[int, int]] = {}
    for q, link in enumerate(source.links, start=1):
        assert link is not None
        place = places.get((link.right.a, link.left.d))
        if place is not None:
            common[place] = min(common.get(place, (link.rank, q)), (link.rank, q))
    ends = [q for _, q in common.values()]
    flat = [factor.flatten(0, 1) for factor in factors]
    pieces = [_merged(flat[start:end]) for start, end in zip([0, *ends], [*ends, len(flat)], strict=True)]
    return pieces, [0, *common], pieces[0].real.new_zeros(len(factors[0]))


# ---- batches of numbers and weights


def _repeated(pattern: Pattern, n_batch: int) -> Pattern:
    return Pattern(n_batch * pattern.a, pattern.b, pattern.c, pattern.d)


def _times(scale: Tensor, values: Tensor) -> Tensor:
    """One scale ``(n_batch,)`` for every ``values[n]``."""
    return values * scale.reshape(-1, *[1] * (values.dim() - 1))


def _by_batch(squares: Tensor, n_batch: int) -> Tensor:
    return squares.reshape(n_batch, -1).sum(1)


def _merged(weights: Sequence[Tensor]) -> Tensor:
    product = weights[0]
    for weight in weights[1:]:
        product = merge_weights(product, weight)
    return product


def _equally_large(weights: list[Tensor]) -> list[Tensor]:
    """The same products from factors ``(n_batch, ...)`` of equal norm; zero products stay as they are."""
    if len(weights) == 1:
        return weights
    norms = torch.stack([torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights])
    mean = norms.log().mean(0).exp()
    return [_times((mean / norm).where(mean > 0, 1), w) for w, norm in zip(weights, norms, strict=True)]


def _no_matrices(
    like: Tensor, batch: torch.Size, chain: Chain, cuts: tuple[int, ...], orthonormalize: bool, bounds: bool
) -> Factorization:
    """The factorisation of an empty batch."""
    norms = torch.empty(batch, dtype=torch.float64)
    distances = torch.empty(*batch, len(cuts), dtype=torch.float64)
    report = FactorizationReport(norms, norms, norms, cuts, distances, distances if bounds else None, orthonormalize)
    return Factorization([like.new_empty(*batch, *shape) for shape in chain.weight_shapes], report)
