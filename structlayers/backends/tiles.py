"""Which compiled tile of the CUDA kernels runs a product: a pure function of the problem."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem


@dataclass(frozen=True)
class Tile:
    """One compiled tile: ``rows`` of the batch, ``columns`` values of j and ``run`` neighbouring l a CTA.

    ``number`` is its name in ``csrc/tiles.h``; ``wgmma`` says that it needs Hopper's own matrix instructions,
    ``registers`` that the copy engine fetches x and its operands go to registers, ``cluster`` how many CTAs share x,
    ``splits_weights`` that threads fetch the weights, which then may lie anyhow, ``any_length`` that rows and blocks
    may have any length and, batch-first, ``run`` is the longest that the tile serves. ``shared_bytes`` of shared memory
    a CTA takes; 0 stands for what every GPU that has the tile's instructions has.
    """

    name: str
    number: int
    layout: Layout
    run: int
    rows: int
    columns: int
    wgmma: bool = False
    registers: bool = False
    cluster: int = 1
    splits_weights: bool = False
    any_length: bool = False
    shared_bytes: int = 0

    def takes(self, pattern: Pattern) -> bool:
        """Whether the tile serves ``pattern``: the copy engine wants whole 16-byte pieces."""
        if self.any_length:
            return self.layout is Layout.BATCH_LAST or pattern.d <= self.run
        if not self.registers:
            return True
        if self.layout is Layout.BATCH_LAST:
            return self.splits_weights or pattern.c % 8 == 0
        # The longest runs also serve longer ones: whole 16-byte pieces of 16 bits, or 32-byte sectors of 32 bits.
        longest = 8 if self.splits_weights else 16
        runs = pattern.d == self.run or (self.run == longest < pattern.d and pattern.d % 8 == 0)
        return runs and (pattern.c * pattern.d % 4 == 0 if self.splits_weights else pattern.c % 8 == 0)


_FIRST, _LAST = Layout.BATCH_FIRST, Layout.BATCH_LAST
SMALL_BLOCKS = "small_blocks"
# The largest c that the small-block kernel takes.
SMALL_BLOCK = 16
# The kernel of small batches takes any batch, but every 64 rows read all weights again.
SMALL_BATCH, SMALL_BATCH_ROWS = "small_batch", 64

# Shared memory of a CTA by compute capability, and of every other one.
_SHARED_BYTES = {(8, 0): 163 * 1024, (8, 7): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (10, 3): 227 * 1024}
_SHARED_BYTES_ELSEWHERE = 99 * 1024


def shared_bytes_of(capability: tuple[int, int]) -> int:
    """The most shared memory that a CTA may have."""
    return _SHARED_BYTES.get(capability, _SHARED_BYTES_ELSEWHERE)


TILES_16BIT = (
    Tile("run1", 1, _FIRST, 1, 256, 128, shared_bytes=184_320),
    Tile("run2", 3, _FIRST, 2, 128, 128, shared_bytes=151_552),
    Tile("run4", 4, _FIRST, 4, 64, 128, shared_bytes=200_704),
    Tile("run4_tall", 5, _FIRST, 4, 128, 64, shared_bytes=188_416),
    Tile("run8", 6, _FIRST, 8, 64, 64, shared_bytes=204_800),
    Tile("run16", 7, _FIRST, 16, 32, 64, shared_bytes=221_184),
    Tile("wgmma1", 10, _FIRST, 1, 256, 128, wgmma=True),
    Tile("wgmma2", 11, _FIRST, 2, 256, 64, wgmma=True),
    Tile("wgmma16", 14, _FIRST, 16, 32, 64, wgmma=True),
    Tile("wgmma16_wide", 15, _FIRST, 16, 32, 64, wgmma=True),
    Tile("registers2", 20, _FIRST, 2, 128, 128, wgmma=True, registers=True),
    Tile("registers4", 21, _FIRST, 4, 128, 64, wgmma=True, registers=True),
    Tile("registers4_wide", 22, _FIRST, 4, 64, 128, wgmma=True, registers=True),
    Tile("registers4_pair", 29, _FIRST, 4, 128, 64, wgmma=True, registers=True, cluster=2),
    Tile("registers8", 23, _FIRST, 8, 64, 64, wgmma=True, registers=True),
    Tile("registers8_pair", 30, _FIRST, 8, 64, 64, wgmma=True, registers=True, cluster=2),
    Tile("registers16", 24, _FIRST, 16, 64, 32, wgmma=True, registers=True),
    Tile("registers16_pair", 25, _FIRST, 16, 64, 32, wgmma=True, registers=True, cluster=2),
    Tile("unaligned", 28, _FIRST, 8, 64, 64, wgmma=True, any_length=True),
    Tile("registers_last", 27, _LAST, 1, 256, 128, wgmma=True, registers=True),
    Tile("registers_last_pair", 32, _LAST, 1, 256, 128, wgmma=True, registers=True, cluster=2),
    Tile("registers_last_narrow", 31, _LAST, 1, 512, 64, wgmma=True, registers=True),
    Tile("last_rows", 33, _LAST, 1, 240, 128, wgmma=True, any_length=True),
    Tile("last", 8, _LAST, 1, 256, 128, shared_bytes=166_912),
    Tile("last_narrow", 9, _LAST, 1, 256, 64, shared_bytes=125_440),
)
TILES_32BIT = (
    Tile("run1", 1, _FIRST, 1, 128, 128, shared_bytes=149_504),
    Tile("run2", 3, _FIRST, 2, 64, 128, shared_bytes=165_888),
    Tile("run4", 4, _FIRST, 4, 64, 64, shared_bytes=151_552),
    Tile("run8", 6, _FIRST, 8, 32, 64, shared_bytes=200_704),
    Tile("registers1", 26, _FIRST, 1, 256, 64, wgmma=True, registers=True, splits_weights=True),
    Tile("registers2", 20, _FIRST, 2, 128, 64, wgmma=True, registers=True, splits_weights=True),
    Tile("registers4", 21, _FIRST, 4, 128, 64, wgmma=True, registers=True, splits_weights=True),
    Tile("registers8", 23, _FIRST, 8, 64, 64, wgmma=True, registers=True, splits_weights=True),
    Tile("unaligned", 28, _FIRST, 8, 64, 64, wgmma=True, any_length=True),
    Tile("registers_last", 27, _LAST, 1, 256, 64, wgmma=True, registers=True, splits_weights=True),
    Tile("last", 8, _LAST, 1, 128, 128, shared_bytes=133_120),
    Tile("last_narrow", 9, _LAST, 1, 128, 64, shared_bytes=83_456),
)


def whole_pieces(pattern: Pattern) -> bool:
    """Whether rows of 16-bit weights and the runs of l are whole 16-byte pieces, or divide them."""
    return pattern.c % 8 == 0 and (pattern.d % 8 == 0 or 8 % pattern.d == 0)


# Up to which c the tile of any length was measured to be the faster one where y alone is not made of whole pieces.
UNALIGNED_OUTPUT_C = 256


def _wants_any_length(problem: Problem) -> bool:
    """Whether the tile of any length is faster than those that want whole 16-byte pieces, if they take the problem."""
    pattern = problem.pattern
    if problem.dtype == torch.float32:
        return False
    ragged_output = pattern.d in (2, 4) and pattern.b * pattern.d % 8 != 0 and pattern.c <= UNALIGNED_OUTPUT_C
    return ragged_output or not whole_pieces(pattern)


# The only architecture whose wgmma the kernels use, and the multiprocessors of its GPUs.
HOPPER, HOPPER_SMS = (9, 0), 132


def tiles_for(problem: Problem, wgmma: bool = True) -> list[Tile]:
    """The tiles that can run ``problem``: any tile of its layout, and the kernels of small blocks and small batches.

    ``wgmma=False`` leaves out what the compiled kernels do not hold. Where no tile fits shared memory, the kernel of
    small batches stands in for all of them.
    """
    room = shared_bytes_of(problem.capability)
    table = TILES_32BIT if problem.dtype == torch.float32 else TILES_16BIT
    hopper = wgmma and problem.capability == HOPPER
    tiles = [
        tile
        for tile in table
        if tile.layout is problem.layout
        and (hopper or not tile.wgmma)
        and tile.shared_bytes <= room
        and tile.takes(problem.pattern)
    ]
    if problem.pattern.c <= SMALL_BLOCK:
        tiles.append(Tile(SMALL_BLOCKS, 0, problem.layout, 1, 4, 1))
    if problem.n <= SMALL_BATCH_ROWS or not tiles:
        tiles.append(Tile(SMALL_BATCH, 40, problem.layout, 1, SMALL_BATCH_ROWS, 16))
    return tiles


@lru_cache(maxsize=4096)
def choose_tile(problem: Problem, tuned: str | None = None, wgmma: bool = True) -> Tile:
    """The tile expected to be fastest; ``tuned`` names the one that was measured to be, and decides if it is there."""
    _, b, c, d = problem.pattern
    tiles = {tile.name: tile for tile in tiles_for(problem, wgmma)}
    if tuned in tiles:
        return tiles[tuned]
    if SMALL_BLOCKS in tiles and (b < 8 or c < 8):
        return tiles[SMALL_BLOCKS]
    if SMALL_BATCH in tiles:
        return tiles[SMALL_BATCH]
    if problem.layout is Layout.BATCH_LAST:
        best = "registers_last" if problem.dtype == torch.float32 else _batch_last_tile(problem)
        if best in tiles:
            return tiles[best]
        return _named_or_other(tiles, "last_narrow" if b <= 64 else "last")
    if "unaligned" in tiles and _wants_any_length(problem):
        return tiles["unaligned"]
    registers = _registers_tile_float32(d) if problem.dtype == torch.float32 else _registers_tile(b, c, d)
    if registers in tiles:
        return tiles[registers]
    if "unaligned" in tiles and problem.dtype == torch.float32:
        return tiles["unaligned"]
    if "wgmma1" in tiles:
        if d > 8:
            return tiles["wgmma16_wide" if d >= 64 and b > 64 and c > 64 else "wgmma16"]
        return tiles["wgmma1" if d == 1 else "wgmma2"]
    if d <= 2:
        return _named_or_other(tiles, f"run{d}")
    if d <= 4:
        return _named_or_other(tiles, "run4_tall" if b <= 64 and "run4_tall" in tiles else "run4")
    return _named_or_other(tiles, "run16" if d > 8 and "run16" in tiles else "run8")


def _named_or_other(tiles: dict[str, Tile], name: str) -> Tile:
    """The tile of that name or, where it does not fit shared memory, the one of the longest runs that does."""
    return tiles[name] if name in tiles else max(tiles.values(), key=lambda tile: tile.run)


def _batch_last_tile(problem: Problem) -> str:
    """The name of the fastest 16-bit tile whose weights go to registers, or of an older one where that is faster.

    By the times of 160 aligned patterns at n = 25,088, 14 odd ones at 25,087, and 24 at 255 to 4,096 on one H100.
    """
    a, b, c, d = problem.pattern
    n, halves, wholes = problem.n, -(-b // 64), -(-b // 128)
    if n % 8 != 0 or c % 8 != 0:
        # Where there are few tiles, the smaller ones of before have less to wait for.
        rounds = a * d * wholes * -(-n // 240) / HOPPER_SMS
        if rounds > 4 or (n >= 1024 and rounds > (1 if c <= 64 else 2)):
            return "last_rows"
        return "last_narrow" if b <= 64 or a * d * halves * -(-n // 256) <= HOPPER_SMS else "last"
    if b <= 64:
        few = a * d * -(-n // 512) <= HOPPER_SMS
        return "last_narrow" if c <= 64 and (n <= 256 or few) else "registers_last_narrow"
    if b <= 128:
        return "registers_last"
    if c <= 256 and (wholes % 2 == 1 or (halves % 2 == 1 and c > 128)):
        return "registers_last_narrow"
    # CTAs that share x also keep step, so that x comes from memory once; few tiles would wait for clusters.
    many = a * d * wholes * -(-n // 256) > HOPPER_SMS
    return "registers_last_pair" if many and wholes % 2 == 0 else "registers_last"


def _registers_tile_float32(d: int) -> str:
    """The same of float32; whether it takes the pattern is another question."""
    return f"registers{d}" if d in (1, 2, 4) else "registers8"


def _registers_tile(b: int, c: int, d: int) -> str | None:
    """The name of the fastest of the tiles whose operands go to registers, None where an older one is faster.

    By the times of 47 patterns on one H100 (csrc/VERSIONS.md).
    """
    even = -(-b // 64) % 2 == 0
    # Two CTAs that share x want an even number of tiles along j; where blocks are wide, what comes from the L2 binds.
    pair = even and min(b, c) > 256
    if d == 2:
        return "registers2" if b > 64 else None
    if d == 4:
        if pair:
            return "registers4_pair"
        # Twice as many columns, unless the last tile would be half empty; with a short c, more rows pay more.
        return "registers4_wide" if b > 64 and c >= b and even else "registers4"
    if d == 8:
        return "registers8_pair" if pair else "registers8"
    if d == 16:
        return "registers16_pair" if -(-b // 32) % 2 == 0 and (b <= 64 or c > 128) else "registers16"
    return "registers16" if d > 16 and d % 16 == 0 else None
