"""Two chainable factors in one compiled kernel, the intermediate kept on chip (csrc/pair*.cuh)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from structlayers._extension import BUILD_COMMAND, built_for_sm90a, why_missing
from structlayers.backends import tuning
from structlayers.backends.tiles import HOPPER, HOPPER_SMS
from structlayers.patterns import Link, Pattern
from structlayers.problem import ACTIVATIONS, Layout, Problem

_library = torch.library.Library("structlayers", "FRAGMENT")
# Implemented in csrc/register.cpp. x is (N, in_features), or (in_features, N) batch-last, with stride 1 in the last
# dimension; left is applied last; split asks for float32 accuracy from float32 inputs; tile is PairTile.number, or 0
# for the kernel's own choice.
_library.define(
    "cuda_pair(Tensor x, Tensor left, Tensor right, Tensor? bias, int out_features, bool batch_last, int activation, "
    "bool split, int tile) -> Tensor"
)

# (x, left, right, bias) to the output; x is two-dimensional.
PairProduct = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

DTYPES = (torch.float16, torch.bfloat16)
# Every address and every row that the copy engine reads is a whole number of pieces of this size.
PIECE_BYTES = 16
# Rows of the batch in a tile, and bytes of shared memory of a CTA.
TILE_ROWS, SHARED_BYTES = 64, 227 * 1024
MOST_FEATURES, MOST_ROWS = 2**31 - 1, 2**31 - 1 - TILE_ROWS
CLUSTERS, STAGE_ROWS, MOST_STAGES = (1, 2, 4, 8), (256, 192, 128), 8
# The pairs whose intermediate fits registers: alpha and delta, and the link ranks; values of K in a row of a stage.
REGISTER_BLOCKS, REGISTER_RANKS, REGISTER_K = 4, (16, 24, 32, 48, 64), 64
# Into how many parts the outputs of a tile may be cut, where there are fewer tiles than SMs.
PARTS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class PairProblem:
    """One product with a chainable pair ``left @ right``: all that fusing it may depend on.

    ``in_features`` and ``out_features`` are the logical sizes of the product, at most those of the pair.
    """

    link: Link
    n: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    device_type: str
    layout: Layout
    tf32: bool = False
    device_index: int = 0
    capability: tuple[int, int] = (8, 0)

    @classmethod
    def of(
        cls, link: Link, single: Problem, in_features: int | None = None, out_features: int | None = None
    ) -> PairProblem:
        """The pair under the circumstances (batch, dtype, device, layout) of a problem with one factor."""
        return cls(
            link,
            single.n,
            link.right.in_features if in_features is None else in_features,
            link.left.out_features if out_features is None else out_features,
            single.dtype,
            single.device_type,
            single.layout,
            single.tf32,
            single.device_index,
            single.capability,
        )

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (self.link.left, self.link.right)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        left, right = tuple(self.link.left), tuple(self.link.right)
        return f"{left}{right}, n={self.n}, {dtype}, {self.layout.value}, {self.device_type}"


@dataclass(frozen=True)
class PairTile:
    """How the kernel cuts a pair: ``cluster`` CTAs that share the intermediate, rows of each weight in a stage.

    ``stages`` of the pipeline fit beside the intermediate; ``cycles`` is about what one tile of the batch takes a CTA.
    Where the intermediate stays in registers, the rows are 0, and so many ``parts`` of a tile's outputs are work for
    CTAs of their own, each of which computes the intermediate again.
    """

    cluster: int
    right_rows: int
    left_rows: int
    stages: int
    cycles: float
    parts: int = 1

    @property
    def number(self) -> int:
        """What names the tile in csrc/pair.h."""
        if self.in_registers:
            return 1 + 256 * self.parts
        return self.cluster + 256 * (self.right_rows // 32) + 65_536 * (self.left_rows // 32)

    @property
    def in_registers(self) -> bool:
        return self.left_rows == 0

    @property
    def name(self) -> str:
        if self.in_registers:
            return "registers" if self.parts == 1 else f"registers{self.parts}"
        return f"cluster{self.cluster}_rows{self.right_rows}x{self.left_rows}"


def pair_tiles(problem: PairProblem) -> list[PairTile]:
    """The tiles that take the pair."""
    tiles = [_register_tile(problem, parts) for parts in PARTS]
    tiles += [_tile(problem, cluster, rows) for cluster in CLUSTERS for rows in STAGE_ROWS]
    return [tile for tile in tiles if tile is not None]


def rounds_of(problem: PairProblem, tile: PairTile) -> int:
    """How often the busiest CTA or cluster goes through a tile, or a part of one."""
    work = -(-problem.n // TILE_ROWS) * problem.link.left.a * tile.parts
    return -(-work // (HOPPER_SMS // tile.cluster))


def _tile(problem: PairProblem, cluster: int, left_rows: int) -> PairTile | None:
    """The same sums as ``pair_shape`` and ``pair_cost`` in csrc/launch_pair.cuh, which refuses what does not fit."""
    link, itemsize = problem.link, problem.dtype.itemsize
    alpha, delta, rank, b, c = link.alpha, link.delta, link.rank, link.left.b, link.right.c
    right_rows = 128 if rank <= 2 else left_rows
    if cluster > 1 and (delta % (8 * cluster) or alpha % cluster):
        return None
    own_alpha, own_delta = alpha // cluster, delta // cluster
    # Which kernels there are.
    if (rank % 2 and right_rows != 128) or (rank <= 2 and cluster > 1 and own_alpha % (8 // rank)):
        return None
    left_l = next((run for run in (16, 8) if own_delta % run == 0), delta)
    if left_rows == 192 and (rank % 8 or left_l > 4):
        return None
    run_c, run_middle = (32 if size <= 32 else 64 for size in (c, alpha * rank))
    if problem.in_features != link.right.in_features and c % run_c:
        return None
    # Where the link rank is 1, two neighbouring blocks of the right factor are multiplied at once.
    neighbours = 2 if rank == 1 else 1
    ranks = min(rank, right_rows // neighbours)
    runs = min(delta, right_rows // neighbours // ranks)
    steps, pieces = -(-c // run_c), -(-alpha * rank // run_middle)
    stage = max((neighbours * TILE_ROWS + right_rows) * run_c, left_rows * run_middle) * itemsize
    # The intermediate, padded by 16 bytes for every l; the rows of the output, padded too.
    intermediate = own_delta * (TILE_ROWS * pieces * run_middle * itemsize + 16)
    room = SHARED_BYTES - _rounded(intermediate, 1024) - 16 * 17
    pitch = _rounded(left_rows // (2 if left_l == 1 else 1) * itemsize, 128) + {4: 32, 8: 64}.get(left_l, 16)
    area = TILE_ROWS * pitch * (2 if left_l == 1 else 1)
    # Two areas for the output where three stages still fit beside them.
    stages = max(room - 2 * area, 0) // stage
    if stages < 3:
        stages = max(room - area, 0) // stage
    if stages < 2:
        return None
    rights = -(-own_alpha // neighbours) * -(-delta // runs) * -(-rank // ranks) * steps
    left_j = left_rows // left_l
    lefts = -(-b // left_j) * (own_delta // left_l) * pieces
    cycles = rights * (300 + 7.4 * right_rows) + lefts * (300 + 7.4 * left_l * left_j)
    if cluster >= 4:
        cycles += 5000 * cluster
    return PairTile(cluster, right_rows, left_rows, min(stages, MOST_STAGES), cycles * (1.15 if stages < 3 else 1.0))


def _register_tile(problem: PairProblem, parts: int) -> PairTile | None:
    """As ``pair_fits_registers`` in csrc/pair.h and csrc/pair_registers.cuh have it.

    The cycles were fitted to 13 pairs at batches of 6,272 and 25,088 on one H100 (0.9 to 1.13 times what was measured),
    then multiplied by 0.85; ``PAIR_CYCLES_PER_S`` of auto.py, fitted later to more pairs, takes that back.
    """
    link, itemsize = problem.link, problem.dtype.itemsize
    rank, b, c = link.rank, link.left.b, link.right.c
    if link.alpha != REGISTER_BLOCKS or link.delta != REGISTER_BLOCKS or rank not in REGISTER_RANKS:
        return None
    # Blocks of a padded input, and groups of a padded output, are no tensors that the copy engine knows.
    if problem.in_features != link.right.in_features and c % REGISTER_K:
        return None
    if problem.out_features % 8 or b % 2 or (link.left.a > 1 and problem.out_features != link.left.out_features):
        return None
    left_j = 2 * rank if rank <= 32 else rank
    row = REGISTER_K * itemsize
    stage = max(TILE_ROWS + REGISTER_BLOCKS * rank, REGISTER_BLOCKS * left_j) * row
    stages = (SHARED_BYTES - 1024 - 2 * TILE_ROWS * row) // stage
    rights = REGISTER_BLOCKS * -(-c // REGISTER_K)
    # Whole chunks of the outputs in every part, and no empty part.
    chunks = -(-b // left_j)
    in_part = -(-chunks // parts)
    if -(-chunks // in_part) != parts:
        return None
    steps = in_part * -(-REGISTER_BLOCKS * rank // REGISTER_K)
    cycles = 2300 + rights * (570 + 4.8 * rank) + steps * 7.6 * left_j + 24 * min(b, in_part * left_j)
    return PairTile(1, 0, 0, min(stages, MOST_STAGES), cycles, parts)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@lru_cache(maxsize=4096)
def choose_pair_tile(problem: PairProblem, tuned: str | None = None) -> PairTile:
    """The tile expected to be fastest, as the kernel chooses: registers hold the intermediate wherever they can.

    ``tuned`` names the tile that was measured to be fastest, and decides if it fits.

    Raises ``ValueError`` where none fits: :func:`reason_against` comes first.
    """
    tiles = pair_tiles(problem)
    if not tiles:
        raise ValueError(f"no tile takes {problem}")
    for tile in tiles:
        if tile.name == tuned:
            return tile
    in_registers = [tile for tile in tiles if tile.in_registers]
    if in_registers:
        return min(in_registers, key=lambda tile: rounds_of(problem, tile) * tile.cycles)
    return min(tiles, key=lambda tile: tile.cycles * tile.cluster)


def reason_against(problem: PairProblem) -> str | None:
    """None, or the sentence that tells a user why the pair runs as two kernels."""
    return _why_device_does_not_serve(problem) or _why_pair_does_not_fit(problem)


def _why_device_does_not_serve(problem: PairProblem) -> str | None:
    if problem.device_type != "cuda":
        return f"the tensors are on {problem.device_type}: expected cuda"
    if problem.capability != HOPPER:
        major, minor = problem.capability
        return f"compute capability {major}.{minor}: expected {HOPPER[0]}.{HOPPER[1]}"
    return why_missing() or _why_kernel_is_missing()


def _why_kernel_is_missing() -> str | None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("structlayers::cuda_pair", "CUDA"):
        return f"the compiled kernels are older than the fused one; build them again with: {BUILD_COMMAND}"
    if not built_for_sm90a():
        return f"the compiled kernels hold no code for sm_90a; build them again with: {BUILD_COMMAND}"
    return None


def _why_pair_does_not_fit(problem: PairProblem) -> str | None:
    """What the kernel asks of the pair itself, whatever the machine."""
    left, right = problem.link.left, problem.link.right
    if problem.dtype not in DTYPES:
        return f"the fused kernel has no {problem.dtype}: expected one of {list(DTYPES)}"
    if problem.layout is not Layout.BATCH_FIRST:
        return f"the fused kernel has no {problem.layout.value}: expected {Layout.BATCH_FIRST.value}"
    if right.d != 1:
        return f"the factor applied first, {tuple(right)}, is interleaved: expected d = 1"
    piece = PIECE_BYTES // problem.dtype.itemsize
    for name, size in (
        (f"c of {tuple(right)}", right.c),
        (f"c of {tuple(left)}", left.c),
        ("in_features", problem.in_features),
    ):
        if size % piece:
            return f"{name} = {size}: expected a multiple of {piece}, so that rows are whole 16-byte pieces"
    delta = problem.link.delta
    if delta not in (1, 2, 4) and delta % 8:
        return f"d of {tuple(left)} = {delta}: expected 1, 2, 4 or a multiple of 8"
    if max(left.out_features, left.in_features, right.in_features) > MOST_FEATURES or problem.n > MOST_ROWS:
        return f"more than {MOST_FEATURES} features or {MOST_ROWS} rows"
    if not pair_tiles(problem):
        return "the intermediate does not fit the shared memory of a cluster"
    return None


def prepare(problem: PairProblem, activation: str) -> PairProduct:
    """The product with both factors, bias and activation included, as one kernel."""
    kernel = torch.ops.structlayers.cuda_pair.default
    entry = tuning.lookup(problem)
    number = choose_pair_tile(problem, None if entry is None else entry.tile).number
    last = problem.layout is Layout.BATCH_LAST
    split = problem.dtype == torch.float32 and not problem.tf32
    epilogue = ACTIVATIONS.index(activation)
    piece, out_features = PIECE_BYTES // problem.dtype.itemsize, problem.out_features

    def product(
        x: Tensor,  # (N, in_features), batch-last (in_features, N)
        left: Tensor,  # (a, d, b, c) of the factor applied last
        right: Tensor,  # (a, d, b, c) of the factor applied first
        bias: Tensor | None,  # (out_features,)
    ) -> Tensor:  # (N, out_features), batch-last (out_features, N)
        if x.stride(1) != 1 or x.stride(0) % piece or x.stride(0) < x.shape[1] or x.data_ptr() % PIECE_BYTES:
            # A copy even of a contiguous x that starts in the middle of a piece. Also of an expanded x, whose rows
            # share memory: no map of the copy engine is known to take that.
            x = x.clone(memory_format=torch.contiguous_format)
        if bias is not None:
            bias = bias.contiguous()
        return kernel(x, _aligned(left), _aligned(right), bias, out_features, last, epilogue, split, number)

    return product


def _aligned(weight: Tensor) -> Tensor:
    if weight.is_contiguous() and weight.data_ptr() % PIECE_BYTES == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)
