"""Factors of a chain that keep what a layer computes on its own inputs, rather than its weight.

For inputs ``x`` with second moments ``S = E x x^T`` the output error of a product ``W_hat`` is

    E ||(W - W_hat) x||^2 = trace((W - W_hat) S (W - W_hat)^T).

Activations of trained networks live in few directions, so this is several times smaller than what the nearest ``W_hat``
in the Frobenius norm leaves. Rows of ``W - W_hat`` do not meet in it; columns do, through ``S``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from structlayers.block_svd import left_weight, pad_rank, right_weight, truncate
from structlayers.errors import ConfigError, DataError, ShapeError
from structlayers.factorize import project_factor
from structlayers.patterns import Chain, Link, Pattern
from structlayers.refine import Refinement, project, refine


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Mean ``(n,)`` and second moments ``E x x^T`` ``(n, n)`` of ``rows`` inputs of a layer, both float64."""

    rows: int
    mean: Tensor
    second: Tensor

    def moment(self, ridge: float = 0.0, centred: bool = False) -> Tensor:
        """``S`` ``(n, n)``: second moments, or the covariance, plus ``ridge`` times its mean diagonal on the diagonal.

        Raises :class:`DataError` if there are no rows or values that are not finite, and warns of fewer rows than
        features: what a ridge must then make up for.
        """
        features = len(self.mean)
        if self.rows < 1:
            raise DataError(f"0 rows of {features} features: the layer was never called during calibration")
        if not (bool(torch.isfinite(self.mean).all()) and bool(torch.isfinite(self.second).all())):
            raise DataError(f"moments of {self.rows} rows of {features} features are not finite")
        if not (ridge >= 0 and math.isfinite(ridge)):
            raise ConfigError(f"ridge = {ridge!r}: expected a number of at least 0, times the mean diagonal")
        if self.rows < features:
            what = f"calibration data too small: {self.rows} rows for {features} input features"
            if ridge == 0:
                raise DataError(f"{what} and ridge = 0: expected at least {features} rows, or a ridge above 0")
            warnings.warn(f"{what}: expected at least {features}; the ridge decides the rest", stacklevel=2)
        moment = self.second - torch.outer(self.mean, self.mean) if centred else self.second.clone()
        # Inputs that are all zero leave nothing to weigh: then every direction counts the same.
        scale = float(self.second.diagonal().mean()) or 1.0
        moment.diagonal().add_(max(ridge, torch.finfo(torch.float32).eps) * scale)
        return moment


@torch.no_grad()
def project_data(
    weight: Tensor,  # (out_features, in_features)
    chain: Chain | str,
    moments: InputMoments,
    *,
    ridge: float = 1e-2,
    centred: bool = False,
    max_sweeps: int = 20,
    tolerance: float = 2e-3,
) -> Refinement:
    """Factors ``(a, d, b, c)`` of any chain whose outputs on the calibration inputs are near those of ``weight``.

    The result's ``error`` is ``sqrt(E ||(W - W_hat) x||^2 / E ||W x||^2)`` under the moments with their ridge, its
    ``history`` that of the start and after every sweep: it never rises, and stops when a sweep improves it by less than
    the part ``tolerance``. One factor and low rank are exact optima. Two chainable factors are swept block by block,
    each block of the product the optimum for the others (a weighted SVD); longer chains are split so from left to right
    and then refined, those that are not chainable only refined, by :func:`structlayers.refine.refine`.

    ``ridge`` is relative to the mean of the moments' diagonal. ``centred`` takes the covariance in place of the second
    moments: right where a bias takes up ``(W - W_hat) E x`` (:func:`project_linear`).
    Computed in float64 on the device of ``weight``, returned in its dtype. Raises :class:`ShapeError` if sizes differ,
    ``ValueError`` for weights that are not finite or not real, otherwise as :meth:`InputMoments.moment`.
    """
    chain = Chain.parse(chain) if isinstance(chain, str) else chain
    expected = (chain.out_features, chain.in_features)
    if tuple(weight.shape) != expected:
        raise ShapeError(f"weight of shape {tuple(weight.shape)}: expected {expected} for {chain.spec}")
    if tuple(moments.second.shape) != (chain.in_features,) * 2:
        raise ShapeError(f"moments of {len(moments.mean)} features: expected {chain.in_features} for {chain.spec}")
    if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weight of {weight.dtype} with values that are not finite or not real: expected real numbers")
    if max_sweeps < 0 or not tolerance >= 0:
        raise ValueError(f"max_sweeps = {max_sweeps}, tolerance = {tolerance}: expected numbers of at least 0")
    moment = moments.moment(ridge, centred).to(weight.device)
    target = weight.detach().double()
    if not chain.is_chainable:
        found = project(target, chain, input_moment=moment, max_sweeps=max_sweeps, tolerance=tolerance)
    else:
        found = _chainable(target, chain, moment, max_sweeps, tolerance)
    return found._replace(weights=[w.to(weight.dtype).contiguous() for w in found.weights])


