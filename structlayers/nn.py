"""Structured linear layers as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structlayers.backends import check_backend, resolve
from structlayers.errors import ChainError, ShapeError
from structlayers.factorize import factorize, to_dense
from structlayers.init import RULES, init_factors_
from structlayers.ops import ks_chain
from structlayers.patterns import Chain
from structlayers.problem import ACTIVATIONS, Layout, Problem


class KSLinear(nn.Module):
    """A linear layer ``y = activation(x W^T + bias)`` whose weight is a chain ``W = K_1 ... K_L``, for ``nn.Linear``.

    Input ``(..., in_features)``, output ``(..., out_features)``; batch-last, ``(in_features, ...)`` and
    ``(out_features, ...)``. Parameters: ``factors.0`` to ``factors.{L-1}`` in written order, each ``(a, d, b, c)``, and
    ``bias`` ``(out_features,)``, whatever the backend.

    ``chain``: a :class:`Chain` or the text that :meth:`Chain.parse` reads. ``init``: a rule of
    :func:`structlayers.init.factor_std`. ``recompute``: keep only the input for the backward pass.
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
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self.chain.weight_shapes
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new factors by the rule ``init``, and a bias as ``nn.Linear`` does."""
        init_factors_(list(self.factors), self.chain, self.init)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return ks_chain(
            x,
            list(self.factors),
            self.bias,
            layout=self.layout,
            backend=self.backend,
            activation=self.activation,
            in_features=self.in_features,
            out_features=self.out_features,
            recompute=self.recompute,
        )

    def to_dense(self) -> Tensor:
        """The weight as a dense ``(out_features, in_features)`` matrix; differentiable."""
        return to_dense(list(self.factors), self.in_features, self.out_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear, chain: Chain | str, **options: Any) -> KSLinear:
        """A layer near ``linear``: factors by block SVD (exact optimum for chains of one or two), the same bias.

        Keeps dtype, device, training mode and ``requires_grad``. Raises :class:`ShapeError` if the sizes differ.
        """
        chain = Chain.parse(chain) if isinstance(chain, str) else chain
        if (chain.in_features, chain.out_features) != (linear.in_features, linear.out_features):
            raise ShapeError(
                f"chain {chain.spec} maps {chain.in_features} -> {chain.out_features} features: "
                f"expected {linear.in_features} -> {linear.out_features}"
            )
        weights = factorize(linear.weight.detach(), chain)
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

    def resolved_backends(self, n: int) -> list[str]:
        """The backend that computes each factor for a batch of ``n``, in written order."""
        dtype, device = self.factors[0].dtype, self.factors[0].device
        problems = [Problem.on(device, p, n, dtype, Layout(self.layout)) for p in self.chain]
        return [resolve(self.backend, problem).name for problem in problems]

    def __repr__(self) -> str:
        # One line: the factors' shapes are in the product that is printed.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, {self.chain}, bias={self.bias is not None}, "
            f"kept={self.chain.kept:.1%}, backend={self.backend!r}"
            + (f", activation={self.activation!r}" if self.activation != "none" else "")
            + (f", layout={self.layout!r}" if self.layout != "batch_first" else "")
        )
