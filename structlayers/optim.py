"""Parameter groups for torch optimizers: learning rates and weight decay that know about chains.

Made for AdamW, whose steps have a size of about the learning rate whatever the gradient's: a factor with ``c`` inputs
per block then moves its output by about ``lr * c``, a dense layer by ``lr * in_features``.
Sources: Qiu et al., arXiv:2406.06248 (factors); Yang et al., arXiv:2203.03466, table 3 (width); Wang & Aitchison,
arXiv:2405.13698 (weight decay that does not change with the learning rate's multiplier).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from structlayers.errors import ConfigError
from structlayers.nn import KSLinear
from structlayers.surgery import as_linear
from structlayers.swap_rules import first_match
from structlayers.values import NOT_NEGATIVE, Kind, check, integer, nullable, number, one_of, patterns

RULES = ("none", "structure", "mup")
# The options of param_groups, but the patterns.
KINDS: dict[str, Kind] = {
    "rule": one_of(*RULES),
    # YAML may read 1e-3 as text.
    "lr": number("a positive number", lambda value: 0 < value < math.inf),
    "weight_decay": NOT_NEGATIVE,
    "base_width": nullable(integer(1)),
}


def param_groups(
    model: nn.Module,
    lr: float,
    rule: str = "structure",
    weight_decay: float = 0.0,
    *,
    base_width: int | None = None,
    input_layers: Sequence[str] | str = (),
    no_decay: Sequence[str] | str = (),
) -> list[dict[str, Any]]:
    """Groups ``{"name", "params", "lr", "weight_decay"}`` with every trainable parameter of ``model`` exactly once.

    The learning rate is ``lr`` times a multiplier, with ``d_in`` the layer's inputs, ``c`` the inputs of one block of a
    factor, ``L`` the length of its chain and ``fan_in`` the inputs of one output:

    ====================================  ======  ================  ===================
    parameters                            none    structure         mup
    ====================================  ======  ================  ===================
    factor of a chain                     1       d_in / (c L)      base_width / (c L)
    weight of a linear or convolution     1       1                 base_width / fan_in
    the same in one of ``input_layers``   1       as above          as in ``structure``
    embedding, bias, norm, vector         1       1                 1
    ====================================  ======  ================  ===================

    "structure" lets the best rate of a dense model hold for its structured copy; "mup" lets it hold across widths too,
    the reference being a dense model with ``d_in = base_width``. muP counts as *input* what reads features whose number
    does not grow with the width: name those layers in ``input_layers`` (fnmatch patterns on module names). The output
    layer is treated as a hidden one; muP wants it zero or of standard deviation 1/fan_in at the start, and logits or
    tied heads scaled in the model itself. A parameter with several owners belongs to the first one registered.

    ``weight_decay`` is decoupled: AdamW shrinks a parameter by ``1 - group_lr * group_decay`` a step. Every group gets
    ``group_decay = weight_decay * lr / (L * group_lr)``, so a dense weight (L = 1) and the *product* of a chain's L
    factors both shrink by ``lr * weight_decay``, whatever the rule. Embeddings, biases, norms and other vectors do not
    decay, nor do parameters whose full name matches one of the ``no_decay`` patterns. A parameter held by a module of
    one's own counts as an embedding if its name contains ``emb``, ``pos`` or ``token``.

    Raises :class:`ConfigError` on an unknown rule, a rate that is not positive, ``base_width`` absent with "mup" or
    given without it, a pattern that matches nothing, or a model with nothing to train.
    """
    check(locals(), KINDS)
    if (base_width is not None) != (rule == "mup"):
        raise ConfigError(f"base_width = {base_width!r} with rule {rule!r}: expected an integer with 'mup' only")
    input_layers, no_decay = patterns("input_layers", input_layers), patterns("no_decay", no_decay)
    for name, given, names in (
        ("input_layers", input_layers, [name for name, _ in model.named_modules()]),
        ("no_decay", no_decay, [name for name, _ in model.named_parameters()]),
    ):
        for pattern in given:
            if not any(first_match(n, [pattern]) is not None for n in names):
                raise ConfigError(
                    f"{name} pattern {pattern!r} matches nothing: expected some of {', '.join(names[:5])}"
                )

    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for item in _trainable(model):
        is_input = first_match(item.module_name, input_layers) is not None
        rate = item.rate(rule, base_width, is_input)
        decays = item.kind in ("factor", "dense") and first_match(item.name, no_decay) is None
        decay = 1 / (item.length * rate) if decays and weight_decay else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "lr": lr * rate, "weight_decay": weight_decay * decay, "kinds": []}
        )
        group["params"].append(item.parameter)
        if item.kind not in group["kinds"]:
            group["kinds"].append(item.kind)
    if not groups:
        raise ConfigError("the model has no parameter that requires a gradient: expected at least one")
    # Names are unique: loggers key the learning rates by them.
    return [
        {"name": f"{'+'.join(group.pop('kinds'))} lr*{rate:.6g}" + (f" wd*{decay:.6g}" if decay else ""), **group}
        for (rate, decay), group in groups.items()
    ]


@dataclass(frozen=True)
class _Item:
    """One trainable parameter and what the rules ask about it."""

    name: str
    module_name: str
    parameter: nn.Parameter
    kind: str  # factor, dense, embedding or vector
    in_features: int = 1  # of the layer
    fan_in: int = 1  # of the parameter
    length: int = 1  # of the chain

    def rate(self, rule: str, base_width: int | None, is_input: bool) -> float:
        if rule == "none" or self.kind in ("embedding", "vector"):
            return 1.0
        width = self.in_features if base_width is None or is_input else base_width
        # Without a base width this is 1 for a dense weight, whose fan-in is the layer's.
        return width / (self.fan_in * self.length)


def _trainable(model: nn.Module) -> Iterator[_Item]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in _own_parameters(module):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                full_name = f"{module_name}.{name}" if module_name else name
                yield _describe(full_name, module_name, module, name, parameter)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    # A chain's factors are asked for here, where the chain is known, before their list is visited as a module.
    return list(module.named_parameters(recurse=isinstance(module, KSLinear)))


def _describe(full_name: str, module_name: str, module: nn.Module, name: str, parameter: nn.Parameter) -> _Item:
    if isinstance(module, KSLinear) and name.startswith("factors.") and parameter.dim() == 4:
        chain = module.chain
        # Where factor 0 is parametrized, what it is made of is "factors.parametrizations.0.original" and so on.
        c = chain[int(name.removeprefix("factors.").removeprefix("parametrizations.").split(".")[0])].c
        return _Item(full_name, module_name, parameter, "factor", chain.in_features, c, len(chain))
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _Item(full_name, module_name, parameter, "embedding")
    if parameter.dim() < 2:
        return _Item(full_name, module_name, parameter, "vector")
    linear = as_linear(module)
    if linear is not None:
        fan_in = linear.in_features
    elif isinstance(module, nn.modules.conv._ConvNd):
        fan_in = math.prod(module.kernel_size) * module.in_channels // module.groups
    elif any(part in name.lower() for part in ("emb", "pos", "token")):
        return _Item(full_name, module_name, parameter, "embedding")
    else:
        fan_in = parameter[0].numel()
    return _Item(full_name, module_name, parameter, "dense", fan_in, fan_in)
