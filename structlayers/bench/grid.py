"""The patterns that the kernels are measured on: the paper's grid, a sample of it, and shapes that it leaves out."""

from structlayers.patterns import Chain, Pattern

PAPER_BATCH = 25_088
_A = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_BLOCK = (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_D = (4, 16, 64)
_LEFT_OUT = {(1024, 256), (512, 128), (256, 64), (256, 1024), (128, 512), (64, 256)}

# Small blocks, odd sizes, d = 1, 2, 8 and 32, many blocks, wide blocks, factors of butterflies.
OUTSIDE = tuple(
    Pattern(*entries)
    for entries in (
        (1, 1024, 1024, 1),
        (1, 64, 64, 128),
        (64, 64, 64, 1),
        (4, 192, 192, 1),
        (1, 192, 768, 2),
        (6, 64, 64, 2),
        (8, 128, 32, 8),
        (3, 96, 64, 8),
        (2, 64, 256, 32),
        (512, 16, 16, 2),
        (256, 32, 32, 1),
        (1, 16, 16, 256),
        (1, 8, 8, 512),
        (32, 12, 20, 8),
        (5, 37, 41, 7),
        (1, 127, 113, 3),
        (2, 1024, 768, 1),
        (1, 2, 2, 1024),
        (64, 2, 2, 64),
        (1024, 2, 2, 1),
    )
)

# b, c prime or odd, d = 2 to 7: nothing is aligned.
ODD = tuple(
    Pattern(*entries)
    for entries in (
        (1, 61, 61, 2),
        (4, 127, 61, 3),
        (1, 251, 251, 4),
        (7, 31, 113, 5),
        (3, 113, 31, 6),
        (2, 127, 127, 7),
        (1, 509, 127, 3),
        (5, 59, 251, 2),
    )
)


def paper_grid() -> list[Pattern]:
    """The 376 patterns of the full grid of arXiv:2405.15013, tensors below 2^31 elements at batch 25,088."""
    return [
        Pattern(a, b, c, d)
        for a in _A
        for b in _BLOCK
        for c in _BLOCK
        for d in _D
        if (b == c or b == 4 * c or c == 4 * b) and (b, c) not in _LEFT_OUT and PAPER_BATCH * a * max(b, c) * d < 2**31
    ]


def sample(count: int = 80) -> list[Pattern]:
    """``count`` patterns of the grid at even distances in the order of their size, the smallest and largest among them.

    Raises ``ValueError`` where the grid has not so many.
    """
    grid = sorted(paper_grid(), key=lambda p: (p.bytes(PAPER_BATCH, 2), p))
    if not 2 <= count <= len(grid):
        raise ValueError(f"count = {count}: expected 2 to {len(grid)}")
    return [grid[round(q * (len(grid) - 1) / (count - 1))] for q in range(count)]


def neighbour(pattern: Pattern) -> Pattern:
    """The pattern with ``b`` and ``c`` rounded up to multiples of 16 and ``d`` to a power of two."""
    a, b, c, d = pattern
    return Pattern(a, -(-b // 16) * 16, -(-c // 16) * 16, 1 << (d - 1).bit_length())


def parse(text: str) -> list[Pattern]:
    """Patterns written as ``(1,48,48,4)``, or as a chain, one after the other."""
    return [pattern for part in text.split() for pattern in Chain.parse(part)]
