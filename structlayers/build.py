"""From plain configuration values to a model: what ``train.py`` and ``infer.py`` share."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from structlayers.errors import ConfigError, DataError
from structlayers.surgery import SwapReport, swap_linears
from structlayers.values import MAPPING, TEXT, check, listed, nullable

_KINDS = {"model": MAPPING, "model_args": MAPPING, "structure": nullable(MAPPING)}


def locate(target: str) -> Any:
    """The object that a dotted path names. Raises :class:`ConfigError` if there is none."""
    check({"_target_": target}, {"_target_": TEXT})
    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"_target_ = {target!r}: expected the dotted path of a class or function ({error})"
        ) from error


def build_model(
    model: Mapping[str, Any],
    structure: Mapping[str, Any] | None,
    model_args: Mapping[str, Any],
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[nn.Module, SwapReport]:
    """Build a model and swap its linear layers.

    ``model``: ``_target_`` and arguments; ``model_args``: what the data fix (:meth:`model_args` of a data module);
    ``structure``: the fields of a :class:`~structlayers.surgery.SwapRule`, or ``rules``, a list of such mappings, and
    optionally ``init`` and ``scale`` of :func:`~structlayers.surgery.swap_linears`; empty or None leaves the model
    dense. ``backend`` and ``recompute`` are those of :class:`~structlayers.nn.KSLinear`.
    Options that are None count as not given. Raises :class:`ConfigError` on an unknown target, key or value.
    """
    check({"model_args": model_args, "model": model, "structure": structure}, _KINDS)
    arguments = {**model_args, **model}
    target = arguments.pop("_target_", None)
    if target is None:
        raise ConfigError(f"model = {dict(model)}: expected a key _target_")
    try:
        network = locate(target)(**arguments)
    except TypeError as error:
        raise ConfigError(f"model {target} does not take these arguments: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"_target_ = {target!r} built a {type(network).__name__}: expected a torch.nn.Module")
    if not structure:
        return network, SwapReport((), ())
    swap = dict(structure)
    how = {key: swap.pop(key) for key in ("init", "scale") if key in swap}
    rules = [_without_nulls(rule) for rule in listed(swap.pop("rules", swap))]
    return network, swap_linears(network, rules, backend=backend, recompute=recompute, **how)


def require_swaps(structure: Mapping[str, Any] | None, report: SwapReport) -> None:
    """Raise :class:`ConfigError`, with the reasons, where a structure was asked for and the model has stayed dense."""
    if structure and not report.swapped:
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.skipped[:3])
        raise ConfigError(f"structure = {dict(structure)}: expected to replace a layer, all are skipped: {reasons}")


def check_finite(model: nn.Module) -> None:
    """Raise ``DataError``, naming the parameter, if one has values that are not finite."""
    for name, parameter in model.named_parameters():
        wrong = int((~torch.isfinite(parameter)).sum())
        if wrong:
            raise DataError(f"{name}: {wrong} of {parameter.numel()} values are not finite: expected a trained model")


def _without_nulls(rule: Any) -> Any:
    """A rule whose options that are None are left out; what is no rule stays as it is, for a message that says so."""
    if not isinstance(rule, Mapping) or not isinstance(rule.get("options"), Mapping):
        return rule
    return {**rule, "options": {key: value for key, value in rule["options"].items() if value is not None}}
