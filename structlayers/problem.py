"""The problem that a backend is given, and the one check of what may be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache

import torch
from torch import Tensor

from structlayers.errors import ChainError, ShapeError
from structlayers.patterns import Chain, Pattern


class Layout(str, Enum):
    """Where the batch is: ``(N, features)``, PyTorch's habit, or ``(features, N)``."""

    BATCH_FIRST = "batch_first"
    BATCH_LAST = "batch_last"

    @classmethod
    def _missing_(cls, value: object) -> Layout:
        raise ValueError(f"layout = {value!r}: expected one of {[layout.value for layout in cls]}")


# What may follow the product in the same op. "gelu_tanh" is GELU's tanh approximation.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Problem:
    """One product with one factor: all that the choice of a backend may depend on."""

    pattern: Pattern
    n: int
    dtype: torch.dtype
    device_type: str
    layout: Layout
    # Whether float32 products may round their operands to TF32.
    tf32: bool = False
    # Which of the GPUs, and its compute capability: they may differ.
    device_index: int = 0
    capability: tuple[int, int] = (8, 0)

    @classmethod
    def on(cls, device: torch.device, pattern: Pattern, n: int, dtype: torch.dtype, layout: Layout) -> Problem:
        """The problem of tensors on ``device``, under the present ``torch.get_float32_matmul_precision()``."""
        if device.type != "cuda":
            return cls(pattern, n, dtype, device.type, layout)
        tf32 = dtype == torch.float32 and rounds_to_tf32()
        index = device_index(device)
        return cls(pattern, n, dtype, device.type, layout, tf32, index, _capability(index))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{tuple(self.pattern)}, n={self.n}, {dtype}, {self.layout.value}, {self.device_type}"


def rounds_to_tf32() -> bool:
    """Whether float32 matrix products on a GPU may round their operands to TF32, by torch's older or newer settings."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # The older getter refuses once the newer settings contradict it.
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def device_index(device: torch.device) -> int:
    """The number of a CUDA device: that of the current one where ``device`` names none."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@lru_cache(maxsize=4096)
def _patterns_of(shapes: tuple[tuple[int, ...], ...]) -> tuple[Pattern, ...]:
    return Chain([Pattern.of_weight(shape) for shape in shapes]).patterns


def check_product(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int | None,
    in_features: int | None,
    layout: str,
    activation: str,
) -> tuple[tuple[Pattern, ...], int]:
    """The patterns of a chain product and its logical output size; used by the kernels and the fake kernels alike.

    Raises :class:`ShapeError` where a tensor does not fit, naming the sizes and the pattern, and
    :class:`ChainError` where the weights are no chain.
    """
    if layout not in ("batch_first", "batch_last"):
        Layout(layout)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: expected one of {list(ACTIVATIONS)}")
    if not weights:
        raise ChainError("chain of 0 weights: expected at least one")
    patterns = _patterns_of(tuple(tuple(int(size) for size in w.shape) for w in weights))
    reads, writes = patterns[-1].in_features, patterns[0].out_features
    expected = reads if in_features is None else in_features
    axis = -1 if layout == "batch_first" else 0
    if x.dim() == 0 or x.shape[axis] != expected:
        raise ShapeError(
            f"x of shape {tuple(x.shape)}: expected {expected} features in dimension {axis} ({layout}) "
            f"for {_spec(patterns)}"
        )
    if not 1 <= expected <= reads:
        raise ShapeError(f"in_features = {expected}: expected 1 to {reads}, the columns of {_spec(patterns)}")
    rows = writes if out_features is None else out_features
    if not 1 <= rows <= writes:
        raise ShapeError(f"out_features = {rows}: expected 1 to {writes}, the rows of {_spec(patterns)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ShapeError(f"bias of shape {tuple(bias.shape)}: expected ({rows},) for {_spec(patterns)}")
    for name, tensor in (*((f"weight {q}", w) for q, w in enumerate(weights, start=1)), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ShapeError(f"{name} has dtype {tensor.dtype} but x has {x.dtype}: expected one dtype")
        if tensor.device != x.device:
            raise ShapeError(f"{name} is on {tensor.device} but x is on {x.device}: expected one device")
    if not x.dtype.is_floating_point:
        raise ShapeError(f"x has dtype {x.dtype}: expected a floating-point dtype")
    return patterns, rows


def check_weight_grad(dy: Tensor, x: Tensor, weight_shape: Sequence[int], layout: str) -> Pattern:
    """The pattern of a weight gradient; raises :class:`ShapeError` where a tensor does not fit."""
    pattern = Pattern.of_weight(weight_shape)
    axis = -1 if Layout(layout) is Layout.BATCH_FIRST else 0
    for name, tensor, most in (("dy", dy, pattern.out_features), ("x", x, pattern.in_features)):
        if tensor.dim() == 0 or tensor.shape[axis] > most:
            raise ShapeError(
                f"{name} of shape {tuple(tensor.shape)}: "
                f"expected at most {most} features in dimension {axis} ({layout}) for {tuple(pattern)}"
            )
    batches = [tensor.shape[:-1] if axis == -1 else tensor.shape[1:] for tensor in (dy, x)]
    if batches[0] != batches[1]:
        raise ShapeError(f"dy of shape {tuple(dy.shape)} and x of shape {tuple(x.shape)}: expected one batch")
    return pattern


def _spec(patterns: Sequence[Pattern]) -> str:
    return "".join(f"({p.a},{p.b},{p.c},{p.d})" for p in patterns)
