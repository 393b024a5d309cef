"""Which compiled tile computes a weight gradient, and into how many parts the batch is split: a pure function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from structlayers.backends.tiles import shared_bytes_of
from structlayers.problem import Layout, Problem


@dataclass(frozen=True)
class GradTile:
    """One compiled tile: ``groups`` neighbouring i, ``run`` neighbouring l, ``rows`` of j and ``columns`` of k a CTA.

    It takes ``step`` rows of the batch at a time, ``stages`` of them ahead. ``number`` is its name in
    ``csrc/weight_grad.h``. Neighbours along k run in clusters of ``cluster``.
    """

    name: str
    number: int
    layout: Layout
    groups: int
    run: int
    rows: int
    columns: int
    step: int
    stages: int
    cluster: int = 1

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipeline, which is the largest part of what a CTA needs."""
        return self.stages * self.step * (self.rows + self.columns) * self.groups * self.run * itemsize


@dataclass(frozen=True)
class GradChoice:
    """A tile, and into how many parts the batch is split, each summed by CTAs of its own."""

    tile: GradTile
    splits: int


_FIRST, _LAST = Layout.BATCH_FIRST, Layout.BATCH_LAST
# The largest b and c that the small-block kernel takes; no tensor cores, one block a thread.
SMALL_BLOCK = 4

GRAD_TILES_16BIT = (
    GradTile("run1_16", 1, _FIRST, 4, 1, 16, 16, 128, 5),
    GradTile("run1_32", 2, _FIRST, 2, 1, 32, 32, 128, 5),
    GradTile("run1_64", 3, _FIRST, 1, 1, 64, 64, 128, 5),
    GradTile("run1_128", 4, _FIRST, 1, 1, 128, 128, 64, 5),
    GradTile("run1_192", 5, _FIRST, 1, 1, 192, 192, 48, 5),
    GradTile("run1_wide", 6, _FIRST, 1, 1, 128, 256, 64, 4),
    GradTile("run1_tall", 7, _FIRST, 1, 1, 256, 128, 64, 4),
    GradTile("run1_short", 8, _FIRST, 1, 1, 64, 256, 64, 5),
    GradTile("run1_narrow", 9, _FIRST, 1, 1, 256, 64, 64, 5),
    GradTile("run2", 10, _FIRST, 1, 2, 128, 128, 32, 5),
    GradTile("run2_64", 11, _FIRST, 1, 2, 64, 64, 64, 5),
    GradTile("run4", 12, _FIRST, 1, 4, 128, 64, 32, 4),
    GradTile("run4_64", 13, _FIRST, 1, 4, 64, 64, 32, 5),
    GradTile("run4_32", 14, _FIRST, 1, 4, 32, 32, 128, 3),
    GradTile("run8", 15, _FIRST, 1, 8, 64, 64, 16, 5),
    GradTile("run8_32", 16, _FIRST, 1, 8, 32, 32, 64, 3),
    GradTile("run16", 17, _FIRST, 1, 16, 64, 32, 16, 4),
    GradTile("run16_32", 18, _FIRST, 1, 16, 32, 32, 32, 3),
    GradTile("last_128", 19, _LAST, 1, 1, 128, 128, 64, 5),
    GradTile("last_64", 20, _LAST, 1, 1, 64, 64, 128, 5),
    GradTile("last_32", 21, _LAST, 1, 1, 32, 32, 256, 5),
)
GRAD_TILES_32BIT = (
    GradTile("run1_32", 2, _FIRST, 1, 1, 32, 32, 128, 5),
    GradTile("run1_64", 3, _FIRST, 1, 1, 64, 64, 64, 5),
    GradTile("run1_128", 4, _FIRST, 1, 1, 128, 128, 32, 5),
    GradTile("run2", 10, _FIRST, 1, 2, 128, 64, 32, 4),
    GradTile("run2_64", 11, _FIRST, 1, 2, 64, 64, 32, 5),
    GradTile("run4_64", 13, _FIRST, 1, 4, 64, 64, 16, 5),
    GradTile("run4_32", 14, _FIRST, 1, 4, 32, 32, 64, 3),
    GradTile("run8", 15, _FIRST, 1, 8, 64, 32, 16, 4),
    GradTile("run8_32", 16, _FIRST, 1, 8, 32, 32, 32, 3),
    GradTile("last_128", 19, _LAST, 1, 1, 128, 128, 32, 5),
    GradTile("last_64", 20, _LAST, 1, 1, 64, 64, 64, 5),
    GradTile("last_32", 21, _LAST, 1, 1, 32, 32, 128, 5),
)

