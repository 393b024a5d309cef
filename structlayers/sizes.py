"""The sizes that the named structures of :class:`structlayers.patterns.Chain` are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from structlayers.errors import ChainError


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not is_integer(value) or value < 1:
            raise ChainError(f"{name} = {value!r}: expected an integer >= 1")


def most_blocks(in_features: int, out_features: int) -> int:
    """The largest block count that leaves no part of a Monarch matrix zero."""
    small = min(in_features, out_features)
    return max(k for k in range(1, math.isqrt(small) + 2) if -(-small // k) >= k)


def near_square(n: int) -> tuple[int, int]:
    """Two factors of ``n``, larger first, or of the next size that has a pair within a ratio of two."""
    while True:
        small = next(f for f in range(math.isqrt(n), 0, -1) if n % f == 0)
        if n // small <= 2 * small or n <= 2:
            return n // small, small
        n += 1


def radix_pairs(radix: Sequence[int] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """One ``(b, c)`` per factor."""
    pairs = []
    for entry in radix if isinstance(radix, Iterable) else ():
        pair = entry if isinstance(entry, Sequence) else (entry, entry)
        if len(pair) != 2 or not all(is_integer(r) and r >= 1 for r in pair):
            raise ChainError(f"radix = {radix!r}: expected one integer or one pair (b, c) per factor, not {entry!r}")
        pairs.append((pair[0], pair[1]))
    if not pairs:
        raise ChainError(f"radix = {radix!r}: expected an integer >= 2, or one integer or pair (b, c) per factor")
    return pairs


def power_pairs(in_features: int, out_features: int, radix: int) -> list[tuple[int, int]]:
    if isinstance(radix, bool) or radix < 2:
        raise ChainError(f"radix = {radix!r}: expected an integer >= 2 or a sequence")

    def exponent(size: int) -> int:
        power = 1
        while radix**power < size:
            power += 1
        return power

    columns, rows = exponent(in_features), exponent(out_features)
    length = min(columns, rows)
    # The surplus powers go to the leftmost factors in turn, so that no factor grows more than it must.
    share = [max(columns, rows) // length + (l < max(columns, rows) % length) for l in range(length)]
    if rows >= columns:
        return [(radix**e, radix) for e in share]
    return [(radix, radix**e) for e in share]
