"""One model in the variants that are timed: other backends, written out dense, with an epilogue, with free linears."""

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from structlayers.backends import check_backend
from structlayers.epilogues import FusedSequential, epilogue_of
from structlayers.models.transformer import FeedForward
from structlayers.nn import KSLinear, freeze
from structlayers.patterns import Chain
from structlayers.problem import Layout

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


def structured_layers(model: nn.Module) -> dict[str, KSLinear]:
    """The structured layers of ``model`` by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KSLinear)}


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with every structured layer written out as an ``nn.Linear``: equal outputs, dense cost."""
    return _replaced(model, _dense_layer)


def with_backend(model: nn.Module, backend: str, layout: str = "batch_first") -> nn.Module:
    """A copy of ``model`` whose structured layers run on ``backend``.

    With layout "batch_last" every structured layer is given its input transposed, and transposes its output back: the
    model around it stays batch-first, and pays for that.
    """

    def convert(layer: KSLinear) -> nn.Module:
        layer = copy.deepcopy(layer)
        layer.backend, layer.layout = check_backend(backend), layout
        return layer if layout == Layout.BATCH_FIRST.value else _BatchLast(layer)

    return _replaced(model, convert)


def oracle(model: nn.Module) -> nn.Module:
    """The reference model: float64, every structured layer on the backend "reference"."""
    return with_backend(model, "reference").double()


def as_one_factor(model: nn.Module, backend: str) -> nn.Module:
    """The dense twin, computed by ``backend`` as one factor (1, m, n, 1): what the arithmetic alone brings."""

    def convert(layer: KSLinear) -> nn.Module:
        chain = Chain.dense(layer.in_features, layer.out_features)
        factor = layer.factors[0]
        new = KSLinear(
            chain,
            bias=layer.bias is not None,
            backend=check_backend(backend),
            activation=layer.activation,
            device=factor.device,
            dtype=factor.dtype,
        )
        with torch.no_grad():
            new.factors[0].copy_(_dense_weight(layer)[None, None])
            if layer.bias is not None:
                new.bias.copy_(layer.bias)
        return new.requires_grad_(False).eval()

    return _replaced(model, convert)


def frozen(model: nn.Module) -> nn.Module:
    """A copy of ``model`` after ``freeze()`` of every structured layer."""
    model = copy.deepcopy(model)
    freeze(model)
    return model


def dense_with_epilogue(model: nn.Module) -> nn.Module:
    """The dense twin, with the activations that a structured layer computes with its product in cuBLAS's epilogue.

    That has ReLU, and GELU by its tanh approximation; an activation that it does not have follows the product.
    """
    model = copy.deepcopy(model)
    for parent, first, second in _fused_pairs(model):
        layer, name = getattr(parent, first), epilogue_of(getattr(parent, second))
        if layer.bias is not None and name in ("relu", "gelu", "gelu_tanh"):
            linear = _LinearWithEpilogue(_dense_weight(layer), layer.bias.detach().clone(), name != "relu")
            setattr(parent, first, linear)
            setattr(parent, second, nn.Identity())
    return dense_twin(model)


def has_epilogue(model: nn.Module) -> bool:
    """Whether a structured layer of ``model`` computes the activation behind it too."""
    return next(_fused_pairs(model), None) is not None


def _fused_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Parent and names of every structured layer and the activation that is one op with it."""
    for parent in model.modules():
        if isinstance(parent, FeedForward):
            pairs = [("up", "activation")]
        elif isinstance(parent, FusedSequential):
            pairs = list(itertools.pairwise(parent._modules))
        else:
            continue
        for first, second in pairs:
            layer = getattr(parent, first)
            is_alone = isinstance(layer, KSLinear) and layer.activation == "none"
            if is_alone and epilogue_of(getattr(parent, second)) is not None:
                yield parent, first, second


def with_free_linears(model: nn.Module) -> nn.Module:
    """A copy whose structured layers cost nothing: their output is a view of their input.

    No layer, however fast, makes the model faster than that.
    """
    return _replaced(model, lambda layer: _Free(layer.out_features))


class _Free(nn.Module):
    """``(..., in)`` to ``(..., out)`` without arithmetic: a slice, or one feature as often as it is needed."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] >= self.out_features:
            return x[..., : self.out_features]
        return x[..., :1].expand(*x.shape[:-1], self.out_features)


class _LinearWithEpilogue(nn.Module):
    """``activation(x W^T + b)`` as one cuBLAS call."""

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (out_features, in_features)
        self.bias = nn.Parameter(bias, requires_grad=False)  # (out_features,)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch._addmm_activation(self.bias, rows, self.weight.T, use_gelu=self.gelu)
        return y.unflatten(0, x.shape[:-1])


class _BatchLast(nn.Module):
    """A batch-last layer in a batch-first model: ``(..., in)`` to ``(..., out)`` by transposing both ways."""

    def __init__(self, layer: KSLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, x.shape[-1]).T.contiguous()  # (in, N)
        return self.layer(columns).T.contiguous().unflatten(0, x.shape[:-1])  # (..., out)


def _replaced(model: nn.Module, convert: Callable[[KSLinear], nn.Module]) -> nn.Module:
    """A copy of ``model`` with every structured layer converted; a layer that two names share stays shared."""
    model = copy.deepcopy(model)
    if isinstance(model, KSLinear):
        return convert(model)
    converted: dict[KSLinear, nn.Module] = {}
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, KSLinear)]
    for name, layer in found:
        if layer not in converted:
            converted[layer] = convert(layer)
        model.set_submodule(name, converted[layer])
    return model


def _dense_weight(layer: KSLinear) -> Tensor:
    """The weight (out_features, in_features), multiplied out in float64 and rounded once.

    In 16 bits the product of rounded factors would carry errors of its own.
    """
    return copy.deepcopy(layer).double().to_dense().to(layer.factors[0].dtype).detach()


def _dense_layer(layer: KSLinear) -> nn.Module:
    factor, weight = layer.factors[0], _dense_weight(layer)
    linear = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device=factor.device, dtype=factor.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    linear.requires_grad_(False)
    if layer.activation == "none":
        return linear
    return nn.Sequential(linear, _ACTIVATION_MODULES[layer.activation]())
