"""Radix-2 butterfly twiddles of torch_butterfly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from structlayers.errors import ShapeError
from structlayers.formats.matrix import FactoredMatrix, check_tensors
from structlayers.formats.refusal import Source, refuse
from structlayers.patterns import Chain, Pattern

# The dtypes in which a complex twiddle may have been stored as pairs of real numbers.
_PAIRED = (torch.float32, torch.float64)


class ButterflyTensors(NamedTuple):
    """A ``twiddle`` ``(nstacks, nblocks, log n, n/2, 2, 2)`` and the direction of its first block."""

    twiddle: Tensor
    increasing_stride: bool


def from_butterfly(
    twiddle: Tensor,  # (nstacks, nblocks, log n, n/2, 2, 2), real or complex
    increasing_stride: bool = True,
    in_features: int | None = None,
    out_features: int | None = None,
) -> FactoredMatrix:
    """The chain of ``nblocks * log n`` factors of a butterfly layer of size ``n``.

    Step ``t`` of a block has the stride ``d = 2**t``, or ``2**(log n - 1 - t)`` where the stride decreases; blocks
    alternate, and ``increasing_stride`` is the first block's direction. Each step computes
    ``y[(2*i + j)*d + l] = sum_k twiddle[stack, block, t, i*d + l, j, k] x[(2*i + k)*d + l]``. The stacks read the same
    input and write one after the other, cropped to ``out_features``; the input is padded to ``n``.

    The factor that touches the input first holds all stacks and no zeros. With increasing strides the chain keeps the
    stacks as the fastest index, chainable within its first block, and more than one stack gives an
    ``output_permutation``; with decreasing strides they are the slowest one, and there is none. A real tensor with a
    last axis of 2 behind these is read as complex. A bit reversal before or after the layer is no part of the twiddle:
    ``dataclasses.replace(matrix, input_permutation=...)`` adds it.
    Raises :class:`ShapeError` or :class:`ChainError` for sizes that do not fit.
    Source: layout of torch_butterfly (Dao et al., arXiv:1903.05895, arXiv:2012.14966).
    """
    if isinstance(twiddle, Tensor) and twiddle.dim() == 7 and twiddle.shape[-1] == 2 and twiddle.dtype in _PAIRED:
        twiddle = torch.view_as_complex(twiddle.contiguous())
    check_tensors(twiddle=(twiddle, "(nstacks, nblocks, log n, n/2, 2, 2)"))
    stacks, blocks, log_n, half = twiddle.shape[:4]
    if half != 2 ** (log_n - 1) or tuple(twiddle.shape[4:]) != (2, 2):
        raise ShapeError(
            f"twiddle of shape {tuple(twiddle.shape)}: expected (nstacks, nblocks, log n, n/2, 2, 2), "
            f"with n/2 = {2 ** (log_n - 1)} for log n = {log_n}"
        )
    patterns, weights = [], []
    for number, stride in enumerate(_strides(blocks, log_n, increasing_stride)):
        step = twiddle[:, number // log_n, number % log_n].reshape(stacks, half // stride, stride, 2, 2)  # s i l j k
        pattern = _pattern(stacks, half // stride, stride, number == 0, increasing_stride)
        patterns.append(pattern)
        weights.append(step.permute(_axes(number == 0, increasing_stride)).reshape(pattern.weight_shape))
    chain = Chain(reversed(patterns), in_features, out_features)
    written = tuple(reversed(weights))
    order = _output_order(stacks, 2 * half, increasing_stride)
    if order is None:
        return FactoredMatrix(chain, written)
    # The outputs to keep are not the chain's first ones: here the permutation crops.
    uncropped = Chain(chain.patterns, chain.in_features)
    return FactoredMatrix(uncropped, written, None, order[: chain.out_features])


def to_butterfly(source: Source) -> ButterflyTensors:
    """The twiddle of a chain that :func:`from_butterfly` could have returned; the sizes are those of ``source``.

    Raises :class:`ChainError` for any other chain, naming the first factor that differs, or order of features.
    """
    matrix = FactoredMatrix.of(source)
    chain = matrix.chain
    n, rows = chain.padded_in_features, chain.padded_out_features
    log_n = n.bit_length() - 1
    if n != 2**log_n or log_n < 1:
        refuse("butterfly", matrix, f"expected a padded input of a power of 2, at least 2, found {n}")
    if rows % n or len(chain) % log_n:
        found = f"found {rows} and {len(chain)}"
        refuse("butterfly", matrix, f"expected a multiple of {n} rows and of {log_n} factors, {found}")
    stacks, blocks = rows // n, len(chain) // log_n
    reasons = []
    for increasing_stride in (True, False):
        reason = _difference(matrix, stacks, blocks, log_n, increasing_stride)
        if reason is None:
            return ButterflyTensors(_twiddle(matrix, stacks, blocks, log_n, increasing_stride), increasing_stride)
        reasons.append(f"{'increasing' if increasing_stride else 'decreasing'} strides: {reason}")
    refuse("butterfly", matrix, "; ".join(reasons))


def _strides(blocks: int, log_n: int, increasing_stride: bool) -> list[int]:
    """The stride of every step, in the order in which the input meets them."""
    upwards = [2**t for t in range(log_n)]
    return [
        stride
        for block in range(blocks)
        for stride in (upwards if increasing_stride == (block % 2 == 0) else reversed(upwards))
    ]


def _pattern(stacks: int, a: int, d: int, is_first: bool, increasing_stride: bool) -> Pattern:
    """The pattern of one step of all stacks, of ``(a, 2, 2, d)`` for one: the first one reads one input for all."""
    if is_first:
        return Pattern(a, 2 * stacks, 2, d)
    return Pattern(a, 2, 2, d * stacks) if increasing_stride else Pattern(a * stacks, 2, 2, d)


def _axes(is_first: bool, increasing_stride: bool) -> tuple[int, ...]:
    """The order of a step's axes (stack, i, l, j, k) in the factor's ``(a, d, b, c)``."""
    if is_first:
        # There is one i (decreasing) or one l (increasing): either way b holds the rows of all stacks.
        return (1, 2, 3, 0, 4) if increasing_stride else (1, 2, 0, 3, 4)
    return (1, 2, 0, 3, 4) if increasing_stride else (0, 1, 2, 3, 4)


def _output_order(stacks: int, n: int, increasing_stride: bool) -> Tensor | None:
    """The row of the chain that each output reads, None for its own order."""
    return torch.arange(stacks * n).view(n, stacks).T.reshape(-1) if increasing_stride and stacks > 1 else None


def _difference(matrix: FactoredMatrix, stacks: int, blocks: int, log_n: int, increasing_stride: bool) -> str | None:
    """Why the matrix is not what :func:`from_butterfly` returns for these arguments; None if it is."""
    half = 2 ** (log_n - 1)
    strides = _strides(blocks, log_n, increasing_stride)
    for number, (stride, found) in enumerate(zip(strides, reversed(matrix.chain.patterns), strict=True)):
        expected = _pattern(stacks, half // stride, stride, number == 0, increasing_stride)
        if found != expected:
            return f"factor {len(strides) - number} is {tuple(found)}, expected {tuple(expected)}"
    if matrix.input_permutation is not None:
        return "its input is permuted"
    order, found_order = _output_order(stacks, 2 * half, increasing_stride), matrix.output_permutation
    if order is None:
        return None if found_order is None else "its output is permuted"
    if found_order is None or not torch.equal(found_order.cpu(), order[: matrix.out_features]):
        return f"its outputs are not in the order of {stacks} stacks"
    return None


def _twiddle(matrix: FactoredMatrix, stacks: int, blocks: int, log_n: int, increasing_stride: bool) -> Tensor:
    half = 2 ** (log_n - 1)
    steps = []
    strides = _strides(blocks, log_n, increasing_stride)
    for number, (stride, weight) in enumerate(zip(strides, reversed(matrix.weights), strict=True)):
        axes = _axes(number == 0, increasing_stride)
        sizes = (stacks, half // stride, stride, 2, 2)
        step = weight.reshape([sizes[axis] for axis in axes])
        back = [axes.index(axis) for axis in range(5)]
        steps.append(step.permute(back).reshape(stacks, half, 2, 2))
    return torch.stack(steps, dim=1).reshape(stacks, blocks, log_n, half, 2, 2)
