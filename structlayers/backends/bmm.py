"""One batched matrix product over the ``a*d`` blocks, between two permutations.

Without interleaving (d = 1) the permutations are views: input and output are read and written in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structlayers.backends.base import Backend
from structlayers.patterns import Pattern
from structlayers.problem import Layout

# Blocks with fewer rows or columns than this cost as much as those of this size (see `group_size`).
_SMALLEST_BLOCK = 16
# Making the groups costs more than it saves below this batch size.
_SMALLEST_GROUPED_BATCH = 32
# Most elements of the input or output of one piece of the batch where the factor interleaves: 2 MiB in float32.
_PIECE = 2**19


def _swap(x: Tensor, rows: int, columns: int) -> Tensor:
    """Transpose every ``(rows, columns)`` matrix of ``(n, g*rows*columns)``; no copy where rows or columns are 1."""
    n, features = x.shape
    if rows == 1 or columns == 1 or x.numel() == 0:
        return x
    if x.device.type != "cpu":
        return x.reshape(-1, rows, columns).transpose(1, 2).reshape(n, features)
    # The same permutation as a channel shuffle of channels-last images of one pixel a row: that CPU kernel is
    # vectorised and threaded, two to four times faster than copying the transposed view.
    pixels = x.reshape(1, -1, 1, rows * columns).permute(0, 3, 1, 2)
    return torch.native_channel_shuffle(pixels, rows).permute(0, 2, 3, 1).reshape(n, features)


def group_size(pattern: Pattern, n: int, device_type: str) -> int:
    """How many neighbouring blocks are multiplied as one block-diagonal block, batch-first.

    The matrix kernels of a CPU need as long for a row times a 2 x 2 block as for one times a 16 x 16 block, so small
    blocks go in groups.
    """
    if device_type != "cpu" or n < _SMALLEST_GROUPED_BATCH:
        return 1
    most = _SMALLEST_BLOCK // min(pattern.b, pattern.c)
    return max((g for g in range(1, most + 1) if pattern.n_blocks % g == 0), default=1)


def _grouped(blocks: Tensor, group: int) -> Tensor:
    """``(m, b, c)`` blocks as ``(m/g, g*b, g*c)`` block-diagonal ones."""
    if group == 1:
        return blocks
    m, b, c = blocks.shape
    out = blocks.new_zeros(m // group, group, b, group, c)
    out.diagonal(dim1=1, dim2=3).copy_(blocks.view(m // group, group, b, c).permute(0, 2, 3, 1))
    return out.view(m // group, group * b, group * c)


def _piece_rows(x: Tensor, pattern: Pattern) -> int:
    """Rows of the batch to permute and multiply at a time: on a CPU, as many as keep intermediates in its cache."""
    if x.device.type != "cpu":
        return max(1, x.shape[0])
    return max(1, _PIECE // max(pattern.in_features, pattern.out_features))


def _multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """``(n, m*columns)`` times ``(m, rows, columns)`` blocks: ``(n, m*rows)``, without a copy."""
    n, (m, rows, columns) = x.shape[0], blocks.shape
    y = x.new_empty(n, m * rows)
    torch.bmm(x.unflatten(1, (m, columns)).transpose(0, 1), blocks.mT, out=y.view(n, m, rows).transpose(0, 1))
    return y


def _multiply_batch_first(x: Tensor, blocks: Tensor, pattern: Pattern) -> Tensor:
    a, b, c, d = pattern
    if d == 1:
        return _multiply_blocks(x, blocks)
    step = _piece_rows(x, pattern)
    if x.shape[0] <= step:
        return _swap(_multiply_blocks(_swap(x, c, d), blocks), d, b)
    y = x.new_empty(x.shape[0], a * b * d)
    for piece, out in zip(x.split(step), y.split(step), strict=True):
        out.copy_(_swap(_multiply_blocks(_swap(piece, c, d), blocks), d, b))
    return y


def _multiply_batch_last(x: Tensor, blocks: Tensor, pattern: Pattern) -> Tensor:
    a, b, c, d = pattern
    n = x.shape[1]
    y = x.new_empty(a * b * d, n)
    inputs = x.unflatten(0, (a, c, d)).transpose(1, 2).reshape(a * d, c, n)  # a view if a = 1 or d = 1
    outputs = y.view(a, b, d, n).transpose(1, 2)  # (a, d, b, n)
    if a == 1 or d == 1:
        torch.bmm(blocks, inputs, out=outputs.view(a * d, b, n))
    else:
        outputs.copy_(torch.bmm(blocks, inputs).view(a, d, b, n))
    return y


def multiply(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    a, b, c, d = pattern = Pattern.of_weight(weight.shape)
    blocks = weight.reshape(a * d, b, c)
    if layout is Layout.BATCH_LAST:
        return _multiply_batch_last(x, blocks, pattern)
    return _multiply_batch_first(x, _grouped(blocks, group_size(pattern, x.shape[0], x.device.type)), pattern)


def _block_grads(dy: Tensor, x: Tensor, m: int) -> Tensor:
    """``(n, m*rows)`` and ``(n, m*columns)``, not interleaved, to ``(m, rows, columns)``."""
    rows, columns = dy.shape[1] // m, x.shape[1] // m
    return torch.bmm(dy.unflatten(1, (m, rows)).permute(1, 2, 0), x.unflatten(1, (m, columns)).transpose(0, 1))


def weight_grad(dy: Tensor, x: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    a, b, c, d = pattern
    if layout is Layout.BATCH_LAST:
        n = x.shape[1]
        lefts = dy.unflatten(0, (a, b, d)).transpose(1, 2).reshape(a * d, b, n)
        rights = x.unflatten(0, (a, c, d)).transpose(1, 2).reshape(a * d, c, n)
        return torch.bmm(lefts, rights.mT).view(pattern.weight_shape)
    group = group_size(pattern, x.shape[0], x.device.type)
    m, step = a * d // group, _piece_rows(x, pattern)
    if d == 1 or x.shape[0] <= step:
        grads = _block_grads(_swap(dy, b, d), _swap(x, c, d), m)
    else:
        total = x.new_zeros(m, group * b, group * c, dtype=torch.promote_types(x.dtype, torch.float32))
        for dy_piece, x_piece in zip(dy.split(step), x.split(step), strict=True):
            total += _block_grads(_swap(dy_piece, b, d), _swap(x_piece, c, d), m)
        grads = total.to(x.dtype)
    if group > 1:
        grads = grads.view(m, group, b, group, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return grads.reshape(pattern.weight_shape)


BACKEND = Backend("bmm", multiply, weight_grad=weight_grad)
