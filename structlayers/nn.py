"""Structured linear layers as modules."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structlayers.backends import check_backend
from structlayers.errors import ChainError, ConfigError, ShapeError
from structlayers.factorize import factorize, to_dense
from structlayers.frozen import FreezeReport, FrozenFactors
from structlayers.init import RULES, init_factors_
from structlayers.ops import ks_chain, ks_frozen
from structlayers.patterns import Chain
from structlayers.plans import ChainProblem, Plan, choose_form
from structlayers.problem import ACTIVATIONS, Layout


class KSLinear(nn.Module):
    """A linear layer ``y = activation(x W^T + bias)`` whose weight is a chain ``W = K_1 ... K_L``, for ``nn.Linear``.

    Input ``(..., in_features)``, output ``(..., out_features)``; batch-last, ``(in_features, ...)`` and
    ``(out_features, ...)``. Parameters: ``factors.0`` to ``factors.{L-1}`` in written order, each ``(a, d, b, c)``, and
    ``bias`` ``(out_features,)``, whatever the backend.

    ``chain``: a :class:`Chain` or the text that :meth:`Chain.parse` reads. ``init``: a rule of
    :func:`structlayers.init.factor_std`. ``recompute``: keep only the input for the backward pass.
    :meth:`freeze` trades the factors' being parameters for speed.
    Raises :class:`ChainError`, :class:`BackendError` or ``ValueError`` on an argument that names nothing known.
    """

    def __init__(
        self,
        chain: Chain | str,
        bias: bool = True,
        backend: str = "auto",
        layout: str | Layout = "batch_first",
        activation: str = "none",
        init: str = "variance",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.chain = Chain.parse(chain) if isinstance(chain, str) else chain
        if not isinstance(self.chain, Chain):
            raise ChainError(f"chain = {chain!r}: expected a Chain or its text")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation = {activation!r}: expected one of {list(ACTIVATIONS)}")
        if init not in RULES:
            raise ValueError(f"init = {init!r}: expected one of {list(RULES)}")
        self.in_features = self.chain.in_features
        self.out_features = self.chain.out_features
        self.backend = check_backend(backend)
        self.layout = Layout(layout).value
        self.activation = activation
        self.init = init
        self.recompute = recompute
        self.factors: nn.ParameterList | FrozenFactors = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self.chain.weight_shapes
        )
        self._names = tuple(str(q) for q in range(len(self.chain)))
        # The activation of the module behind this one, where it was left to this one's op (epilogues.py), and what now
        # stands in its place there; no module below this one.
        self.absorbed = "none"
        self.absorber: Any = None
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new factors by the rule ``init``, and a bias as ``nn.Linear`` does; unfreezes."""
        self.unfreeze()
        init_factors_(list(self.factors), self.chain, self.init)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """The product; ``activation``, where given, follows it in place of the layer's own."""
        if activation is None:
            activation = self.absorbed if self.absorbs else self.activation
        frozen = self._frozen_for_call()
        if frozen is not None:
            options = (self.in_features, self.out_features, self.layout, activation, self.backend)
            return ks_frozen(x, frozen.tensors, frozen.lengths, self.bias, *options)
        return ks_chain(
            x,
            self._weights(),
            self.bias,
            layout=self.layout,
            backend=self.backend,
            activation=activation,
            in_features=self.in_features,
            out_features=self.out_features,
            recompute=self.recompute,
        )

    def _weights(self) -> list[Tensor]:
        """The factors; by the names under which they are registered, which is quicker than asking the list."""
        if not torch.compiler.is_compiling():
            registered = self._modules["factors"]._parameters  # type: ignore[union-attr]
            try:
                return [registered[name] for name in self._names]  # type: ignore[misc]
            except KeyError:
                # Parametrized: the values are made on access.
                pass
        return list(self.factors)

    @property
    def absorbs(self) -> bool:
        """Whether a call computes the activation of the module behind it too.

        Not while hooks watch the product, nor once this layer or that module is wrapped, replaced or taken elsewhere:
        what comes between the two reads the product itself.
        """
        if self.absorbed == "none" or self.absorber is None:
            return False
        return self.absorber.is_in_place() and self.activation == "none" and not has_hooks(self)

    # ---- freezing

    @property
    def is_frozen(self) -> bool:
        return isinstance(self.factors, FrozenFactors)

    def freeze(self, max_bytes: int | None = None, batches: Sequence[int] | None = None) -> FreezeReport:
        """Hold the factors, and what is derived from them, as constants; returns what that is.

        Derived are products of neighbouring factors or the dense weight, whatever is expected to be fast over
        ``batches`` (powers of two up to 65,536 by default) on this device and in this dtype, and no slower than a dense
        layer; they take at most ``max_bytes``, by default those of the dense weight. The factors stay in the state dict
        under their names but are no parameters any more. ``load_state_dict``, changes of dtype or device, ``train()``,
        ``reset_parameters``, ``requires_grad_(True)`` and a change of the former parameters by whoever still holds them
        unfreeze the layer; what else would change the factors raises. Inputs and the bias get their gradients.

        Raises :class:`ConfigError` for a limit or batches that are no such numbers, and for factors that are
        parametrized, sharded or on the meta device.
        """
        self.unfreeze()
        if type(self.factors) is not nn.ParameterList:
            raise ConfigError(f"the factors are a {type(self.factors).__name__}: expected plain parameters to freeze")
        frozen = FrozenFactors(list(self.factors), self.chain, Layout(self.layout), max_bytes, batches)
        self.factors = frozen.train(self.training)
        return frozen.report

    def unfreeze(self) -> KSLinear:
        """Make the factors parameters again, the very ones where somebody still holds them; returns the layer."""
        if isinstance(self.factors, FrozenFactors):
            self.factors = self.factors.thaw().train(self.training)
        return self

    def _unfreeze_for(self, reason: str) -> None:
        self.unfreeze()
        warnings.warn(f"{self!r} is not frozen any more: {reason}; call freeze() again", stacklevel=3)

    def _frozen_for_call(self) -> FrozenFactors | None:
        """The frozen factors, unless there are none or they are not what the layer should compute with any more."""
        factors = self._modules["factors"]
        if not isinstance(factors, FrozenFactors):
            return None
        if not torch.compiler.is_compiling() and factors.was_overtaken():
            self._unfreeze_for("its former parameters were changed")
            return None
        return factors

    def train(self, mode: bool = True) -> KSLinear:
        """As for any module; ``train(True)`` unfreezes, so that training never goes on with constant factors."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> KSLinear:
        """As for any module; ``requires_grad_(True)`` unfreezes."""
        if requires_grad:
            self.unfreeze()
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KSLinear:
        # What to(), half(), cuda(), to_empty() and share_memory() go through.
        frozen = self.factors
        if not isinstance(frozen, FrozenFactors):
            return super()._apply(fn, recurse)
        self.unfreeze()
        before = [_identity(factor) for factor in self.factors]
        super()._apply(fn, recurse)
        if [_identity(factor) for factor in self.factors] == before:
            self.factors = frozen
        else:
            self._unfreeze_for("its factors were moved or converted")
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        if self.is_frozen and any(key.startswith(f"{prefix}factors.") for key in state_dict):
            self._unfreeze_for("new factors were loaded")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def to_dense(self) -> Tensor:
        """The weight as a dense ``(out_features, in_features)`` matrix; differentiable."""
        return to_dense(list(self.factors), self.in_features, self.out_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear, chain: Chain | str, **options: Any) -> KSLinear:
        """A layer near ``linear``: factors by block SVD (exact optimum for chains of one or two), the same bias.

        Keeps dtype, device, training mode and ``requires_grad``. Raises :class:`ShapeError` if the sizes differ.
        """
        chain = Chain.parse(chain) if isinstance(chain, str) else chain
        if not isinstance(chain, Chain):
            raise ChainError(f"chain = {chain!r}: expected a Chain or its text")
        if (chain.in_features, chain.out_features) != (linear.in_features, linear.out_features):
            raise ShapeError(
                f"chain {chain.spec} maps {chain.in_features} -> {chain.out_features} features: "
                f"expected {linear.in_features} -> {linear.out_features}"
            )
        weights = factorize(linear.weight, chain).weights
        layer = cls(
            chain,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **options,
        )
        with torch.no_grad():
            for factor, weight in zip(layer.factors, weights, strict=True):
                factor.copy_(weight)
                factor.requires_grad_(linear.weight.requires_grad)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
                layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    # ---- what will run

    def plan(self, n: int, mode: str | None = None) -> Plan:
        """How a batch of ``n`` rows is computed, in the layer's dtype and on its device.

        ``mode`` as for :func:`structlayers.plans.plan`; by default that of the next call: "training" where the factors'
        inputs are kept for their gradients, else "inference". A frozen layer's plan is that of the form which it holds
        for such a batch.
        """
        first, layout = self.factors[0], Layout(self.layout)
        problem = ChainProblem.on(first.device, self.chain, n, first.dtype, layout)
        if isinstance(self.factors, FrozenFactors):
            chains = [form.chain for form in self.factors.report.forms]
            return choose_form(chains, problem, self.backend)[1]
        if mode is None:
            records = torch.is_grad_enabled() and any(factor.requires_grad for factor in self.factors)
            mode = "training" if records and not self.recompute else "inference"
        return self.chain.plan(n, first.dtype, first.device, layout, mode, self.backend)

    def explain(self, n: int) -> str:
        """What a call with a batch of ``n`` rows will do, as text: steps, backends, expected times, what is frozen."""
        text = self.plan(n).explain()
        return f"{text}\nfrozen: {self.factors.report}" if isinstance(self.factors, FrozenFactors) else text

    def resolved_backends(self, n: int) -> list[str]:
        """What computes each factor for a batch of ``n`` outside training, in written order."""
        return self.plan(n, "inference").backends

    def __repr__(self) -> str:
        # One line: the factors' shapes are in the product that is printed.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, {self.chain}, bias={self.bias is not None}, "
            f"kept={self.chain.kept:.1%}, backend={self.backend!r}"
            + (f", activation={self.activation!r}" if self.activation != "none" else "")
            + (f", layout={self.layout!r}" if self.layout != "batch_first" else "")
            + (", frozen" if self.is_frozen else "")
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module, and would see another value if a neighbour were computed with it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version)


# ---- whole models


@dataclass(frozen=True)
class ModelFreezeReport:
    """What :func:`freeze` made of a model, layer by layer; ``str()`` is a list."""

    layers: tuple[tuple[str, FreezeReport], ...]

    @property
    def factor_bytes(self) -> int:
        return sum(report.factor_bytes for _, report in self.layers)

    @property
    def derived_bytes(self) -> int:
        return sum(report.derived_bytes for _, report in self.layers)

    def __str__(self) -> str:
        lines = [f"{name}: {report}" if name else str(report) for name, report in self.layers]
        total = f"{self.derived_bytes:,} bytes derived beside {self.factor_bytes:,} of the factors"
        return "\n".join([*lines, f"{len(self.layers)} layers: {total}"])


def freeze(model: nn.Module, max_bytes: int | None = None, batches: Sequence[int] | None = None) -> ModelFreezeReport:
    """:meth:`KSLinear.freeze` for every layer of a model; the limit is that of each layer.

    Raises :class:`ConfigError` for a model without such a layer, and what the layers raise; all of them are then as
    they were, but for those that were frozen before, which are not any more. Layers that share factors share them again
    when they are unfrozen.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KSLinear)}
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no structured layer: expected at least one to freeze")
    unfreeze(model)
    # What layers share is held until all of them are frozen, so that it is known as one parameter to each.
    parameters = [parameter for layer in layers.values() for parameter in layer.factors.parameters()]
    counts = Counter(map(id, parameters))
    shared = [parameter for parameter in parameters if counts[id(parameter)] > 1]
    del parameters
    former: dict[int, Any] = {}
    reports = []
    try:
        for name, layer in layers.items():
            reports.append((name, layer.freeze(max_bytes, batches)))
            if isinstance(layer.factors, FrozenFactors):
                layer.factors.share(former)
    except BaseException:
        unfreeze(model)
        raise
    del shared
    return ModelFreezeReport(tuple(reports))


def unfreeze(model: nn.Module) -> nn.Module:
    """:meth:`KSLinear.unfreeze` for every layer of a model; returns the model."""
    for module in model.modules():
        if isinstance(module, KSLinear):
            module.unfreeze()
    return model


class StructuredMLP(nn.Module):
    """Two structured layers with an activation between them, which is part of the first one's op.

    Input ``(..., up.in_features)``, output ``(..., down.out_features)``. ``up`` and ``down``: chains or their texts;
    ``options`` are those of :class:`KSLinear`, for both. Raises :class:`ShapeError` if the sizes between them differ.
    """

    def __init__(self, up: Chain | str, down: Chain | str, activation: str = "gelu", **options: Any) -> None:
        super().__init__()
        self.up = KSLinear(up, activation=activation, **options)
        self.down = KSLinear(down, **options)
        if self.up.out_features != self.down.in_features:
            raise ShapeError(
                f"up = {self.up.chain.spec} writes {self.up.out_features} features but down = {self.down.chain.spec} "
                f"reads {self.down.in_features}: expected as many"
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))
