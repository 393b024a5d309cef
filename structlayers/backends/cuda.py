"""The compiled kernels as a backend."""

from __future__ import annotations

import re
from functools import cache

import torch
from torch import Tensor

from structlayers._extension import built_for_sm90a, why_missing
from structlayers.backends import tuning
from structlayers.backends.base import Backend, Product
from structlayers.backends.tiles import Tile, choose_tile
from structlayers.backends.weight_grad_tiles import GradChoice, choose_grad_tile
from structlayers.errors import BackendError
from structlayers.patterns import Pattern
from structlayers.problem import ACTIVATIONS, Layout, Problem

_library = torch.library.Library("structlayers", "FRAGMENT")
# Implemented in csrc/register.cpp. x is (N, in_features), or (in_features, N) batch-last, with stride 1 in the last
# dimension; split asks for float32 accuracy from float32 inputs; tile is a number of backends/tiles.py.
_library.define(
    "cuda_product(Tensor x, Tensor weight, Tensor? bias, int out_features, bool batch_last, int activation, "
    "bool split, int tile) -> Tensor"
)
# dy is (N, out_features) and x (N, in_features), or (features, N) batch-last, both with stride 1 in the last dimension;
# a, b, c, d is the pattern; tile is a number of backends/weight_grad_tiles.py; splits cuts the batch.
_library.define(
    "cuda_weight_grad(Tensor dy, Tensor x, int a, int b, int c, int d, bool batch_last, bool split, int tile, "
    "int splits) -> Tensor"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
_TOO_LITTLE_SHARED_MEMORY = "every tile needs more shared memory than this GPU has"


def tile_of(problem: Problem) -> Tile:
    """The tile that runs ``problem``: the measured one where the tuning cache has it, else the expected one."""
    entry = tuning.lookup(problem)
    return choose_tile(problem, None if entry is None else entry.tile, built_for_sm90a())


def prepare(problem: Problem, activation: str, out_features: int, tile: Tile | None = None) -> Product:
    """The whole product, logical sizes, bias and activation included, as one kernel; ``tile`` overrides the choice."""
    kernel = torch.ops.structlayers.cuda_product.default
    number = (tile or tile_of(problem)).number
    last = problem.layout is Layout.BATCH_LAST
    split = problem.dtype == torch.float32 and not problem.tf32
    epilogue = ACTIVATIONS.index(activation)

    def product(
        x: Tensor,  # (N, in_features), batch-last (in_features, N); in_features up to a*c*d
        weight: Tensor,  # (a, d, b, c)
        bias: Tensor | None,  # (out_features,)
    ) -> Tensor:  # (N, out_features), batch-last (out_features, N)
        if not x.is_contiguous() and x.stride(1) != 1 and x.shape[1] > 1:
            x = x.contiguous()
        if bias is not None:
            bias = bias.contiguous()
        return kernel(x, weight.contiguous(), bias, out_features, last, epilogue, split, number)

    return product


def multiply(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    pattern = Pattern.of_weight(weight.shape)
    problem = Problem.on(x.device, pattern, x.shape[0 if layout is Layout.BATCH_FIRST else 1], x.dtype, layout)
    return prepare(problem, "none", pattern.out_features)(x, weight, None)


def weight_grad(
    dy: Tensor,  # (N, out_features), batch-last (out_features, N); out_features up to a*b*d
    x: Tensor,  # (N, in_features), batch-last (in_features, N); in_features up to a*c*d
    pattern: Pattern,
    layout: Layout,
    choice: GradChoice | None = None,
) -> Tensor:  # (a, d, b, c)
    """``dw[i,l,j,k] = sum_n dy[n,(i*b+j)*d+l] * x[n,(i*c+k)*d+l]``; ``choice`` overrides the tile and the splits.

    The same numbers in every run: the splits are added in order. Raises :class:`BackendError` on a GPU with less shared
    memory than any tile needs.
    """
    problem = Problem.on(x.device, pattern, x.shape[0 if layout is Layout.BATCH_FIRST else 1], x.dtype, layout)
    choice = choice or choose_grad_tile(problem, _multiprocessors(problem.device_index))
    if choice is None:
        raise BackendError(f"weight gradient of {problem}: {_TOO_LITTLE_SHARED_MEMORY}")
    dy, x = (t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous() for t in (dy, x))
    split = problem.dtype == torch.float32 and not problem.tf32
    last = layout is Layout.BATCH_LAST
    kernel = torch.ops.structlayers.cuda_weight_grad.default
    return kernel(dy, x, *pattern, last, split, choice.tile.number, choice.splits)


# What csrc/register.cpp says where PyTorch gives it no memory; the error itself does not come through the stable ABI.
_NO_MEMORY = re.compile(r"could not allocate an output of (\d+) elements")


def check_memory(error: RuntimeError, like: Tensor) -> None:
    """Raise ``torch.OutOfMemoryError``, which training loops look for, if a kernel failed for want of memory."""
    found = _NO_MEMORY.search(str(error))
    if found is not None:
        # PyTorch's own refusal, which says how much was asked for and how much there is.
        like.new_empty(int(found[1]))


@cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def reason_against(problem: Problem) -> str | None:
    if problem.device_type != "cuda":
        return f"the tensors are on {problem.device_type}: expected cuda"
    if problem.dtype not in DTYPES:
        return f"the kernels have no {problem.dtype}: expected one of {list(DTYPES)}"
    return why_missing() or why_device_does_not_serve(problem.device_index)


@cache
def why_device_does_not_serve(device: int) -> str | None:
    """None, or why the kernels have no code for that GPU."""
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}: expected at least {CAPABILITY[0]}.{CAPABILITY[1]}"
    return None


def _reason_against_weight_grad(problem: Problem) -> str | None:
    choice = choose_grad_tile(problem, _multiprocessors(problem.device_index))
    return _TOO_LITTLE_SHARED_MEMORY if choice is None else None


BACKEND = Backend(
    "cuda",
    multiply,
    reason_against,
    prepare,
    weight_grad,
    weight_grad_of_logical_sizes=True,
    reason_against_weight_grad=_reason_against_weight_grad,
)
