"""Swap the linear layers of a model for factor chains, in place, by rule, and back.

Everything is planned and built before the first module is replaced, so an error leaves the model as it was; what a rule
names but cannot swap is in the report with its reason. Hugging Face's ``Conv1D`` (a linear whose weight is stored
``(in, out)``) is known by its shape, without importing transformers.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structlayers.data_aware import InputMoments, project_linear
from structlayers.epilogues import fuse_sequentials, plan_absorptions
from structlayers.errors import ChainError, ConfigError, DataError
from structlayers.formats import PermutedLinear
from structlayers.frozen import FrozenFactors
from structlayers.init import RULES as SCALES
from structlayers.nn import KSLinear
from structlayers.patterns import Chain
from structlayers.problem import Layout
from structlayers.swap_rules import Rules, SwapRule, chooser
from structlayers.values import check, one_of

__all__ = [
    "BatchLastLinear",
    "SkippedLayer",
    "SwapReport",
    "SwapRule",
    "SwappedLayer",
    "as_linear",
    "densify",
    "dress",
    "install",
    "swap_linears",
]

INITS = ("random", "project", "project_data")


@dataclass(frozen=True)
class SwappedLayer:
    """One replaced layer: weights only (the bias stays), FLOPs per row of its input."""

    name: str
    chain: Chain
    note: str = ""

    @property
    def params_before(self) -> int:
        return self.chain.dense_params

    @property
    def params_after(self) -> int:
        return self.chain.n_params

    @property
    def flops_before(self) -> int:
        return 2 * self.chain.dense_params

    @property
    def flops_after(self) -> int:
        return self.chain.flops(1)

    @property
    def kept(self) -> float:
        return self.chain.kept


class SkippedLayer(NamedTuple):
    name: str
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap_linears` did; ``str()`` is a table."""

    swapped: tuple[SwappedLayer, ...]
    skipped: tuple[SkippedLayer, ...]

    @property
    def params_before(self) -> int:
        return sum(layer.params_before for layer in self.swapped)

    @property
    def params_after(self) -> int:
        return sum(layer.params_after for layer in self.swapped)

    @property
    def flops_before(self) -> int:
        return sum(layer.flops_before for layer in self.swapped)

    @property
    def flops_after(self) -> int:
        return sum(layer.flops_after for layer in self.swapped)

    @property
    def kept(self) -> float:
        """Weights of the replaced layers after over before; 1 if none was replaced."""
        return self.params_after / self.params_before if self.swapped else 1.0

    def __str__(self) -> str:
        total = f"total of {len(self.swapped)}"
        rows = [("layer", "chain", "params", "FLOPs per row", "kept")]
        for layer in self.swapped:
            rows.append((layer.name, layer.chain.spec, *_before_after(layer)))
        rows.append((total, "", *_before_after(self)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        lines += [f"note: {layer.name}: {layer.note}" for layer in self.swapped if layer.note]
        lines += [f"skipped: {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def swap_linears(
    model: nn.Module,
    rule: Rules,
    *,
    init: str = "random",
    scale: str = "variance",
    backend: str = "auto",
    layout: str = "batch_first",
    recompute: bool = False,
    activations: Mapping[str, str] | None = None,
    moments: Mapping[str, InputMoments] | None = None,
    ridge: float = 1e-2,
) -> SwapReport:
    """Replace the linear layers that ``rule`` names by :class:`KSLinear`, in place.

    ``rule``: a :class:`SwapRule`, a mapping with its fields, the name of a structure, a list of these (the first that
    matches a name decides), or a callable ``(name, in_features, out_features) -> Chain | None``.
    ``init``: ``"random"`` (of the ``scale`` that :func:`structlayers.init.factor_std` names), ``"project"`` (an
    approximation of the weight that was there, :meth:`KSLinear.from_linear`) or ``"project_data"`` (one of the outputs
    on calibration inputs, whose ``moments`` :func:`structlayers.calibrate.collect_moments` finds, with ``ridge`` and a
    corrected bias: :func:`structlayers.data_aware.project_linear`). Otherwise bias values are kept, and always dtype,
    device, training mode and ``requires_grad``. ``backend``, ``layout`` and ``recompute`` are those of
    :class:`KSLinear`; ``layout="batch_last"`` only fits a model whose other layers read ``(features, N)``.

    A GELU, ReLU or SiLU behind a new layer becomes part of its op in ``nn.Sequential`` and in the project's own models;
    elsewhere where ``activations`` says which module it is: ``{"*.mlp.c_fc": "act"}``, as in
    :func:`structlayers.epilogues.plan_absorptions`.

    Skipped, with the reason in the report: layers whose weight has a second owner, subclasses of ``nn.Linear``, layers
    with hooks, layers whose parent's ``forward`` reads ``.weight``, chains that do not exist or keep too much.
    ``nn.TransformerEncoderLayer`` reads its children's weights only in its fused inference path, which is turned off.

    Raises :class:`ConfigError` for a rule that matches no layer, naming its patterns and the layers that exist, and for
    an unknown structure, option, ``init`` or ``scale``, or ``activations`` that do not fit; :class:`DataError` for a
    layer whose calibration is absent or too small. The model is then unchanged.
    """
    check(locals(), {"init": one_of(*INITS), "scale": one_of(*SCALES)})
    if (init == "project_data") != (moments is not None):
        given = "no moments" if moments is None else "moments"
        raise ConfigError(f"init = {init!r} with {given}: expected 'project_data' with those of collect_moments")
    if as_linear(model) is not None:
        raise ConfigError(
            f"the model itself is a {type(model).__name__}: it has no parent to swap it in; use KSLinear.from_linear"
        )
    linears = {name: linear for name, module in model.named_modules() if (linear := as_linear(module)) is not None}
    choose = chooser(rule, list(linears))
    owners = _Owners(model)
    absorptions = plan_absorptions(model, activations or {})
    options = {"init": scale, "backend": backend, "layout": layout, "recompute": recompute}

    swapped: list[SwappedLayer] = []
    skipped: list[SkippedLayer] = []
    layers: dict[str, KSLinear] = {}
    for name, linear in linears.items():
        try:
            # Constructors warn where they round a size up; that belongs into the report, once per layer.
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                chain = choose(name, linear.in_features, linear.out_features)
            owners.check(name)
        except ChainError as reason:
            skipped.append(SkippedLayer(name, str(reason)))
            continue
        with warnings.catch_warnings(record=True) as more_notes:
            warnings.simplefilter("always")
            layers[name] = _build(name, linear, chain, init, options, moments or {}, ridge)
        notes += more_notes
        swapped.append(SwappedLayer(name, chain, "; ".join(str(note.message) for note in notes)))
    install(model, layers)
    fuse_sequentials(model)
    for absorption in absorptions:
        absorption.apply()
    return SwapReport(tuple(swapped), tuple(skipped))


class BatchLastLinear(nn.Linear):
    """``nn.Linear`` on the first dimension: ``(in_features, ...)`` to ``(out_features, ...)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(0, -1)).movedim(-1, 0)


def densify(model: nn.Module) -> nn.Module:
    """Replace every :class:`KSLinear` and :class:`PermutedLinear` of a model by a dense layer of the same function.

    In place; returns the model, or the new layer where the model itself is one of these. The new layer is an
    ``nn.Linear`` whose ``weight`` is the product of the factors, rounded to their dtype; a :class:`BatchLastLinear` for
    ``layout="batch_last"``; with an activation, the linear and the activation in an ``nn.Sequential``, so that the
    names in the state dict gain ``.0``. The bias (the very parameter, but for a permuted layer), dtype, device and
    training mode are kept; the weight requires a gradient if one of the factors did. A layer in several places stays
    one layer, and layers that share all their factors share their weight.

    Raises :class:`ConfigError`, with the model unchanged, for layers that have hooks, parametrizations or a class of
    their own, which would be lost.
    """
    weights: dict[tuple[object, ...], nn.Parameter] = {}
    if isinstance(model, KSLinear | PermutedLinear):
        return _dense("", model, weights)
    layers: dict[str, nn.Module] = {}
    done: set[int] = set()
    for prefix, parent in model.named_modules():
        if isinstance(parent, PermutedLinear):
            # Replaced as a whole.
            continue
        for key, child in parent._modules.items():
            if isinstance(child, KSLinear | PermutedLinear) and id(child) not in done:
                name = f"{prefix}.{key}" if prefix else key
                layers[name] = _dense(name, child, weights)
                done.add(id(child))
    install(model, layers)
    return model


# The activations of KSLinear as modules.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


def _dense(
    name: str, old: KSLinear | PermutedLinear, weights: MutableMapping[tuple[object, ...], nn.Parameter]
) -> nn.Module:
    """The dense layer of the same function; ``weights`` holds those made so far, by the factors that they come from."""
    chained = old.linear if isinstance(old, PermutedLinear) else old
    for part in {old, chained}:
        if type(part) not in (KSLinear, PermutedLinear) or "forward" in part.__dict__:
            raise ConfigError(f"{name!r} is a {type(part).__name__} with behaviour of its own, which would be lost")
        if any(getattr(part, hooks) for hooks in _HOOKS):
            raise ConfigError(f"{name!r} has hooks, which would be lost: remove them first")
    if type(chained.factors) not in (nn.ParameterList, FrozenFactors):
        raise ConfigError(f"{name!r} has parametrized factors, which would be lost: remove the parametrizations first")
    key = (*map(id, chained.factors), old.in_features, old.out_features, id(old) if old is not chained else None)
    if key not in weights:
        first = chained.factors[0]
        with torch.no_grad():
            product = first.new_empty(old.out_features, old.in_features) if first.is_meta else old.to_dense()
        needs_grad = any(factor.requires_grad for factor in chained.factors)
        weights[key] = nn.Parameter(product.contiguous(), requires_grad=needs_grad)
    kind = nn.Linear if Layout(chained.layout) is Layout.BATCH_FIRST else BatchLastLinear
    linear = kind(old.in_features, old.out_features, bias=False, device="meta")
    linear.weight = weights[key]
    if isinstance(old, KSLinear):
        linear.bias = old.bias
    elif old.bias is not None:
        linear.bias = nn.Parameter(old.bias.detach().clone(), requires_grad=old.linear.bias.requires_grad)
    new = linear if chained.activation == "none" else nn.Sequential(linear, _ACTIVATIONS[chained.activation]())
    return new.train(old.training)


def as_linear(module: nn.Module) -> nn.Linear | None:
    """The layer as an ``nn.Linear`` (a Hugging Face ``Conv1D`` through a transposed view of its weight), else None."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, nn.Parameter):
        return None
    if weight.dim() != 2 or weight.shape[1] != getattr(module, "nf", None):
        return None
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias)
    return linear.train(module.training)


def install(model: nn.Module, layers: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put ``layers`` in the place of the modules of those names, wherever they are registered.

    PyTorch's fused transformer path reads ``linear1.weight`` itself: it is turned off where it would meet a new layer.
    Returns a function that puts everything back.
    """
    new_by_old = {id(model.get_submodule(name)): new for name, new in layers.items()}
    former: list[tuple[MutableMapping[str, Any], str, Any]] = []

    def put(table: MutableMapping[str, Any], key: str, value: Any) -> None:
        former.append((table, key, table[key]))
        table[key] = value

    parents = list(model.modules())
    touched: set[int] = set()
    for parent in parents:
        for key, child in list(parent._modules.items()):
            if id(child) in new_by_old:
                put(parent._modules, key, new_by_old[id(child)])
                if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu:
                    put(parent.__dict__, "activation_relu_or_gelu", 0)
                    touched.add(id(parent))
    for parent in parents:
        if isinstance(parent, nn.TransformerEncoder) and any(id(layer) in touched for layer in parent.layers):
            put(parent.__dict__, "use_nested_tensor", False)

    def undo() -> None:
        for table, key, value in reversed(former):
            table[key] = value

    return undo


def dress(new: KSLinear, old: nn.Linear) -> KSLinear:
    """Give ``new`` the training mode and the ``requires_grad`` of the layer that it replaces."""
    new.train(old.training)
    for factor in new.factors:
        factor.requires_grad_(old.weight.requires_grad)
    if new.bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)
    return new


class _Owners:
    """Who holds which module and parameter of a model, to refuse what a swap would break."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.holders = Counter(id(child) for m in model.modules() for child in m._modules.values())
        self.names: dict[object, list[str]] = {}
        for prefix, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.names.setdefault(_memory(parameter), []).append(f"{prefix}.{key}" if prefix else key)

    def check(self, name: str) -> None:
        """Raise :class:`ChainError`, with the reason, if the layer of that name cannot be replaced."""
        path, _, child = name.rpartition(".")
        parent, layer = self.model.get_submodule(path), self.model.get_submodule(name)
        # Those two are read in the fused path only, which install() turns off.
        is_fast_path = isinstance(parent, nn.TransformerEncoderLayer) and child in ("linear1", "linear2")
        if isinstance(parent, nn.MultiheadAttention) or (not is_fast_path and _reads_weight(type(parent), child)):
            raise ChainError(f"its parent {type(parent).__name__} reads {child}.weight instead of calling it")
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            raise ChainError(f"{type(layer).__name__} is a subclass of Linear: its own behaviour would be lost")
        if self.holders[id(layer)] > 1:
            raise ChainError(f"the same module is registered in {self.holders[id(layer)]} places")
        for key, parameter in layer._parameters.items():
            owners = [] if parameter is None else self.names[_memory(parameter)]
            others = [other for other in owners if other != f"{name}.{key}"]
            if others:
                raise ChainError(f"its {key} is tied to {', '.join(others)}")
        extra = [*layer._modules, *layer._buffers, *(key for key in layer._parameters if key not in ("weight", "bias"))]
        if extra:
            raise ChainError(f"it holds more than weight and bias: {', '.join(extra)}")
        if "forward" in layer.__dict__ or any(getattr(layer, hooks) for hooks in _HOOKS):
            raise ChainError("it has hooks or its own forward (weight norm, offloading, ...), which would be lost")
        weight = layer._parameters.get("weight")
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            kind = f"{type(layer.weight).__name__} of {getattr(layer.weight, 'dtype', None)}"
            raise ChainError(f"its weight is a {kind}: expected a plain floating-point Parameter")


def _memory(parameter: Tensor) -> object:
    """Equal for two parameters that are one, or one tensor: ``nn.Parameter(other)`` is tied to ``other`` too."""
    # Others may have no address, or one that says nothing.
    if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    return (parameter.device, parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@cache
def _forward_source(cls: type) -> str:
    """The source of every ``forward`` that a class defines or inherits; empty where there is none to read."""
    sources = []
    for base in cls.__mro__:
        if base is not nn.Module and "forward" in base.__dict__:
            try:
                sources.append(inspect.getsource(base.__dict__["forward"]))
            except (OSError, TypeError):
                continue
    return "\n".join(sources)


def _reads_weight(parent: type, child: str) -> bool:
    return re.search(rf"\bself\.{re.escape(child)}\.weight\b", _forward_source(parent)) is not None


def _build(
    name: str,
    old: nn.Linear,
    chain: Chain,
    init: str,
    options: Mapping[str, Any],
    moments: Mapping[str, InputMoments],
    ridge: float,
) -> KSLinear:
    if init != "random" and old.weight.is_meta:
        raise ConfigError(f"init = {init!r} with weights on the meta device: expected values to project, or 'random'")
    if init == "project":
        return KSLinear.from_linear(old, chain, **options)
    weights: list[Tensor] = []
    bias: Tensor | None = old.bias
    if init == "project_data":
        if name not in moments:
            known = ", ".join(list(moments)[:5]) or "no layer"
            raise DataError(f"no calibration of {name}: the moments are of {known}{', ...' * (len(moments) > 5)}")
        try:
            weights, bias = project_linear(old, chain, moments[name], ridge=ridge)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    new = KSLinear(chain, bias=bias is not None, device=old.weight.device, dtype=old.weight.dtype, **options)
    with torch.no_grad():
        for q, weight in enumerate(weights):
            new.factors[q].copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return dress(new, old)


def _before_after(counts: SwappedLayer | SwapReport) -> tuple[str, str, str]:
    return (
        f"{counts.params_before:,} -> {counts.params_after:,}",
        f"{counts.flops_before:,} -> {counts.flops_after:,}",
        f"{counts.kept:.1%}",
    )
