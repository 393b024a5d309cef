"""A structured layer and the activation behind it as one op: in one's own ``forward``, in ``nn.Sequential``, elsewhere.

Whether two modules are one op is decided at every call, and the layer's options stay as they are, so that state dicts,
checkpoints and ``densify`` know nothing of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor, nn

from structlayers.errors import ConfigError
from structlayers.nn import KSLinear, has_hooks

# Classes of transformers that compute the same, known by name so that the package is not needed.
_OF_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
}


def epilogue_of(module: nn.Module) -> str | None:
    """The name in :data:`structlayers.problem.ACTIVATIONS` of what a module computes; None for others or with hooks."""
    kind = type(module)
    if has_hooks(module):
        return None
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind.__module__ == "transformers.activations":
        return _OF_TRANSFORMERS.get(kind.__name__)
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(kind)


def linear_activation(linear: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(linear(x))``, as one op where ``linear`` is a :class:`KSLinear` without an activation of its own.

    The two stay two calls where the activation is none that the op knows, or either has hooks.
    """
    if type(linear) is KSLinear and linear.activation == "none" and not has_hooks(linear):
        epilogue = epilogue_of(activation)
        if epilogue is not None:
            return linear(x, activation=epilogue)
    return activation(linear(x))


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` in which a :class:`KSLinear` and the activation behind it are one op."""

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self)
        while modules:
            module, *modules = modules
            if modules and type(module) is KSLinear and epilogue_of(modules[0]) is not None:
                activation, *modules = modules
                x = linear_activation(module, activation, x)
            else:
                x = module(x)
        return x


def fuse_sequentials(model: nn.Module) -> None:
    """Make every plain ``nn.Sequential`` with an activation behind a :class:`KSLinear` a :class:`FusedSequential`.

    In place: the very module changes its class, so that names, hooks and references stay.
    """
    for module in model.modules():
        if type(module) is not nn.Sequential or "forward" in module.__dict__:
            continue
        if any(type(a) is KSLinear and epilogue_of(b) is not None for a, b in pairwise(module)):
            module.__class__ = FusedSequential


class AbsorbedActivation(nn.Module):
    """The activation behind a layer of ``parent``: does nothing while that layer's op computes it, else itself."""

    def __init__(self, activation: nn.Module, absorption: Absorption, layer: KSLinear) -> None:
        super().__init__()
        self.activation = activation
        self.name = absorption.activation
        self.child = absorption.child
        # Not modules below this one: the parent holds this one and the layer.
        self.__dict__["parent"] = absorption.parent
        self.__dict__["layer"] = layer

    @torch.compiler.assume_constant_result
    def is_in_place(self) -> bool:
        """Whether the parent still calls the layer and then this module, neither of them wrapped or replaced."""
        modules = self.__dict__["parent"]._modules
        return modules.get(self.child) is self.__dict__["layer"] and modules.get(self.name) is self

    def forward(self, x: Tensor) -> Tensor:
        # Asked of this module first: a replica of it has the original's layer, which did not compute this x.
        if self.is_in_place() and self.__dict__["layer"].absorbs:
            return x
        return self.activation(x)


@dataclass(frozen=True)
class Absorption:
    """One layer that is to compute the activation of its sibling too."""

    parent: nn.Module
    child: str
    activation: str
    epilogue: str

    def apply(self) -> None:
        """Let the layer do it, if it is a :class:`KSLinear` now."""
        layer = self.parent.get_submodule(self.child)
        if type(layer) is KSLinear and layer.activation == "none":
            activation = self.parent.get_submodule(self.activation)
            absorber = AbsorbedActivation(activation, self, layer)
            self.parent.add_module(self.activation, absorber)
            layer.absorbed = self.epilogue
            layer.__dict__["absorber"] = absorber


def plan_absorptions(model: nn.Module, activations: Mapping[str, str]) -> list[Absorption]:
    """The layers that ``activations`` names, each with its activation; nothing is changed.

    ``activations``: fnmatch patterns on dotted names of layers, each with the name of the activation beside them:
    ``{"*.mlp.c_fc": "act"}``. Raises :class:`ConfigError`, naming the layer, where a pattern matches none, the
    activation is none that the op knows, or the parent's ``forward`` does not plainly apply it to the layer's output,
    as in ``x = self.c_fc(x)`` followed by ``x = self.act(x)``, or ``self.act(self.c_fc(x))``.
    """
    found = []
    for pattern, name in activations.items():
        layers = [layer for layer, _ in model.named_modules() if fnmatchcase(layer, pattern)]
        if not layers:
            raise ConfigError(f"activations pattern {pattern!r} matches no layer")
        for layer in layers:
            path, _, child = layer.rpartition(".")
            parent = model.get_submodule(path)
            activation = parent._modules.get(name)
            epilogue = None if activation is None else epilogue_of(activation)
            if epilogue is None:
                kind = "nothing" if activation is None else f"a {type(activation).__name__}"
                raise ConfigError(
                    f"activation {name!r} beside {layer!r} is {kind}: expected GELU, ReLU or SiLU without hooks"
                )
            if "forward" in parent.__dict__ or not _applies(type(parent), child, name):
                raise ConfigError(
                    f"the forward of {type(parent).__name__} does not plainly apply {name} to the output of {child}: "
                    f"expected self.{name}(self.{child}(x)), or the two in consecutive lines"
                )
            found.append(Absorption(parent, child, name, epilogue))
    return found


def _applies(parent: type[nn.Module], child: str, activation: str) -> bool:
    """Whether the source of a forward says that the activation takes the layer's output, and calls each only once."""
    try:
        source = inspect.getsource(parent.forward)
    except (OSError, TypeError):
        return False
    if any(len(re.findall(rf"self\.{re.escape(name)}\b", source)) != 1 for name in (child, activation)):
        return False
    layer, behind = rf"self\.{re.escape(child)}\(", rf"self\.{re.escape(activation)}\("
    nested = rf"{behind}\s*{layer}"
    in_turn = rf"(\w+)\s*=\s*{layer}[^()\n]*\)\s*\n\s*\w+\s*=\s*{behind}\s*\1\s*\)"
    return re.search(f"(?:{nested})|(?:{in_turn})", source) is not None
