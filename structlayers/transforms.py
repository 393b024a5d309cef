"""Fast transforms as exact chains: Hadamard and the discrete Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structlayers.errors import ChainError
from structlayers.patterns import Chain

_NORMS = ("backward", "ortho", "forward")


class Transform(NamedTuple):
    """A matrix ``F`` as a chain of a permuted input: ``(F @ x) == W @ x[permutation]``, so ``F[:, permutation] == W``.

    ``weights``: one ``(a, d, b, c)`` per factor of ``chain``, with product ``W``. ``permutation`` ``(n,)``, int64: the
    digit reversal of the transform, the identity where it needs none.
    """

    chain: Chain
    weights: list[Tensor]
    permutation: Tensor


def hadamard(
    n: int, norm: str = "backward", dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Transform:
    """The Walsh-Hadamard matrix of size ``n``, a power of two, in the natural order of Sylvester's construction:
    ``H[j, k] = (-1)^popcount(j & k)``.

    Every factor ``I (x) [[1, 1], [1, -1]] (x) I`` is exact. ``norm="ortho"`` makes the product orthogonal; its inverse
    is then itself. ``"forward"`` divides it by ``n``. Raises :class:`ChainError` if ``n`` is no power of two.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or n & (n - 1):
        raise ChainError(f"n = {n!r}: expected a power of two, 1 or more")
    radices = [2] * (n.bit_length() - 1) or [1]
    chain = Chain.butterfly(n, radices)
    block = torch.tensor([[1, 1], [1, -1]] if n > 1 else [[1]], dtype=dtype, device=device)
    weights = [
        (_scale(radix, norm, inverse=False) * block).expand(pattern.weight_shape).clone()
        for pattern, radix in zip(chain, radices, strict=True)
    ]
    return Transform(chain, weights, torch.arange(n, device=device))


def dft(
    n: int,
    radix: Sequence[int] | None = None,
    inverse: bool = False,
    norm: str = "backward",
    dtype: torch.dtype = torch.complex128,
    device: torch.device | str | None = None,
) -> Transform:
    """The discrete Fourier transform of any size ``n``, ``F[j, k] = exp(-2 pi i j k / n)``, by decimation in time.

    One factor per entry of ``radix``, leftmost first, whose product is ``n``; by default the prime factors, smallest
    first. Twiddles are part of the factors, so that factor ``q`` has pattern ``(r_1 ... r_{q-1}, r_q, r_q, the rest)``.
    ``permutation`` is the bit reversal, or the digit reversal of mixed radices. ``inverse`` and ``norm`` mean what they
    do in ``torch.fft.ifft``; the scale is spread evenly over the factors.
    Raises :class:`ChainError` if ``radix`` does not multiply to ``n``, ``ValueError`` on another ``norm`` or a real
    ``dtype``.
    Source: Cooley and Tukey, Math. Comp. 19 (1965).
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ChainError(f"n = {n!r}: expected an integer >= 1")
    if not dtype.is_complex:
        raise ValueError(f"dtype = {dtype}: expected a complex dtype")
    radices = _prime_factors(n) if radix is None else list(radix)
    chain = Chain.butterfly(n, radices)
    if chain.is_padded:
        raise ChainError(f"radix = {radix!r} multiplies to {math.prod(radices)}: expected n = {n}")
    sign = 1 if inverse else -1
    weights = []
    for pattern, r in zip(chain, radices, strict=True):
        # (F_r (x) I_d) diag(twiddles) on blocks of r*d: entry (j, k) of block l has the angle of (j*d + l) * k.
        size = r * pattern.d
        j, k = torch.arange(r, device=device)[:, None], torch.arange(r, device=device)
        l = torch.arange(pattern.d, device=device)[:, None, None]
        turns = (j * pattern.d + l) * k % size
        block = _scale(r, norm, inverse) * _unit_roots(turns, size, sign)
        weights.append(block.to(dtype).expand(pattern.weight_shape).clone())
    # Digits of the input's index, most significant first, are those of the permuted one in reverse.
    permutation = torch.arange(n, device=device).reshape(radices[::-1]).permute(*range(len(radices))[::-1]).flatten()
    return Transform(chain, weights, permutation)


def _scale(radix: int, norm: str, inverse: bool) -> float:
    """One factor's share of the normalisation."""
    if norm not in _NORMS:
        raise ValueError(f"norm = {norm!r}: expected one of {list(_NORMS)}")
    if norm == "ortho":
        return radix**-0.5
    return 1 / radix if (norm == "backward") == inverse else 1.0


def _unit_roots(turns: Tensor, size: int, sign: int) -> Tensor:
    """``exp(sign * 2 pi i * turns / size)``, with exact values at every quarter turn."""
    quarter, rest = 4 * turns // size, (4 * turns) % size
    angle = rest.to(torch.float64) * (math.pi / 2 / size)
    cos, sin = angle.cos(), angle.sin()
    # A quarter turn takes (cos, sin) to (-sin, cos).
    real = torch.stack([cos, -sin, -cos, sin])
    imaginary = torch.stack([sin, cos, -sin, -cos])
    which = quarter[None]
    return torch.complex(real.gather(0, which)[0], sign * imaginary.gather(0, which)[0])


def _prime_factors(n: int) -> list[int]:
    factors, divisor = [], 2
    while n > 1:
        if divisor * divisor > n:
            divisor = n
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return factors or [1]
