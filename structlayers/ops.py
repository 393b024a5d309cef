"""The operators: schemas, kernels, fake kernels, gradients, and the public functions.

Everything is registered from Python, so that it works without a compiler. How a product is computed is decided inside
the operator from the real batch size (:mod:`structlayers.plans`); a traced graph holds one opaque call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from structlayers import flops, prepared, transformed
from structlayers.backends import bmm, check_backend, resolve
from structlayers.backends.base import activate
from structlayers.backends.cuda import check_memory
from structlayers.backends.prepare import resize_features
from structlayers.patterns import Pattern
from structlayers.prepared import batch_size
from structlayers.problem import Layout, Problem, check_product, check_weight_grad

_library = torch.library.Library("structlayers", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_library.define(
    "ks_linear(Tensor x, Tensor weight, Tensor? bias, int? in_features, int? out_features, "
    "str layout, str activation, str backend) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "ks_chain(Tensor x, Tensor[] weights, Tensor? bias, int? in_features, int? out_features, "
    "str layout, str activation, str backend) -> Tensor",
    tags=_TAGS,
)
# One chain in several forms, all their weights one after the other, so many of each: the cheapest for the batch runs.
_library.define(
    "ks_frozen(Tensor x, Tensor[] weights, int[] lengths, Tensor? bias, int in_features, int out_features, "
    "str layout, str activation, str backend) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "ks_weight_grad(Tensor dy, Tensor x, int[4] weight_shape, str layout, str backend) -> Tensor", tags=_TAGS
)


# ---- kernels


def _flatten_batch(x: Tensor, layout: Layout) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if layout is Layout.BATCH_FIRST else x.reshape(x.shape[0], -1)


def _output_shape(x: Tensor, features: int, layout: str) -> list[int]:
    return [*x.shape[:-1], features] if layout == "batch_first" else [features, *x.shape[1:]]


def _problem(x: Tensor, pattern: Pattern, layout: Layout) -> Problem:
    return Problem.on(x.device, pattern, batch_size(x, layout), x.dtype, layout)


def _multiply(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, *options: Any) -> Tensor:
    product = prepared.plan(x, weights, bias, *options)
    try:
        if x.dim() == 2:
            return product(x, weights, bias)
        layout = options[2]
        y = product(_flatten_batch(x, Layout(layout)), weights, bias)
    except RuntimeError as error:
        check_memory(error, x)
        raise
    return y.reshape(_output_shape(x, y.shape[1 if layout == "batch_first" else 0], layout))


def _ks_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _multiply(x, (weight,), bias, *options)


_ks_chain = _multiply


def _ks_frozen(
    x: Tensor, weights: Sequence[Tensor], lengths: Sequence[int], bias: Tensor | None, *options: Any
) -> Tensor:
    return _multiply(x, weights, bias, *options, tuple(lengths))


def _ks_weight_grad(dy: Tensor, x: Tensor, weight_shape: Sequence[int], layout: str, backend: str) -> Tensor:
    """``dw[i,l,j,k] = sum_n dy[n,(i*b+j)*d+l] * x[n,(i*c+k)*d+l]``; missing features count as zeros."""
    pattern, order = check_weight_grad(dy, x, weight_shape, layout), Layout(layout)
    dy, x = _flatten_batch(dy, order), _flatten_batch(x, order)
    problem = _problem(x, pattern, order)
    chosen = resolve(backend, problem)
    if backend == "auto" and chosen.reason_against_weight_grad(problem) is not None:
        # Chosen for its product.
        chosen = bmm.BACKEND
    if not chosen.weight_grad_of_logical_sizes:
        dy = resize_features(dy, pattern.out_features, order)
        x = resize_features(x, pattern.in_features, order)
    try:
        return (chosen.weight_grad or bmm.weight_grad)(dy, x, pattern, order)
    except RuntimeError as error:
        check_memory(error, x)
        raise


_library.impl("ks_chain", _ks_chain, "CompositeExplicitAutograd")
_library.impl("ks_linear", _ks_linear, "CompositeExplicitAutograd")
_library.impl("ks_frozen", _ks_frozen, "CompositeExplicitAutograd")
_library.impl("ks_weight_grad", _ks_weight_grad, "CompositeExplicitAutograd")


# ---- fake kernels: shapes without data


@torch.library.register_fake("structlayers::ks_chain", lib=_library)
def _ks_chain_fake(x, weights, bias, in_features, out_features, layout, activation, backend):
    _, rows = check_product(x, weights, bias, out_features, in_features, layout, activation)
    check_backend(backend)
    return x.new_empty(_output_shape(x, rows, layout))


@torch.library.register_fake("structlayers::ks_linear", lib=_library)
def _ks_linear_fake(x, weight, *rest):
    return _ks_chain_fake(x, [weight], *rest)


@torch.library.register_fake("structlayers::ks_frozen", lib=_library)
def _ks_frozen_fake(x, weights, lengths, bias, *options):
    for form in prepared.forms(weights, lengths):
        y = _ks_chain_fake(x, form, bias, *options)
    return y


@torch.library.register_fake("structlayers::ks_weight_grad", lib=_library)
def _ks_weight_grad_fake(dy, x, weight_shape, layout, backend):
    check_weight_grad(dy, x, weight_shape, layout)
    check_backend(backend)
    return x.new_empty(weight_shape)


# ---- gradients, all of them differentiable again


def _activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        # aten's silu_backward cannot be differentiated again.
        gate = torch.sigmoid(z)
        return dy * gate * (1 + z * (1 - gate))
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _batch_sum(dy: Tensor, layout: str) -> Tensor:
    """The bias gradient: the sum over everything but the features."""
    return _flatten_batch(dy, Layout(layout)).sum(0 if layout == "batch_first" else 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, bias, ctx.in_features, ctx.out_features, ctx.layout, ctx.activation, ctx.backend = inputs
    # ReLU is the one activation whose output says where its derivative is not zero: nothing is computed again.
    kept = output if ctx.activation == "relu" else None
    ctx.save_for_backward(kept, x, bias, *([weights] if isinstance(weights, Tensor) else weights))


def _gradients(ctx: Any, dy: Tensor, weight_needs: Sequence[bool]) -> tuple[Tensor | None, list[Any], Tensor | None]:
    """Gradients of a chain product for its input, weights and bias; intermediates are computed again."""
    output, x, bias, *weights = ctx.saved_tensors
    layout, backend = ctx.layout, ctx.backend
    inputs, size = [x], ctx.in_features
    for q in range(len(weights) - 1, 0, -1):
        if ctx.activation in ("none", "relu") and not any(weight_needs[:q]):
            break
        inputs.append(_linear(inputs[-1], weights[q], None, size, None, layout, "none", backend))
        size = None
    if ctx.activation == "relu":
        dy = torch.ops.aten.threshold_backward(dy, output.detach(), 0)
    elif ctx.activation != "none":
        z = _linear(inputs[-1], weights[0], bias, size, ctx.out_features, layout, "none", backend)
        dy = _activation_backward(dy, z, ctx.activation)
    d_bias = _batch_sum(dy, layout) if bias is not None and ctx.needs_input_grad[2] else None
    d_weights: list[Any] = []
    rows = ctx.out_features
    last = len(weights) - 1
    for q, weight in enumerate(weights):
        d_weight = None
        if weight_needs[q]:
            x_q = inputs[last - q]
            d_weight = torch.ops.structlayers.ks_weight_grad(dy, x_q, weight.shape, layout, backend)
        d_weights.append(d_weight)
        if any(weight_needs[q + 1 :]) or ctx.needs_input_grad[0]:
            columns = ctx.in_features if q == last else None
            dy = _linear(dy, weight.transpose(2, 3), None, rows, columns, layout, "none", backend)
            rows = None
    return (dy if ctx.needs_input_grad[0] else None), d_weights, d_bias


def _ks_linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    d_x, (d_weight,), d_bias = _gradients(ctx, dy, [ctx.needs_input_grad[1]])
    return d_x, d_weight, d_bias, None, None, None, None, None


def _ks_chain_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    d_x, d_weights, d_bias = _gradients(ctx, dy, ctx.needs_input_grad[1])
    return d_x, d_weights, d_bias, None, None, None, None, None


def _save_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, ctx.layout, ctx.backend = inputs
    ctx.save_for_backward(dy, x)


def _ks_weight_grad_backward(ctx: Any, dw: Tensor) -> tuple[Any, ...]:
    dy, x = ctx.saved_tensors
    axis = -1 if ctx.layout == "batch_first" else 0
    rows, columns = dy.shape[axis], x.shape[axis]
    d_dy = _linear(x, dw, None, columns, rows, ctx.layout, "none", ctx.backend) if ctx.needs_input_grad[0] else None
    d_x = (
        _linear(dy, dw.transpose(2, 3), None, rows, columns, ctx.layout, "none", ctx.backend)
        if ctx.needs_input_grad[1]
        else None
    )
    return d_dy, d_x, None, None, None


torch.library.register_autograd("structlayers::ks_linear", _ks_linear_backward, setup_context=_save, lib=_library)
torch.library.register_autograd("structlayers::ks_chain", _ks_chain_backward, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "structlayers::ks_weight_grad", _ks_weight_grad_backward, setup_context=_save_weight_grad, lib=_library
)


def _save_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, ctx.lengths, bias, ctx.in_features, ctx.out_features, ctx.layout, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(output if ctx.activation == "relu" else None, x, bias, *weights)


def _ks_frozen_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Gradients for the input and the bias; the weights are constants."""
    output, x, bias, *weights = ctx.saved_tensors
    if ctx.activation == "relu":
        dy = torch.ops.aten.threshold_backward(dy, output.detach(), 0)
    elif ctx.activation != "none":
        sizes = (ctx.in_features, ctx.out_features)
        z = _frozen(x, weights, ctx.lengths, bias, *sizes, ctx.layout, "none", ctx.backend)
        dy = _activation_backward(dy, z, ctx.activation)
    d_x = None
    if ctx.needs_input_grad[0]:
        transposed = [w.transpose(2, 3) for form in prepared.forms(weights, ctx.lengths) for w in reversed(form)]
        sizes = (ctx.out_features, ctx.in_features)
        d_x = _frozen(dy, transposed, ctx.lengths, None, *sizes, ctx.layout, "none", ctx.backend)
    d_bias = _batch_sum(dy, ctx.layout) if ctx.needs_input_grad[3] else None
    return d_x, [None] * len(weights), None, d_bias, None, None, None, None, None


