"""What a product is expected to cost, and ``backend="auto"``: pure functions of the problem.

The costs of whole chains in :mod:`structlayers.plans` are sums of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from structlayers.backends.bmm import group_size
from structlayers.backends.fused import PairProblem, PairTile, choose_pair_tile, rounds_of
from structlayers.backends.tiles import HOPPER_SMS, SMALL_BATCH, SMALL_BATCH_ROWS, SMALL_BLOCKS, Tile, choose_tile
from structlayers.backends.tuning import Entry
from structlayers.patterns import Link
from structlayers.problem import Layout, Problem


@dataclass(frozen=True)
class CpuCosts:
    """Seconds that one backend takes on a CPU, term by term of :func:`cpu_cost_s`."""

    call: float
    # One call more and every input and output element once more, where blocks are interleaved.
    permute_call: float = 0.0
    permuted_element: float = 0.0
    element: float = 0.0
    # Every block, and every row of the batch in every block, whatever the size of the block.
    block: float = 0.0
    row_block: float = 0.0
    # Every element of the dense weight that is built first; none is where the factor is one block.
    dense_element: float = 0.0


# Fitted by non-negative least squares on relative errors to 46 patterns (blocks of 1 x 1 to 512 x 512, 4 to 1,024
# features, d = 1 to 512) at batches of 1, 8, 64, 512 and 4,096 in float32, torch 2.13, one thread of a Zen server CPU
# with AVX-512. The choices take 1.06 times (geometric mean) the time of the best of the three there, 1.06 in float64
# and 1.07 in bfloat16. Only ratios matter for the choice.
SECONDS_PER_FLOP = 1.2e-11
CPU_COSTS = {
    Layout.BATCH_FIRST: {
        "bmm": CpuCosts(14.0e-6, permute_call=17.3e-6, permuted_element=3.75e-10, row_block=7.6e-9),
        "dense": CpuCosts(11.9e-6, element=0.8e-10, dense_element=1.5e-10),
        "einsum": CpuCosts(16.2e-6, permute_call=7.0e-6, permuted_element=8.0e-10, element=2.0e-10, row_block=7.6e-9),
    },
    # Here einsum is bmm with more copies.
    Layout.BATCH_LAST: {
        "bmm": CpuCosts(
            14.7e-6, permute_call=4.8e-6, permuted_element=1.8e-10, element=0.7e-10, block=13.6e-9, row_block=2.5e-10
        ),
        "dense": CpuCosts(11.7e-6, element=0.6e-10, dense_element=1.6e-10),
    },
}


def cpu_cost_s(name: str, problem: Problem) -> float:
    """Estimated seconds of one product on a CPU: overheads, elements touched, FLOPs done."""
    pattern, n = problem.pattern, problem.n
    costs = CPU_COSTS[problem.layout][name]
    elements = n * (pattern.in_features + pattern.out_features)
    dense_elements = pattern.in_features * pattern.out_features
    if name == "dense":
        return (
            costs.call
            + costs.element * elements
            + (costs.dense_element * dense_elements if pattern.n_blocks > 1 else 0.0)
            + SECONDS_PER_FLOP * 2 * n * dense_elements
        )
    group = group_size(pattern, n, "cpu") if name == "bmm" and problem.layout is Layout.BATCH_FIRST else 1
    blocks = pattern.n_blocks // group
    seconds = costs.call + costs.element * elements + (costs.block + costs.row_block * n) * blocks
    # Batch-last, the blocks of a factor with a = 1 are strided views.
    if pattern.d > 1 and not (problem.layout is Layout.BATCH_LAST and pattern.a == 1):
        seconds += costs.permute_call + costs.permuted_element * elements
    return seconds + SECONDS_PER_FLOP * pattern.flops(n) * group


@dataclass(frozen=True)
class GpuRates:
    """What the backends reach on a GPU, in FLOP/s and as shares of the copy rate; see :func:`gpu_cost_s`."""

    matmul: float
    cuda_first: float
    cuda_last: float


# Torch 2.11, n = 25,088, a sample of the grid of arXiv:2405.15013: the best matrix product over several shapes (16-bit:
# one H100), and what the compiled kernels reach where arithmetic and operand loads bind them (one H200, whose copy rate
# this is). Only ratios matter for the choice.
COPY_BYTES_PER_S = 4.2e12
CALL_S = 5e-6
GPU_RATES = {
    "16bit": GpuRates(matmul=8.0e14, cuda_first=1.05e14, cuda_last=2.5e14),
    "tf32": GpuRates(matmul=3.0e14, cuda_first=5.0e13, cuda_last=7.5e13),
    "float32": GpuRates(matmul=5.0e13, cuda_first=2.8e13, cuda_last=4.2e13),
}
# Reading and writing everything once, as a share of the copy rate; with d > 1, bmm copies its input and output first,
# the more slowly the further the elements of a block lie apart.
CUDA_SHARE, BMM_SHARE = 0.6, 0.7
# By bytes of an element: of what bmm copies, near and far apart, and the calls that copy and multiply. By hand from 112
# products at n = 256 and 4,096 on one H100.
BMM_PERMUTED_SHARES = {2: (0.16, 0.085), 4: (0.3, 0.16)}
BMM_PERMUTED_CALL_S = 11.0e-6
# The same for the kernel of small blocks, and where runs or rows are not whole 16-byte pieces.
SMALL_BLOCKS_SHARE, ELEMENTS_SHARE = 0.27, 0.05
# What the wgmma tiles move between the L2 and the SMs, counted as in `_kernel_s`.
WGMMA_BYTES_PER_S = 4.0e12
# The same for the tiles whose operands go to registers, by hand from 80 patterns of the paper's grid on one H100: what
# bounds them while the weights stay in shared memory, and while they stream.
REGISTERS_SHARE = 0.68
REGISTERS_RESIDENT_BYTES, REGISTERS_SHORT_RUNS = 128 * 1024, 0.6
REGISTERS_RESIDENT_BYTES_PER_S, REGISTERS_STREAMED_BYTES_PER_S = 5.2e12, 7.2e12
# The same batch-last, and the seconds of a step of 32 k of one tile on one SM, and of its beginning and end: by least
# absolute errors to 183 products on one H100 (0.79 to 1.09 times what was measured, 5 to 95 %).
REGISTERS_LAST_SHARE = 0.6
REGISTERS_LAST_S = {
    "registers_last": (0.41e-6, 1.7e-6),
    "registers_last_pair": (0.35e-6, 2.65e-6),
    "registers_last_narrow": (0.61e-6, 2.1e-6),
}
# The same where rows begin anywhere in a 16-byte piece, with an end that is longer for every value of j; weights with
# more k than these are fetched again for every tile. By hand from 14 patterns at n = 25,087 (0.73 to 1.25 times).
LAST_ROWS_SHARE = 0.52
LAST_ROWS_STEP_S, LAST_ROWS_STREAMED_STEP_S, LAST_ROWS_RESIDENT_C = 0.8e-6, 1.4e-6, 256
LAST_ROWS_TILE_S, LAST_ROWS_TILE_S_PER_B = 2.0e-6, 1.9e-8
# The float32 tiles whose operands go to registers: the share of the copy rate that they reach (batch-last less,
# which decides at short b and c), the seconds of a step of k of one tile on one SM (float32, TF32), and the least of a
# batch-last kernel; by hand from the paper's grid and 80 patterns in TF32 on one H100, but d = 1 and TF32
# batch-last, by 66 products with earlier tiles.
SPLIT_SHARE, SPLIT_LAST_SHARE, SPLIT_LAST_LEAST_S = 0.58, 0.5, 8e-6
SPLIT_STEP_S = {
    "registers1": (1.3e-6, 0.8e-6),
    "registers2": (1.3e-6, 0.75e-6),
    "registers4": (1.4e-6, 0.75e-6),
    "registers8": (2.1e-6, 2.2e-6),
    "registers_last": (1.35e-6, 1.2e-6),
}
# The tile of rows and blocks of any length: the share of the copy rate, and FLOP/s where its sums bind, by hand from 40
# products on one H100 (tf32 only by what its steps cost elsewhere). Weights of 16 bits with more k than these are
# fetched again for every tile.
UNALIGNED_SHARE = 0.3
UNALIGNED_FLOP_PER_S = {"16bit": 1.3e14, "tf32": 3.1e13, "float32": 2.6e13}
UNALIGNED_RESIDENT_C, UNALIGNED_STREAMED_FLOP_PER_S = 256, 8.5e13
# The least time of a 16-bit kernel, and more for every k of a block: what a tile takes where there are few of them. By
# hand from pairs of kernels of 15 chains at n = 512 on one H100 (0.85 to 1.15 times what was measured).
KERNEL_LEAST_S, KERNEL_LEAST_S_PER_C = 2.5e-6, 1.6e-8
# Batch-last, where rows of N are no whole 16-byte pieces of 16 bits: what a dense product reaches, and how much longer
# bmm takes, with copies and without (there also where c is odd); by hand from eight patterns of odd sizes at n = 25,087
# on one H100.
ODD_BATCH_FLOP_PER_S, ODD_BATCH_BMM, ODD_BATCH_BMM_IN_PLACE = 1.45e14, 1.55, 3.6
# By the same: how much longer the kernels take where pieces of rows are put together, batch-last, and where rows of
# float32 weights are, batch-first.
UNALIGNED_LAST, UNALIGNED_WEIGHTS = 1.8, 2.0
# bmm with d = 1 where rows of its blocks are no whole 16-byte pieces of 16 bits.
BMM_ELEMENTS_SHARE = 0.15
# What float32 products of small blocks reach of the rate of large ones, b, c / (b, c + this): 13, 19, 28 and 45 TFLOP/s
# at 32, 64, 192 and 1,024 on one H100.
BMM_FLOAT32_HALF_RATE = 90
# A row times a block, however small the block: (1024,2,2,1) at n = 25,088 takes 1.24 ms; batch-last in place,
# (1,8,8,512) 0.24 ms.
BMM_ROW_BLOCK_S, BMM_ROW_BLOCK_IN_PLACE_S = 4.8e-11, 1.9e-11
# Below this b + c, it reaches less of the copy rate batch-first: (256,32,32,1) takes 1.5 times as long as (64,64,64,1)
# a byte.
BMM_SHORT_ROWS = 96


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    return "16bit" if dtype.itemsize == 2 else "tf32" if tf32 else "float32"


def _gpu_rates(dtype: torch.dtype, tf32: bool) -> GpuRates:
    return GPU_RATES[_precision(dtype, tf32)]


@dataclass(frozen=True)
class SmallBatchCosts:
    """Seconds of one product with few rows, term by term of :func:`small_batch_cost_s`."""

    call: float
    # More, where blocks are interleaved.
    interleaved: float
    weight_byte: float
    # Every byte of the input and the output, and every byte of the input for every 64 values of j.
    row_byte: float
    reread_byte: float = 0.0
    # Every k of a block's rows; of cuBLAS's, up to MOST_SERIAL_K.
    k: float = 0.0
    # Every byte of the input and the output, where blocks are interleaved.
    interleaved_byte: float = 0.0


# Up to SMALL_BATCH_ROWS rows, where a product is a launch and the time in which its weights arrive. Fitted by
# non-negative least squares on relative errors to 1,798 graph replays on one H100, bfloat16, weights from memory, at
# batches of 1 and 64: layers of 256 to 8,192 features, dense (1,247), one block by the kernel (263), and Monarch chains
# of 2 to 64 blocks, two kernels (231) or one with bmm (57); 5 to 95 %: 0.87 to 1.09 times what was measured. Of an
# earlier fit, to 18 chains and 76 layers, are what interleaved blocks cost bmm and what a byte of the rows of one block
# costs the kernel: the rows of the later one say nothing of them. A byte of interleaved rows costs bmm about so much at
# a batch of 64 and up to five times at 16.
SMALL_BATCH_COSTS = {
    "cuda": SmallBatchCosts(2.77e-6, 0.0, 0.387e-12, 1.07e-12, 1.44e-12, k=0.37e-9),
    "bmm": SmallBatchCosts(3.04e-6, 4.2e-6, 0.323e-12, 0.0, k=0.86e-9, interleaved_byte=0.5e-12),
}
# cuBLAS shares longer sums out.
MOST_SERIAL_K = 5120
# How much longer the kernel takes batch-last, by 14 patterns in float32 at a batch of 1.
SMALL_BATCH_LAST_S = 0.45e-6
# What the neighbours of bmm in a chain lose, which can no longer begin before it ends.
SMALL_BATCH_NEIGHBOURS_S = 1.9e-6
# Of a factor that is one block; bmm is then what dense is, behind its longer call.
ONE_BLOCK_COSTS = {
    "cuda": SmallBatchCosts(2.47e-6, 0.0, 0.368e-12, 6.8e-12, k=0.49e-9),
    "dense": SmallBatchCosts(3.0e-6, 0.0, 0.296e-12, 0.13e-12, k=0.66e-9),
    "bmm": SmallBatchCosts(3.04e-6, 0.0, 0.296e-12, 0.13e-12, k=0.66e-9),
}
# The arithmetic of float32 products by cuBLAS, which counts beside the weights for more than one row: 16 rows of
# (24,768,768,4) take 224 us, one row 84. More of it where bmm copies batch-last, by eight products.
SMALL_BATCH_FLOAT32_FLOP_PER_S, SMALL_BATCH_FLOAT32_LAST_FLOP_PER_S, SMALL_BATCH_FLOAT32_S = 1.4e13, 2.0e13, 0.8e-6
# Rows of weights that are not whole 16-byte pieces come element by element; not measured.
SMALL_BATCH_ELEMENTS = 4


def small_batch_cost_s(name: str, problem: Problem) -> float:
    """Estimated seconds of a product with few rows on a GPU; dense only of a factor that is one block."""
    pattern, n, itemsize = problem.pattern, problem.n, problem.dtype.itemsize
    costs = (ONE_BLOCK_COSTS if pattern.n_blocks == 1 else SMALL_BATCH_COSTS)[name]
    if name == "cuda" and choose_tile(problem).name == SMALL_BLOCKS:
        return costs.call + pattern.bytes(n, itemsize) / COPY_BYTES_PER_S / SMALL_BLOCKS_SHARE
    read, written = n * pattern.in_features * itemsize, n * pattern.out_features * itemsize
    weights = pattern.nnz * itemsize
    if name == "cuda" and pattern.c * itemsize % 16:
        weights *= SMALL_BATCH_ELEMENTS
    seconds = costs.call + costs.weight_byte * weights + costs.row_byte * (read + written)
    seconds += costs.k * (pattern.c if name == "cuda" else min(pattern.c, MOST_SERIAL_K))
    in_place = problem.layout is Layout.BATCH_LAST and pattern.a == 1
    if name == "cuda" and problem.layout is Layout.BATCH_LAST:
        seconds += SMALL_BATCH_LAST_S
    if name != "cuda" and n > 1 and itemsize == 4 and not problem.tf32:
        copied_last = problem.layout is Layout.BATCH_LAST and not in_place
        seconds += SMALL_BATCH_FLOAT32_S
        seconds += pattern.flops(n) / (
            SMALL_BATCH_FLOAT32_LAST_FLOP_PER_S if copied_last else SMALL_BATCH_FLOAT32_FLOP_PER_S
        )
    if pattern.d > 1 and not (name == "bmm" and in_place):
        seconds += costs.interleaved + costs.interleaved_byte * (read + written)
    return seconds + costs.reread_byte * read * pattern.b / 64


def gpu_cost_s(name: str, problem: Problem) -> float:
    """Estimated seconds of one product on a GPU: the larger of traffic and arithmetic, plus a call."""
    if 0 < problem.n <= SMALL_BATCH_ROWS and (name != "dense" or problem.pattern.n_blocks == 1):
        return small_batch_cost_s(name if name in ONE_BLOCK_COSTS else "bmm", problem)
    pattern, n, itemsize = problem.pattern, problem.n, problem.dtype.itemsize
    rates, traffic = _gpu_rates(problem.dtype, problem.tf32), pattern.bytes(n, itemsize)
    last = problem.layout is Layout.BATCH_LAST
    odd_batch = last and itemsize == 2 and n % 8 != 0
    if name == "dense":
        elements = pattern.in_features * pattern.out_features
        arithmetic = 2 * n * elements / (ODD_BATCH_FLOP_PER_S if odd_batch else rates.matmul)
        if pattern.n_blocks == 1:
            return CALL_S + max(traffic / COPY_BYTES_PER_S / BMM_SHARE, arithmetic)
        # The dense weight is filled with zeros, given its values and read.
        moved = n * (pattern.in_features + pattern.out_features) + 3 * elements
        return 10 * CALL_S + max(moved * itemsize / COPY_BYTES_PER_S / BMM_SHARE, arithmetic)
    if name == "bmm":
        smallest = min(pattern.b, pattern.c)
        small = 1 + BMM_FLOAT32_HALF_RATE / smallest if itemsize == 4 and not problem.tf32 else 1
        in_place = last and pattern.a == 1
        row_block_s = BMM_ROW_BLOCK_IN_PLACE_S if in_place else BMM_ROW_BLOCK_S
        arithmetic = max(pattern.flops(n) / rates.matmul * small, row_block_s * n * pattern.n_blocks)
        if pattern.d > 1 and not in_place:
            near, far = BMM_PERMUTED_SHARES[min(itemsize, 4)]
            weights = pattern.nnz * itemsize
            copied = (
                (traffic - weights)
                * (ODD_BATCH_BMM if odd_batch else 1)
                / (far if pattern.d >= 32 and not last else near)
            )
            return BMM_PERMUTED_CALL_S + (copied + weights / BMM_SHARE) / COPY_BYTES_PER_S + arithmetic
        share = BMM_SHARE if last else BMM_SHARE * min(1.0, (pattern.b + pattern.c) / BMM_SHORT_ROWS)
        if itemsize == 2 and (pattern.c % 8 != 0 or (n if last else pattern.b) % 8 != 0):
            share = BMM_SHARE / ODD_BATCH_BMM_IN_PLACE if last else BMM_ELEMENTS_SHARE
        return CALL_S + max(traffic / COPY_BYTES_PER_S / share, arithmetic)
    least = KERNEL_LEAST_S + KERNEL_LEAST_S_PER_C * pattern.c if itemsize == 2 else 0.0
    return CALL_S + max(least, _kernel_s(problem, rates, traffic))


def _rounds(problem: Problem, tile: Tile) -> int:
    """How many tiles the busiest SM takes; clusters along j are whole."""
    a, b, _, d = problem.pattern
    tiles_j = -(-b // tile.columns // tile.cluster) * tile.cluster
    return -(-(-(-problem.n // tile.rows) * a * -(-d // tile.run) * tiles_j) // HOPPER_SMS)


def _kernel_s(problem: Problem, rates: GpuRates, traffic: int) -> float:
    """Estimated seconds of the compiled kernel alone; ``traffic`` in bytes, everything read and written once."""
    _, b, c, d = problem.pattern
    tile = choose_tile(problem)
    piece = 16 // problem.dtype.itemsize
    last = problem.layout is Layout.BATCH_LAST
    whole = problem.n % piece == 0 if last else b % piece == 0 and c % piece == 0 and (d % piece == 0 or piece % d == 0)
    if tile.name == SMALL_BLOCKS:
        return traffic / COPY_BYTES_PER_S / SMALL_BLOCKS_SHARE
    if tile.name == SMALL_BATCH and problem.n > SMALL_BATCH_ROWS:
        # It stands in where no tile fits shared memory, and was not measured there: only where the others are bad too.
        return traffic / COPY_BYTES_PER_S / ELEMENTS_SHARE
    if not (last or tile.wgmma) and d != tile.run:
        # A tile that stands in for one too large for the GPU also takes shorter runs apart.
        whole = whole and tile.run >= piece and d % piece == 0
    if tile.any_length and last:
        step_s = LAST_ROWS_STEP_S if c <= LAST_ROWS_RESIDENT_C else LAST_ROWS_STREAMED_STEP_S
        rest_s = LAST_ROWS_TILE_S + LAST_ROWS_TILE_S_PER_B * min(b, tile.columns)
        return max(
            traffic / COPY_BYTES_PER_S / LAST_ROWS_SHARE, _rounds(problem, tile) * (-(-c // 32) * step_s + rest_s)
        )
    if tile.any_length:
        flop_per_s = UNALIGNED_FLOP_PER_S[_precision(problem.dtype, problem.tf32)]
        if c > UNALIGNED_RESIDENT_C:
            flop_per_s = min(flop_per_s, UNALIGNED_STREAMED_FLOP_PER_S)
        return max(traffic / COPY_BYTES_PER_S / UNALIGNED_SHARE, problem.pattern.flops(problem.n) / flop_per_s)
    if not (whole or last or tile.splits_weights):
        return traffic / COPY_BYTES_PER_S / ELEMENTS_SHARE
    return _whole_kernel_s(problem, rates, traffic) * (1.0 if whole else UNALIGNED_LAST if last else UNALIGNED_WEIGHTS)


def _whole_kernel_s(problem: Problem, rates: GpuRates, traffic: int) -> float:
    """The same where everything is made of whole 16-byte pieces."""
    _, b, c, d = problem.pattern
    tile = choose_tile(problem)
    last = problem.layout is Layout.BATCH_LAST
    if tile.splits_weights:
        # Steps are those of csrc/float32_registers.cuh (XK); a tile also takes about one to begin and end.
        steps = 1 + -(-c // (32 if tile.run <= 2 else 16))
        step_s = SPLIT_STEP_S[tile.name][problem.tf32]
        share = SPLIT_LAST_SHARE if last else SPLIT_SHARE
        arithmetic = _rounds(problem, tile) * steps * step_s
        return max(traffic / COPY_BYTES_PER_S / share, arithmetic, SPLIT_LAST_LEAST_S if last else 0.0)
    if tile.registers and last:
        step_s, rest_s = REGISTERS_LAST_S[tile.name]
        arithmetic = _rounds(problem, tile) * (-(-c // 32) * step_s + rest_s)
        return max(traffic / COPY_BYTES_PER_S / REGISTERS_LAST_SHARE, arithmetic)
    if tile.registers:
        # Likewise, but y leaves as it is, and w that fits shared memory is fetched once for many tiles of the batch.
        resident = tile.run * tile.columns * c * problem.dtype.itemsize <= REGISTERS_RESIDENT_BYTES
        moved = c * -(-b // tile.columns) / tile.cluster + (0 if resident else b * c / tile.rows) + b
        rate = REGISTERS_RESIDENT_BYTES_PER_S if resident else REGISTERS_STREAMED_BYTES_PER_S
        # Runs of 32 bytes of longer rows come one by one.
        whole_rows = 1.0 if d == tile.run else REGISTERS_SHORT_RUNS
        return traffic * max(1 / COPY_BYTES_PER_S / REGISTERS_SHARE, moved / (b + c) / rate) / whole_rows
    if tile.wgmma:
        # x once for every tile along j, w once for every tile of the batch, y with its padding through shared memory.
        tiles_j = -(-b // tile.columns)
        moved = c * tiles_j + b * c / min(tile.rows, problem.n) + 2 * tile.columns * tiles_j
        return traffic * moved / (b + c) / WGMMA_BYTES_PER_S
    # Blocks are padded to the tensor cores' tiles.
    padded = problem.pattern.flops(problem.n) * (-(-b // 16) * 16 / b) * (-(-c // 16) * 16 / c)
    return max(traffic / COPY_BYTES_PER_S / CUDA_SHARE, padded / (rates.cuda_last if last else rates.cuda_first))


# A fused pair: shares of the copy rate and of the matrix products, and how many of a tile's cycles pass in a second, by
# hand from 26 pairs of 256 to 8,192 features at n = 25,088 on one H100 (0.7 to 1.23 times what was measured).
PAIR_SHARE, PAIR_MATMUL_SHARE, PAIR_CYCLES_PER_S = 0.58, 0.6, 1.6e9
# Where the intermediate is in shared memory, a tile's cycles are these shares of what `PairTile` estimates, of every
# output of a CTA (more where a stage holds 128 rows of the left weight, more again where it is one of three, and where
# runs of 16 l and more are cut), and of a cluster: by least squares on relative errors to 47 pairs at n = 25,088 on one
# H100 (0.85 to 1.11 times what was measured, but (1,40,32,32)(32,32,32,1) 1.27). Short blocks cost a cluster more, by
# one pair: (1,16,16,64)(16,64,64,1) takes 94 us.
PAIR_TILE_SHARE, PAIR_OUTPUT_CYCLES, PAIR_CLUSTER_CYCLES = 0.9, 3.5, 3_800
PAIR_SHORT_B, PAIR_SHORT_CYCLES = 16, 8_000
PAIR_SHORT_STAGE_CYCLES, PAIR_FEW_STAGES_CYCLES, PAIR_CUT_RUNS_CYCLES = 2.7, 3.4, 2.5


def pair_cost_s(problem: PairProblem, tuned: Entry | None = None) -> float:
    """Estimated seconds of a chainable pair in one kernel, or what was measured where ``tuned`` has it.

    The largest of traffic, arithmetic and the rounds of tiles: every cluster takes the weights of its group again for
    every tile, so that a small batch keeps few SMs busy.
    """
    if tuned is not None and tuned.time_ms is not None and tuned.backend == "fused":
        return tuned.time_ms / 1e3
    link, n, rates = problem.link, problem.n, _gpu_rates(problem.dtype, problem.tf32)
    elements = n * (link.right.in_features + link.left.out_features) + link.left.nnz + link.right.nnz
    traffic = elements * problem.dtype.itemsize / COPY_BYTES_PER_S / PAIR_SHARE
    tile = choose_pair_tile(problem, None if tuned is None else tuned.tile)
    # In registers, the cycles hold it.
    flops = 0 if tile.in_registers else link.left.flops(n) + link.right.flops(n)
    arithmetic = flops / rates.matmul / PAIR_MATMUL_SHARE
    seconds = rounds_of(problem, tile) * _pair_cycles(problem, tile) / PAIR_CYCLES_PER_S
    return CALL_S + max(traffic, arithmetic, seconds)


def _pair_cycles(problem: PairProblem, tile: PairTile) -> float:
    """The clock cycles that a tile of a pair takes a cluster."""
    if tile.in_registers:
        return tile.cycles
    left = problem.link.left
    of_output = PAIR_OUTPUT_CYCLES
    if tile.left_rows == 128:
        of_output += PAIR_SHORT_STAGE_CYCLES
        of_output += PAIR_FEW_STAGES_CYCLES if tile.stages <= 3 else 0.0
        of_output += PAIR_CUT_RUNS_CYCLES if left.d // tile.cluster >= 16 else 0.0
    cycles = PAIR_TILE_SHARE * tile.cycles + of_output * (left.b * left.d // tile.cluster)
    if tile.cluster > 1:
        cycles += PAIR_CLUSTER_CYCLES + (PAIR_SHORT_CYCLES if left.b <= PAIR_SHORT_B else 0)
    return cycles


# Fitted to 11 chainable pairs (products of 256 to 17 million elements) on the CPU of the costs above.
CPU_MERGE_CALL_S, CPU_MERGE_ELEMENT_S = 1.3e-5, 1.3e-9
# Both factors and the product are permuted around one batched product, at that share of the copy rate.
GPU_MERGE_CALLS, MERGE_SHARE = 4, 0.16
# The compiled kernel of merging.py: a launch, and its multiply-adds (18 us for two halves of radix-2 4096 on one H100).
MERGE_CALL_S, MERGE_PRODUCTS_PER_S = 4e-6, 1e11


def merge_cost_s(link: Link, dtype: torch.dtype, device_type: str) -> float:
    """Estimated seconds of multiplying two neighbouring factors into one."""
    elements = link.left.nnz + link.right.nnz + 2 * link.product.nnz
    flops = 2 * link.product.nnz * link.rank
    if device_type == "cpu":
        return CPU_MERGE_CALL_S + CPU_MERGE_ELEMENT_S * elements + SECONDS_PER_FLOP * flops
    traffic = elements * dtype.itemsize / COPY_BYTES_PER_S / MERGE_SHARE
    return GPU_MERGE_CALLS * CALL_S + traffic + flops / _gpu_rates(dtype, False).matmul


def compiled_merge_cost_s(n_products: int) -> float:
    """Estimated seconds of multiplying a run of neighbours into one by the compiled kernel."""
    return MERGE_CALL_S + n_products / MERGE_PRODUCTS_PER_S


def cost_s(name: str, problem: Problem, tuned: Entry | None = None) -> float:
    """Estimated seconds of one product with the backend ``name``, or what was measured where ``tuned`` has it."""
    if tuned is not None and tuned.time_ms is not None and tuned.backend == name:
        # As measured at one batch of the bucket.
        return tuned.time_ms / 1e3
    if problem.device_type == "cpu":
        return cpu_cost_s(name if name in CPU_COSTS[problem.layout] else "bmm", problem)
    return gpu_cost_s(name, problem)


def neighbours_lose_s(name: str, problem: Problem) -> float:
    """Estimated seconds that a product costs those before and after it in a chain, beside its own time."""
    few = problem.device_type != "cpu" and 0 < problem.n <= SMALL_BATCH_ROWS
    return SMALL_BATCH_NEIGHBOURS_S if few and name == "bmm" else 0.0


# What auto chooses from on a GPU; einsum is bmm with more copies, but the tuning cache may know better.
GPU_CANDIDATES = ("cuda", "dense", "bmm", "einsum")


@lru_cache(maxsize=4096)
def choose(problem: Problem, compiled: bool = False, tuned: Entry | None = None) -> str:
    """The backend expected to be fastest; ``compiled`` says whether the compiled kernels can compute this problem.

    ``tuned`` is what was measured to be fastest, and decides where it can run. Without it:
    On a CPU the cheapest by :func:`cpu_cost_s`, on a GPU by :func:`gpu_cost_s`; elsewhere ``bmm``, whose batched
    product every device has.
    """
    if problem.device_type == "cpu":
        return min(CPU_COSTS[problem.layout], key=lambda name: cpu_cost_s(name, problem))
    if problem.device_type != "cuda":
        return "bmm"
    if tuned is not None and tuned.backend in GPU_CANDIDATES and (compiled or tuned.backend != "cuda"):
        return tuned.backend
    candidates = ["cuda", "dense", "bmm"] if compiled else ["dense", "bmm"]
    return min(candidates, key=lambda name: gpu_cost_s(name, problem))