# On wgmma, 16-bit, for runs of all l of the pattern (csrc/weight_grad_hopper.cuh).
GRAD_TILES_HOPPER = (
    GradTile("hopper2", 22, _FIRST, 1, 2, 128, 128, 32, 5),
    GradTile("hopper4", 23, _FIRST, 1, 4, 128, 64, 32, 4),
    GradTile("hopper8", 24, _FIRST, 1, 8, 128, 32, 16, 4, cluster=2),
)

# Most rows that a split adds up in the tensor cores' own accumulators, which truncate.
_LONGEST_SPLIT = 32_768

# What the estimate goes by, as measured on one H200 (csrc/VERSIONS.md): bytes and multiply-adds per microsecond.
_MEMORY = 4.2e6
_CACHE_OF_MULTIPROCESSOR = 6.5e6 / 132
_PRODUCTS_OF_MULTIPROCESSOR = {"16bit": 1.5e6, "tf32": 0.7e6, "split": 0.22e6, "small": 0.1e6}
# What the wgmma tiles move through the shared memory of a multiprocessor, which bounds them (one H100).
_SHARED_OF_MULTIPROCESSOR = 2.35e5
# Elements per microsecond that a multiprocessor moves one by one, where they are no whole pieces of 16 bytes:
# neighbours, and those that lie apart.
_NEIGHBOURS_OF_MULTIPROCESSOR, _ELEMENTS_OF_MULTIPROCESSOR = 1.5e4, 2e3
# Microseconds of a CTA beside its rows (mma.sync, wgmma), and of the second kernel.
_START, _WGMMA_START, _SUM = 4.0, 2.5, 3.0
_SECTOR = 32


def grad_tiles_for(problem: Problem) -> list[GradTile]:
    """The tiles that can compute the weight gradient of ``problem``; none where shared memory is too small."""
    itemsize = problem.dtype.itemsize
    table = GRAD_TILES_32BIT if problem.dtype == torch.float32 else GRAD_TILES_16BIT
    room = shared_bytes_of(problem.capability)
    tiles = [tile for tile in table if tile.layout is problem.layout and tile.shared_bytes(itemsize) <= room]
    if problem.dtype != torch.float32 and problem.layout is _FIRST and problem.capability == (9, 0):
        tiles += [tile for tile in GRAD_TILES_HOPPER if tile.run == problem.pattern.d and _takes_wgmma(problem, tile)]
    if max(problem.pattern.b, problem.pattern.c) <= SMALL_BLOCK:
        tiles.append(GradTile("small_blocks", 0, problem.layout, 1, 1, SMALL_BLOCK, SMALL_BLOCK, 32, 0))
    return tiles