torch.library.register_autograd(
    "structlayers::ks_frozen", _ks_frozen_backward, setup_context=_save_frozen, lib=_library
)


for _name, _formula in flops.FORMULAS.items():
    register_flop_formula(getattr(torch.ops.structlayers, _name))(_formula)  # type: ignore[arg-type]


# ---- eager calls


class _RecordedLinear(torch.autograd.Function):
    """The ``ks_linear`` operator without PyTorch's bookkeeping around a registered one, which costs more."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _ks_linear(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_ks_linear_backward)


class _RecordedFrozen(torch.autograd.Function):
    """The ``ks_frozen`` operator, likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _ks_frozen(*inputs)
        _save_frozen(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        d_x, _, *others = _ks_frozen_backward(ctx, grads[0])
        return d_x, None, *others


def _is_plain(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a call may pass the dispatcher by: nobody traces, counts or transforms it, and no subclass takes part."""
    if torch.compiler.is_compiling():
        return False
    for parameter in parameters:
        if parameter.__class__ not in _PLAIN_TENSORS:
            return False
    return (
        x.__class__ in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
        # Tangents ride on plain tensors, which the kernels would drop.
        and forward_ad._current_level < 0
    )


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, type(None))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """The ``ks_linear`` operator, by the shortest way to it."""
    if not _is_plain(x, weight, bias):
        if transformed.is_transformed(options[-1]):
            return transformed.multiply(x, [weight], bias, *options[:-1])
        return torch.ops.structlayers.ks_linear(x, weight, bias, *options)
    if _records(x, weight, bias):
        return _RecordedLinear.apply(x, weight, bias, *options)
    return _ks_linear(x, weight, bias, *options)


def _chain(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, *options: Any) -> Tensor:
    """The ``ks_chain`` operator, likewise."""
    plain = _is_plain(x, *weights, bias)
    if not plain and transformed.is_transformed(options[-1]):
        return transformed.multiply(x, weights, bias, *options[:-1])
    if not plain or _records(x, *weights, bias):
        return torch.ops.structlayers.ks_chain(x, weights, bias, *options)
    return _multiply(x, weights, bias, *options)


def _frozen(x: Tensor, weights: Sequence[Tensor], lengths: Sequence[int], bias: Tensor | None, *options: Any) -> Tensor:
    """The ``ks_frozen`` operator, likewise."""
    if not _is_plain(x, *weights, bias):
        if transformed.is_transformed(options[-1]):
            # The factors come first.
            return transformed.multiply(x, weights[: lengths[0]], bias, *options[:-1])
        return torch.ops.structlayers.ks_frozen(x, weights, lengths, bias, *options)
    if _records(x, bias):
        return _RecordedFrozen.apply(x, weights, lengths, bias, *options)
    return _ks_frozen(x, weights, lengths, bias, *options)


def _records(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for later."""
    if not torch.is_grad_enabled():
        return False
    # A generator would cost more than the loop.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and tensor.requires_grad:
            return True
    return False


# ---- the public functions


# Asked once: torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia")
    if torch.amp.is_autocast_available(name)
)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to compute in where autocast is on."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device_type = x.device.type
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does around ``F.linear``: floating point, but not float64."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def ks_linear(
    x: Tensor,  # (..., a*c*d), batch-last (a*c*d, ...)
    weight: Tensor,  # (a, d, b, c)
    bias: Tensor | None = None,  # (a*b*d,)
    *,
    layout: str | Layout = "batch_first",
    backend: str = "auto",
    activation: str = "none",
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:  # (..., a*b*d), batch-last (a*b*d, ...)
    """Multiply by one Kronecker-sparse factor: ``y = activation(x @ K.T + bias)``.

    ``in_features`` and ``out_features`` are logical sizes: the factor is its leading ``(out, in)`` part.
    Cost: ``2*N*a*b*c*d`` FLOPs. Raises :class:`ShapeError` if ``x`` does not have ``in_features`` features (``a*c*d``
    by default), or shapes, dtypes or devices do not fit; the message has the sizes and the pattern.
    :class:`BackendError` if ``backend`` is unknown or cannot compute the problem.
    Source: Gonon et al., arXiv:2405.15013.
    """
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    layout = layout if layout.__class__ is str else Layout(layout).value
    return _linear(x, weight, bias, in_features, out_features, layout, activation, backend)


def ks_chain(
    x: Tensor,  # (..., in_features), batch-last (in_features, ...)
    weights: Sequence[Tensor],  # one (a, d, b, c) per factor, written order
    bias: Tensor | None = None,  # (out_features,)
    *,
    layout: str | Layout = "batch_first",
    backend: str = "auto",
    activation: str = "none",
    in_features: int | None = None,
    out_features: int | None = None,
    recompute: bool = False,
) -> Tensor:  # (..., out_features), batch-last (out_features, ...)
    """Multiply by a chain of factors, the last one first: ``y = activation(x @ (K_1 ... K_L).T + bias)``.

    When gradients are recorded, the input of every factor and of the activation is kept for the backward pass; with
    ``recompute=True`` only ``x`` is kept and the rest is computed again. Sizes and errors as in :func:`ks_linear`; also
    :class:`ChainError` where neighbours do not compose.
    """
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, bias = _cast(x, dtype), None if bias is None else _cast(bias, dtype)
        weights = [_cast(weight, dtype) for weight in weights]
    layout = layout if layout.__class__ is str else Layout(layout).value
    whole = recompute or not _records(x, *weights)
    if whole and len(weights) == 1:
        # PyTorch's bookkeeping is several times slower for an operator that takes a list of tensors.
        return _linear(x, weights[0], bias, in_features, out_features, layout, activation, backend)
    if whole:
        return _chain(x, weights, bias, in_features, out_features, layout, activation, backend)
    if not torch.compiler.is_compiling():
        # The factors check themselves too, but not that they form one chain of these sizes.
        check_product(x, weights, bias, out_features, in_features, layout, activation)
    y, size = x, in_features
    for weight in weights[:0:-1]:
        y = _linear(y, weight, None, size, None, layout, "none", backend)
        size = None
    if activation not in _KEEPS_ITS_INPUT:
        return _linear(y, weights[0], bias, size, out_features, layout, activation, backend)
    return activate(_linear(y, weights[0], bias, size, out_features, layout, "none", backend), activation)


# Activations whose derivative is found from their input, not from their output as ReLU's is.
_KEEPS_ITS_INPUT = ("gelu", "gelu_tanh", "silu")


def ks_frozen(
    x: Tensor,  # (..., in_features), batch-last (in_features, ...)
    weights: Sequence[Tensor],  # one (a, d, b, c) per factor of every form, form after form
    lengths: Sequence[int],
    bias: Tensor | None,  # (out_features,)
    in_features: int,
    out_features: int,
    layout: str,
    activation: str,
    backend: str,
) -> Tensor:  # (..., out_features), batch-last (out_features, ...)
    """Multiply by a chain that is held in several forms, by the one that is cheapest for the batch of ``x``.

    ``lengths``: how many weights each form has; the first form is that of the factors themselves. Differentiable in
    ``x`` and ``bias``; the weights are constants. Errors as in :func:`ks_chain`.
    """
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, bias = _cast(x, dtype), None if bias is None else _cast(bias, dtype)
        weights = [_cast(weight, dtype) for weight in weights]
    return _frozen(x, weights, lengths, bias, in_features, out_features, layout, activation, backend)
