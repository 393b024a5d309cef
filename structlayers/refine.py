"""Nearer to a dense matrix by alternating least squares, for any chain, chainable or not, and good places to start.

The product ``A K B`` is linear in each factor ``K``: least squares for one factor after the other never increase the
error. Functions of tensors only, as in ``factorize``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structlayers.block_svd import truncate, working_dtype
from structlayers.errors import ChainError, ShapeError
from structlayers.factorize import factorize, project_factor, to_dense
from structlayers.init import init_factors_
from structlayers.patterns import Chain, Pattern

# Conjugate gradients end at this part of the residual they began with, or after this many steps: what is left is for
# the next sweep.
_LEAST_SQUARES_TOLERANCE = 1e-8
_MOST_STEPS = 200
# What is added to the diagonal of a preconditioner's Gram matrix, relative to its largest entry, to make it definite.
_PRECONDITIONER_RIDGE = 1e-8
# How much further than a sweep the next attempt goes after one that helped, and after one that did not.
_STRIDE_GROWTH = 1.5
_STRIDE_DECAY = 0.5
# How far an input moment that was summed in 16 bits may be from Hermitian, relative to its largest entry.
_ASYMMETRY = 1e-2


class Refinement(NamedTuple):
    """Factors ``(a, d, b, c)``, the relative error of their product as returned, and the relative errors on the way:
    first that of the start, then one per sweep, never rising."""

    weights: list[Tensor]
    error: float
    history: list[float]


@torch.no_grad()
def refine(
    weights: Sequence[Tensor],  # one (a, d, b, c) per factor, written order
    target: Tensor,  # (out_features, in_features)
    *,
    input_moment: Tensor | None = None,  # (in_features, in_features)
    max_sweeps: int = 50,
    tolerance: float = 1e-3,
    progress: bool = False,
) -> Refinement:
    """Bring the product of any chain nearer to ``target`` by alternating least squares, starting from ``weights``.

    The error is ``||W - T||_F / ||T||_F`` of the product's leading ``(out_features, in_features)`` part ``W``. With
    ``input_moment`` ``H``, Hermitian and positive semi-definite, such as ``x.mT @ x.conj()`` of inputs ``x``, it is
    that of the outputs: ``||D||^2 = trace(D H D^H)``. Stops after ``max_sweeps`` sweeps over the factors or when one
    sweep improves the error by less than the part ``tolerance`` of it. What is returned, in the dtype of ``weights``,
    is never worse than the start. ``progress`` shows a bar; needs tqdm.

    Sweeps are prolonged in their own direction where that lowers the error. Every least-squares problem is solved by
    conjugate gradients on its normal equations, preconditioned block by block. Double precision, with a few matrices of
    ``target``'s size per factor in memory.
    Raises :class:`ShapeError` if sizes or devices do not fit, ``ValueError`` for values that are not finite or a
    moment that is not Hermitian.
    """
    if target.dim() != 2:
        raise ShapeError(f"target of shape {tuple(target.shape)}: expected (out_features, in_features)")
    rows, columns = target.shape
    chain = Chain([Pattern.of_weight(weight.shape) for weight in weights])
    if rows > chain.out_features or columns > chain.in_features:
        raise ShapeError(
            f"target of shape {tuple(target.shape)}: expected at most {(chain.out_features, chain.in_features)}, "
            f"the size of {chain.spec}"
        )
    if input_moment is not None and tuple(input_moment.shape) != (columns, columns):
        raise ShapeError(f"input_moment of shape {tuple(input_moment.shape)}: expected {(columns, columns)}")
    if max_sweeps < 0 or not tolerance >= 0:
        raise ValueError(f"max_sweeps = {max_sweeps}, tolerance = {tolerance}: expected numbers of at least 0")
    inputs = [("target", target), *((f"weights[{q}]", w) for q, w in enumerate(weights))]
    inputs += [] if input_moment is None else [("input_moment", input_moment)]
    for name, tensor in inputs:
        if tensor.device != target.device:
            raise ShapeError(f"{name} is on {tensor.device}: expected {target.device}, where target is")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name} has {int((~torch.isfinite(tensor)).sum())} values that are not finite: expected none"
            )
    if input_moment is not None and not torch.allclose(
        input_moment, input_moment.mH, rtol=0, atol=_ASYMMETRY * float(input_moment.abs().max())
    ):
        raise ValueError("input_moment is not Hermitian: expected a sum of outer products")

    dtype = working_dtype(torch.promote_types(target.dtype, weights[0].dtype))
    with torch.autocast(target.device.type, enabled=False):
        problem = _Problem(chain, target.to(dtype), None if input_moment is None else input_moment.to(dtype))
        current = [weight.detach().to(dtype) for weight in weights]
        history = [problem.error(current)]
        with _bar(max_sweeps) if progress else nullcontext() as bar:
            stride = 1.0
            for sweep in range(max_sweeps):
                before, current = current, problem.sweep(current)
                error = problem.error(current)
                if not error <= history[-1]:
                    # Only rounding makes a sweep worse: there is nothing left to gain.
                    current, error = before, history[-1]
                elif sweep:
                    # Sweeps creep along narrow valleys: go on in the same direction, further each time it pays.
                    further = [x + stride * (x - y) for x, y in zip(current, before, strict=True)]
                    further_error = problem.error(further)
                    pays = further_error < error
                    stride *= _STRIDE_GROWTH if pays else _STRIDE_DECAY
                    if pays:
                        current, error = further, further_error
                history.append(error)
                if bar is not None:
                    bar.set_postfix(error=f"{history[-1]:.4g}", refresh=False)
                    bar.update()
                if not history[-1] < history[-2] * (1 - tolerance):
                    break
        rounded = [weight.to(start.dtype) for weight, start in zip(current, weights, strict=True)]
        error = problem.error([weight.to(dtype) for weight in rounded])
    if not error <= history[0]:
        rounded, error = [weight.detach().clone() for weight in weights], history[0]
    return Refinement(rounded, error, history)


@torch.no_grad()
def project(
    target: Tensor,  # (out_features, in_features)
    chain: Chain | str,
    *,
    input_moment: Tensor | None = None,  # (in_features, in_features)
    max_sweeps: int = 50,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Refinement:
    """Factors of any chain near a dense matrix: the best start known for the chain, and :func:`refine` from there.

    The start is :func:`structlayers.factorize.factorize` for a chainable chain, which is the optimum itself for two
    factors without ``input_moment``; :func:`blast_start` for BLAST; random factors from ``generator`` for others.
    Arguments and errors otherwise as in :func:`refine`.
    """
    chain = Chain.parse(chain) if isinstance(chain, str) else chain
    if tuple(target.shape) != (chain.out_features, chain.in_features):
        raise ShapeError(
            f"target of shape {tuple(target.shape)}: "
            f"expected {(chain.out_features, chain.in_features)} for {chain.spec}"
        )
    if not bool(torch.isfinite(target).all()):
        raise ValueError(f"target has {int((~torch.isfinite(target)).sum())} values that are not finite: expected none")
    if chain.is_chainable:
        start = factorize(target, chain).weights
        if len(chain) <= 2 and input_moment is None:
            max_sweeps = 0
    elif is_blast(chain):
        start = blast_start(target, chain)
    else:
        start = [torch.empty(shape, dtype=target.dtype, device=target.device) for shape in chain.weight_shapes]
        # As large a product as the target.
        gain = float(torch.linalg.vector_norm(target.to(working_dtype(target.dtype)))) / chain.out_features**0.5
        parts = [torch.view_as_real(weight) if weight.is_complex() else weight for weight in start]
        init_factors_(parts, chain, gain=gain or 1.0, generator=generator)
    return refine(
        start, target, input_moment=input_moment, max_sweeps=max_sweeps, tolerance=tolerance, progress=progress
    )


# ---- BLAST


def is_blast(chain: Chain) -> bool:
    """Whether a chain is ``(b1, p, r, 1)(1, b1, b2, r)(b2, r, q, 1)``: blocks ``U_i diag(s_ij) V_j``."""
    if len(chain) != 3:
        return False
    left, middle, right = chain
    return (left.d, middle.a, right.d) == (1, 1, 1) and (left.a, left.c) == (middle.b, middle.d) == (middle.b, right.b)


@torch.no_grad()
def blast_start(
    target: Tensor,  # (out_features, in_features)
    chain: Chain,
) -> list[Tensor]:  # (b1, 1, p, r), (1, r, b1, b2), (b2, 1, r, q)
    """Factors of a BLAST chain near a dense matrix, in closed form: an SVD of the whole plus one of every block.

    ``r = g + t max(b1, b2)``: the ``g`` leading singular vectors are shared by all blocks, and what they leave is
    approximated with rank ``t`` in every block. Block ``(i, j)`` uses the ``t`` places with number ``(i + j) mod
    max(b1, b2)``, which no other block of its row or column does. The best of the smallest, the middle and the largest
    ``t`` is taken. Raises :class:`ChainError` if the chain is no BLAST chain.
    """
    if not is_blast(chain):
        raise ChainError(f"{chain.spec}: expected a BLAST chain (b1,p,r,1)(1,b1,b2,r)(b2,r,q,1)")
    (b1, p, r, _), (_, _, b2, _), (_, _, q, _) = chain
    padding = (0, chain.padded_in_features - chain.in_features, 0, chain.padded_out_features - chain.out_features)
    dense = torch.nn.functional.pad(target.to(working_dtype(target.dtype)), padding)
    u, sigma, vh = torch.linalg.svd(dense, full_matrices=False)
    u, vh = u * sigma.sqrt(), sigma.sqrt()[:, None] * vh
    period = max(b1, b2)
    candidates = []
    for per_block in sorted({0, r // period // 2, r // period}):
        shared = min(r - per_block * period, len(sigma))
        left, middle, right = (dense.new_zeros(shape) for shape in chain.weight_shapes)
        left[:, 0, :, :shared] = u[:, :shared].reshape(b1, p, shared)
        right[:, 0, :shared] = vh[:shared].reshape(shared, b2, q).transpose(0, 1)
        middle[0, :shared] = 1
        if per_block:
            rest = dense - u[:, :shared] @ vh[:shared]
            x, y, _ = truncate(rest.reshape(b1, p, b2, q).transpose(1, 2), per_block)
            kept = x.shape[-1]
            for i in range(b1):
                for j in range(b2):
                    first = r - per_block * period + (i + j) % period * per_block
                    places = slice(first, first + kept)
                    left[i, 0, :, places], right[j, 0, places], middle[0, places, i, j] = x[i, j], y[i, j], 1
        weights = [left, middle, right]
        candidates.append((float(torch.linalg.vector_norm(to_dense(weights) - dense)), weights))
    _, best = min(candidates, key=lambda candidate: candidate[0])
    return [weight.to(target.dtype) for weight in best]


# ---- least squares


class _Problem:
    """``min ||(T - W) S||`` over the factors of ``W``, with ``H = S S^H`` the input moment, the identity if None.

    For factor ``K`` between ``A`` and ``B`` the normal equations are, on the support of ``K``,
    ``(A^H A) K (B H B^H) = A^H T H B^H``.
    """

    def __init__(self, chain: Chain, target: Tensor, moment: Tensor | None) -> None:
        rows, columns = target.shape
        self.chain, self.rows, self.columns = chain, rows, columns
        self.target = target
        self.moment = moment
        padding = (0, chain.in_features - columns, 0, chain.out_features - rows)
        self.weighted = torch.nn.functional.pad(target if moment is None else target @ moment, padding)
        self.norm = self._size(target)

    def _size(self, difference: Tensor) -> float:
        if self.moment is None:
            return float(torch.linalg.vector_norm(difference))
        return max(0.0, float((difference.conj() * (difference @ self.moment)).real.sum())) ** 0.5

    def error(self, weights: Sequence[Tensor]) -> float:
        size = self._size(to_dense(weights, self.columns, self.rows) - self.target)
        return size / self.norm if self.norm else size

    def sweep(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Every factor once, from the left, each the least-squares solution for the others."""
        weights = list(weights)
        eye = torch.eye(self.chain.in_features, dtype=self.target.dtype, device=self.target.device)
        eye[self.columns :] = 0
        moment = eye
        if self.moment is not None:
            moment = torch.zeros_like(eye)
            moment[: self.columns, : self.columns] = self.moment
        # B and B H B^H behind every factor.
        products, grams = [eye], [moment]
        for weight in reversed(weights[1:]):
            products.insert(0, _times_factor(weight, products[0]))
            grams.insert(0, _sandwich(weight, grams[0]))
        left_gram = torch.eye(self.chain.out_features, dtype=self.target.dtype, device=self.target.device)
        left_gram[self.rows :] = 0
        left_target = self.weighted
        for q, (pattern, product, gram) in enumerate(zip(self.chain, products, grams, strict=True)):
            right_side = _on_support(left_target, product.mH, pattern)
            weights[q] = _least_squares(left_gram, gram, right_side, weights[q])
            adjoint = weights[q].mH
            left_gram, left_target = _sandwich(adjoint, left_gram), _times_factor(adjoint, left_target)
        return weights


