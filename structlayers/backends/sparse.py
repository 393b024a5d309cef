"""PyTorch's sparse formats: CSR on the interleaved matrix, BSR on the de-interleaved one."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from structlayers.backends.base import Backend
from structlayers.patterns import Pattern
from structlayers.problem import Layout, Problem


def _sparse_mm(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x``; the sparse kernels want both operands dense in memory."""
    if x.shape[1] == 0:
        return x.new_empty(matrix.shape[0], 0)
    return torch.mm(matrix, x.contiguous())


def _compressed(
    layout: torch.layout, pointers: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]
) -> Tensor:
    with warnings.catch_warnings():
        # torch says once per process that its compressed formats are in beta.
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        return torch.sparse_compressed_tensor(
            pointers, columns, values, size=size, layout=layout, check_invariants=False
        )


def csr_weight(weight: Tensor) -> Tensor:
    """The factor as a CSR matrix ``(a*b*d, a*c*d)``, rows in the order of the pattern."""
    a, b, c, d = pattern = Pattern.of_weight(weight.shape)
    device = weight.device
    i, l = torch.arange(a, device=device), torch.arange(d, device=device)
    k = torch.arange(c, device=device)
    # columns[i, j, l, k] = (i*c + k)*d + l, the same for every j
    columns = ((i.view(a, 1, 1) * c + k) * d + l.view(d, 1)).view(a, 1, d, c).expand(a, b, d, c).reshape(-1)
    pointers = torch.arange(0, pattern.nnz + 1, c, device=device)
    values = weight.permute(0, 2, 1, 3).reshape(-1)
    return _compressed(torch.sparse_csr, pointers, columns, values, (pattern.out_features, pattern.in_features))


def bsr_weight(weight: Tensor) -> Tensor:
    """The de-interleaved factor, block-diagonal with ``a*d`` blocks, as BSR with square blocks of ``gcd(b, c)``."""
    a, b, c, d = pattern = Pattern.of_weight(weight.shape)
    # The sparse kernels know square blocks only.
    g = math.gcd(b, c)
    rows, across = b // g, c // g
    block = torch.arange(a * d, device=weight.device).view(a * d, 1, 1)
    columns = (block * across + torch.arange(across, device=weight.device)).expand(a * d, rows, across).reshape(-1)
    pointers = torch.arange(0, a * d * rows * across + 1, across, device=weight.device)
    values = weight.reshape(a * d, rows, g, across, g).transpose(2, 3).reshape(-1, g, g)
    return _compressed(torch.sparse_bsr, pointers, columns, values, (pattern.out_features, pattern.in_features))


def multiply_csr(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    matrix = csr_weight(weight)
    if layout is Layout.BATCH_FIRST:
        return _sparse_mm(matrix, x.T).T
    return _sparse_mm(matrix, x)


def multiply_bsr(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    a, b, c, d = Pattern.of_weight(weight.shape)
    features_first = x.T if layout is Layout.BATCH_FIRST else x
    n = features_first.shape[1]
    inputs = features_first.unflatten(0, (a, c, d)).transpose(1, 2).reshape(a * d * c, n)
    y = _sparse_mm(bsr_weight(weight), inputs)
    y = y.view(a, d, b, n).transpose(1, 2).reshape(a * b * d, n)
    return y.T if layout is Layout.BATCH_FIRST else y


def _reason_against(problem: Problem) -> str | None:
    if problem.device_type == "cpu" and problem.dtype in (torch.float16, torch.bfloat16):
        return f"torch's sparse CPU kernels have no {problem.dtype}"
    return None


CSR = Backend("csr", multiply_csr, _reason_against)
BSR = Backend("bsr", multiply_bsr, _reason_against)