def split_counts(problem: Problem, tile: GradTile, multiprocessors: int) -> Iterator[int]:
    """Numbers of splits that fill the GPU one to four times over, of at most one for every step of the tile."""
    least = _ceil(problem.n, _LONGEST_SPLIT) or 1
    most = max(least, _ceil(problem.n, tile.step))
    resident = multiprocessors * (8 if tile.number == 0 else 1)
    for rounds in range(1, 5):
        yield min(max(least, resident * rounds // _tiles(problem, tile)), most)


def _ceil(n: int, size: int) -> int:
    return -(-n // size)


def _tiles(problem: Problem, tile: GradTile) -> int:
    a, b, c, d = problem.pattern
    if tile.number == 0:
        return _ceil(a * d, 32 if problem.layout is Layout.BATCH_FIRST else 8)
    tiles_k = _ceil(c, tile.columns * tile.cluster) * tile.cluster
    return _ceil(a, tile.groups) * _ceil(d, tile.run) * _ceil(b, tile.rows) * tiles_k


def _read_per_element(problem: Problem, tile: GradTile) -> float:
    """Bytes from the L2 for one element that a CTA needs: whole sectors."""
    itemsize, d = problem.dtype.itemsize, problem.pattern.d
    if problem.layout is Layout.BATCH_LAST or tile.number == 0 or tile.run >= d:
        return itemsize
    run = tile.run * itemsize
    return itemsize * max(1.0, _SECTOR / run)


def _takes_pieces(problem: Problem, tile: GradTile) -> bool:
    """Whether what a CTA reads lies in runs of 16 bytes."""
    itemsize, (_, b, c, d) = problem.dtype.itemsize, problem.pattern
    piece = 16 // itemsize
    if problem.layout is Layout.BATCH_LAST:
        return problem.n % piece == 0
    whole = d % piece == 0 if tile.run >= piece else d == tile.run
    return whole and (problem.pattern.a == 1 or (b * d % piece == 0 and c * d % piece == 0))


def _takes_wgmma(problem: Problem, tile: GradTile) -> bool:
    """Whether a tile of ``GRAD_TILES_HOPPER`` computes it; tensors whose rows are not aligned it leaves to others."""
    return problem.pattern.c % 8 == 0 and problem.n > 0 and _takes_pieces(problem, tile)


def estimate(problem: Problem, tile: GradTile, splits: int, multiprocessors: int) -> float:
    """Expected time in microseconds."""
    a, b, c, d = pattern = problem.pattern
    itemsize, n = problem.dtype.itemsize, problem.n
    tiles = _tiles(problem, tile)
    rounds = _ceil(tiles * splits, multiprocessors * (8 if tile.number == 0 else 1))
    kind = "16bit" if problem.dtype != torch.float32 else "tf32" if problem.tf32 else "split"
    if tile.number == 0:
        needed, padded, kind = n * a * d * (b + c) / tiles, n * a * d * tile.rows * tile.columns / tiles, "small"
    else:
        # Of a CTA, all splits together: elements that it needs, and products that it computes.
        across = min(tile.groups, a) * min(tile.run, d)
        needed = n * across * (min(tile.rows, b) + min(tile.columns, c))
        padded = n * tile.groups * tile.run * tile.rows * tile.columns
    read = needed * _read_per_element(problem, tile) / _CACHE_OF_MULTIPROCESSOR
    if tile.number != 0 and not _takes_pieces(problem, tile):
        together = problem.layout is Layout.BATCH_LAST or tile.run >= min(d, 16 // itemsize)
        rate = _NEIGHBOURS_OF_MULTIPROCESSOR if together else _ELEMENTS_OF_MULTIPROCESSOR
        read = n * tile.groups * tile.run * (tile.rows + tile.columns) / rate
    busy, start = max(read, padded / _PRODUCTS_OF_MULTIPROCESSOR[kind]), _START
    if tile in GRAD_TILES_HOPPER:
        # dy is written and read, x is written, separated by l, and read by two warpgroups; padding counts.
        busy = n * tile.run * itemsize * (2 * tile.rows + 5 * tile.columns) / _SHARED_OF_MULTIPROCESSOR
        start = _WGMMA_START
    busy /= splits
    summing = _SUM + 8 * splits * pattern.nnz / _MEMORY if splits > 1 else 0.0
    return max(rounds * (busy + start), pattern.bytes(n, itemsize) / _MEMORY) + summing


@lru_cache(maxsize=4096)
def choose_grad_tile(problem: Problem, multiprocessors: int) -> GradChoice | None:
    """The tile and number of splits expected to be fastest; None where no tile can compute it."""
    choices = {
        (tile, splits) for tile in grad_tiles_for(problem) for splits in split_counts(problem, tile, multiprocessors)
    }
    if not choices:
        return None
    # Ties go to the lower number and fewer splits, whatever the order of the set.
    best = min(choices, key=lambda one: (estimate(problem, one[0], one[1], multiprocessors), one[0].number, one[1]))
    return GradChoice(*best)