def _times_factor(weight: Tensor, matrix: Tensor) -> Tensor:
    """``K @ matrix``; ``weight.mH`` is the factor ``K^H``."""
    a, d, b, c = weight.shape
    return torch.einsum("adbc,acdn->abdn", weight, matrix.unflatten(0, (a, c, d))).reshape(a * b * d, -1)


def _sandwich(weight: Tensor, gram: Tensor) -> Tensor:
    """``K @ gram @ K^H`` for a Hermitian ``gram``."""
    return _times_factor(weight, _times_factor(weight, gram).mH)


def _on_support(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """The entries of ``left @ right`` on the support of ``pattern``, ``(a, d, b, c)``, and no others."""
    a, b, c, d = pattern
    return torch.einsum("abdm,macd->adbc", left.unflatten(0, (a, b, d)), right.unflatten(1, (a, c, d)))


def _least_squares(left: Tensor, right: Tensor, right_side: Tensor, start: Tensor) -> Tensor:
    """``left K right = right_side`` on the support of ``K``, by preconditioned conjugate gradients from ``start``."""
    pattern = Pattern.of_weight(start.shape)
    # What a block does to itself; all there is where the blocks do not meet, as in a first or last factor.
    rows, columns = (
        _inverse(project_factor(gram, Pattern(pattern.a, size, size, pattern.d)))
        for gram, size in ((left, pattern.b), (right, pattern.c))
    )

    def inner(x: Tensor, y: Tensor) -> float:
        return float((x.conj() * y).real.sum())

    solution = start
    residual = right_side - _on_support(left, _times_factor(start, right), pattern)
    conditioned = rows @ residual @ columns
    direction, size = conditioned, inner(residual, conditioned)
    enough = size * _LEAST_SQUARES_TOLERANCE**2
    for _ in range(min(_MOST_STEPS, start.numel())):
        if size <= enough:
            break
        image = _on_support(left, _times_factor(direction, right), pattern)
        curvature = inner(direction, image)
        if curvature <= 0:
            break
        solution = solution + size / curvature * direction
        residual = residual - size / curvature * image
        conditioned = rows @ residual @ columns
        before, size = size, inner(residual, conditioned)
        direction = conditioned + size / before * direction
    return solution


def _inverse(grams: Tensor) -> Tensor:
    """Inverses of positive semi-definite ``(..., n, n)``, made definite by a little on their diagonals."""
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    ridge = diagonal.real.amax(-1) * _PRECONDITIONER_RIDGE
    raised = grams.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(ridge.where(ridge > 0, 1)[..., None])
    roots, failed = torch.linalg.cholesky_ex(raised)
    # A moment that was summed in 16 bits may be indefinite: its diagonal does, more slowly.
    scales = torch.diag_embed(diagonal.real.abs().sqrt() + ridge.where(ridge > 0, 1)[..., None]).to(grams.dtype)
    return torch.cholesky_inverse(roots.where((failed == 0)[..., None, None], scales))


def _bar(steps: int) -> Any:
    """A progress bar, as a context."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True shows a bar with tqdm: pip install tqdm, or progress=False") from error
    return tqdm(total=steps, desc="refine", unit="sweep")