def project_linear(
    linear: nn.Linear, chain: Chain, moments: InputMoments, *, ridge: float = 1e-2, correct_bias: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    """Factors ``(a, d, b, c)`` and the bias ``(out_features,)`` of a layer near ``linear`` on its calibration inputs.

    ``correct_bias`` adds what the factors lack on the mean input to the bias, if there is one, and fits the factors to
    what remains: together the optimum over both. Raises as :func:`project_data`.
    """
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    centred = correct_bias and bias is not None
    weights = project_data(weight, chain, moments, ridge=ridge, centred=centred).weights
    if not centred or bias is None:
        return weights, bias
    mean = moments.mean.to(weight.device)
    lacking = weight.double() @ mean - _times_chain(weights, chain, mean)
    return weights, (bias.double() + lacking).to(bias.dtype)


def _times_chain(weights: list[Tensor], chain: Chain, vector: Tensor) -> Tensor:
    """The product of the factors times a vector, in its dtype."""
    vector = pad(vector, (0, chain.padded_in_features - chain.in_features))
    for weight, (a, b, c, d) in zip(reversed(weights), reversed(chain.patterns), strict=True):
        vector = torch.einsum("adbc,acd->abd", weight.to(vector.dtype), vector.reshape(a, c, d)).reshape(a * b * d)
    return vector[: chain.out_features]


def _chainable(target: Tensor, chain: Chain, moment: Tensor, max_sweeps: int, tolerance: float) -> Refinement:
    columns, rows = chain.padded_in_features - chain.in_features, chain.padded_out_features - chain.out_features
    # Padded columns of the product multiply nothing and come out as zeros, whatever their weight.
    padded_moment = pad(moment, (0, columns, 0, columns))
    padded_moment.diagonal()[chain.in_features :] = moment.diagonal().mean()
    rest = pad(target, (0, columns, 0, rows))
    norm = _size(rest, padded_moment)
    weights: list[Tensor] = []
    history: list[float] = []
    for q, pattern in enumerate(chain.patterns[:-1]):
        link = pattern.link(chain[q + 1 :].merge()[0])
        assert link is not None, "a chainable chain has a link at every cut"
        pair = _BlockSweeps(rest, link, padded_moment)
        errors = list(pair.run(max_sweeps, tolerance))
        left, right = pair.factors()
        weights.append(left)
        rest = _dense(right)
        history = history or errors
    if not weights:
        weights = [_nearest_factor(rest, chain[0], padded_moment)]
        history = [_size(rest - _dense(weights[0]), padded_moment)]
    else:
        weights.append(project_factor(rest, chain[-1]))
    if len(chain) > 2:
        return refine(weights, target, input_moment=moment, max_sweeps=max_sweeps, tolerance=tolerance)
    history = [error / norm if norm else error for error in history]
    return Refinement(weights, history[-1], history)


def _nearest_factor(target: Tensor, pattern: Pattern, moment: Tensor) -> Tensor:
    """The factor ``(a, d, b, c)`` with the nearest outputs: least squares for its rows, which do not meet."""
    a, _, c, d = pattern
    grams = project_factor(moment, Pattern(a, c, c, d))
    sides = project_factor(target @ moment, pattern)
    return torch.cholesky_solve(sides.mT, torch.linalg.cholesky(grams)).mT


class _BlockSweeps:
    """``min trace(E S E^T)``, ``E = T - M``, over the products ``M`` of a chainable pair, block by block.

    ``M`` has a block of rank at most ``link.rank`` for every ``(i < a1, p < delta, l < d2, s < alpha)``. Blocks of
    other ``(i, p, l)`` are in other rows, so they do not meet. In its rows, block ``B`` in the columns ``C(i, s, l)``
    has, with the Cholesky factor ``S_CC = L L^T`` and ``E'`` the error without it, the objective

        constant + ||Y - B L||^2,    Y = E' S_C L^-T,

    least for the truncated SVD of ``Y``, times ``L^-1``. A sweep does so for one ``s`` after the other, all
    ``(i, p, l)`` at once. The start is the same without the columns of other blocks: the truncated SVD of ``T_C L``.
    """

    def __init__(self, target: Tensor, link: Link, moment: Tensor) -> None:
        left, right = link.left, link.right
        self.link, self.moment = link, moment
        columns = (left.a, link.alpha, right.c, right.d)
        # By rows (i, l, (j, p)) as in product_blocks, and columns (i, s, k, l).
        grouped = target.reshape(left.a, left.b * link.delta, right.d, *columns)
        self.error = grouped.transpose(1, 2).clone()  # (i, l, (j, p), i, s, k, l)
        # S_C and the Cholesky factor of S_CC of every s: (s, i, l, n, k) a view, (s, i, l, k, k).
        self.cross = moment.reshape(-1, *columns).permute(2, 1, 4, 0, 3)
        grams = project_factor(moment, Pattern(right.a, right.c, right.c, right.d))
        self.roots = torch.linalg.cholesky(grams).reshape(left.a, link.alpha, right.d, right.c, right.c).transpose(0, 1)
        self.pairs = [self._truncated(self._own(s) @ self.roots[s], s) for s in range(link.alpha)]
        self.blocks = [self._product(*pair) for pair in self.pairs]
        for s, block in enumerate(self.blocks):
            self._own(s).sub_(block)

    def run(self, max_sweeps: int, tolerance: float) -> Iterator[float]:
        """Sweep until a sweep improves the error by less than the part ``tolerance``; yields the error each time."""
        before = self._size()
        yield before
        if self.link.left.a * self.link.right.d * self.link.alpha == 1:
            # One block has no others to be adapted to.
            return
        for _ in range(max_sweeps):
            for s in range(self.link.alpha):
                self._improve(s)
            error = self._size()
            yield min(error, before)
            if not error < before * (1 - tolerance):
                return
            before = error

    def factors(self) -> tuple[Tensor, Tensor]:
        """The pair ``(a1, d1, b1, c1)``, ``(a2, d2, b2, c2)``; the left pieces have orthonormal columns."""
        lefts, rights = (torch.stack(parts, dim=3) for parts in zip(*self.pairs, strict=True))
        return pad_rank(left_weight(lefts), right_weight(rights), self.link)

    def _improve(self, s: int) -> None:
        root, old = self.roots[s], self.blocks[s]
        flat = self.error.flatten(3)  # (i, l, J, n)
        sides = flat @ self.cross[s] + old @ root @ root.mT
        whitened = torch.linalg.solve_triangular(root, sides.mT, upper=False).mT
        self.pairs[s] = self._truncated(whitened, s)
        self.blocks[s] = self._product(*self.pairs[s])
        self._own(s).add_(old - self.blocks[s])

    def _truncated(self, whitened: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """Pieces ``(i, p, l, b1, rank)``, ``(i, p, l, rank, c2)`` of the best block, from ``(i, l, J, k)``."""
        pieces = whitened.unflatten(2, (self.link.left.b, self.link.delta)).permute(0, 3, 1, 2, 4)
        lefts, rights, _ = truncate(pieces, self.link.rank, "right")
        root = self.roots[s][:, None].expand(*rights.shape[:3], -1, -1)
        return lefts, torch.linalg.solve_triangular(root, rights, upper=False, left=False)

    def _product(self, lefts: Tensor, rights: Tensor) -> Tensor:
        """The block ``(i, l, J, k)`` of its pieces."""
        return (lefts @ rights).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _own(self, s: int) -> Tensor:
        """The error in the columns ``C(i, s, l)`` of its own rows, a view ``(i, l, J, k)``."""
        # (i, l, J, i, k, l) without s; the diagonals append i, then l.
        return self.error[:, :, :, :, s].diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=3).permute(2, 3, 0, 1)

    def _size(self) -> float:
        return _size(self.error.flatten(3), self.moment)


def _dense(weight: Tensor) -> Tensor:
    """One factor ``(a, d, b, c)`` as a matrix."""
    pattern = Pattern.of_weight(weight.shape)
    matrix = weight.new_zeros(pattern.out_features, pattern.in_features)
    project_factor(matrix, pattern).copy_(weight)
    return matrix


def _size(difference: Tensor, moment: Tensor) -> float:
    """``sqrt(trace(D S D^T))`` of ``(..., rows, n)``."""
    return max(0.0, float((difference @ moment * difference).sum())) ** 0.5
