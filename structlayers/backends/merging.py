"""Chainable neighbours multiplied into one factor: by the compiled kernel (csrc/merge.cu) where it pays, or torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce

import torch
from torch import Tensor

from structlayers._extension import why_missing
from structlayers.backends import cuda
from structlayers.factorize import merge_weights
from structlayers.patterns import Pattern
from structlayers.problem import device_index

_library = torch.library.Library("structlayers", "FRAGMENT")
# Implemented in csrc/register.cpp: the products of runs of neighbours, so many weights each, in one launch.
_library.define("cuda_merge(Tensor[] weights, int[] lengths) -> Tensor[]")

# Of csrc/merge.h: factors in a run, runs in a launch, elements of a row of the product.
MOST_FACTORS, MOST_RUNS, MOST_ROW = 16, 4, 4096
# Multiply-adds of a run beyond which the tensor cores behind torch.matmul are ahead of one launch of plain ones.
MOST_PRODUCTS = 2**22


def fits(patterns: tuple[Pattern, ...]) -> bool:
    """Whether the compiled kernel is made for the product of these neighbours, chainable and in written order."""
    return n_products(patterns) is not None


@lru_cache(maxsize=4096)
def n_products(patterns: tuple[Pattern, ...]) -> int | None:
    """Multiply-adds of the compiled kernel; None where it is not made for these neighbours."""
    if not 1 < len(patterns) <= MOST_FACTORS:
        return None
    product, count, widest = patterns[0], 0, patterns[0].c
    for pattern in patterns[1:]:
        link = product.link(pattern)
        if link is None:
            return None
        product = link.product
        count += product.nnz * link.rank
        widest = max(widest, product.c)
    return count if widest <= MOST_ROW and count <= MOST_PRODUCTS else None


def merge(runs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The product of every run of chainable weights (a, d, b, c) in written order, as one weight each; differentiable.

    The compiled kernel rounds once; products by torch round after every factor.
    """
    products: dict[int, Tensor] = {}
    compiled = [number for number, run in enumerate(runs) if _takes_kernel(run)]
    for start in range(0, len(compiled), MOST_RUNS):
        together = compiled[start : start + MOST_RUNS]
        weights = [weight.contiguous() for number in together for weight in runs[number]]
        found = torch.ops.structlayers.cuda_merge(weights, [len(runs[number]) for number in together])
        products.update(zip(together, found, strict=True))
    return [products[number] if number in products else reduce(merge_weights, run) for number, run in enumerate(runs)]


def _takes_kernel(run: Sequence[Tensor]) -> bool:
    device = run[0].device
    if device.type != "cuda" or run[0].dtype not in cuda.DTYPES or not has_kernel():
        return False
    if cuda.why_device_does_not_serve(device_index(device)):
        return False
    # The kernel has no gradient.
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in run):
        return False
    return fits(tuple(Pattern.of_weight(weight.shape) for weight in run))


def has_kernel() -> bool:
    """Whether the compiled kernels are there, and new enough to hold this one."""
    return why_missing() is None and torch._C._dispatch_has_kernel_for_dispatch_key("structlayers::cuda_merge", "CUDA")
