"""What the linear layers of a model read: second moments of their inputs, by hooks, in one pass over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from structlayers.data_aware import InputMoments
from structlayers.errors import ConfigError, DataError
from structlayers.surgery import as_linear
from structlayers.swap_rules import first_match
from structlayers.values import patterns


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    loader: Iterable[Any],
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, InputMoments]:
    """Mean and second moments of the inputs of a model's linear layers over all batches of ``loader``, by layer name.

    ``include`` and ``exclude``: fnmatch patterns on the dotted name, as in :class:`~structlayers.swap_rules.SwapRule`.
    A batch is a tensor, a sequence whose first entry is the input, or a mapping of keyword arguments, moved to the
    device of the model's first parameter; ``forward(model, batch)`` runs the model otherwise. Where a mapping has an
    ``attention_mask`` ``(B, T)``, the rows that it masks out of inputs ``(B, T, n)`` do not count.

    The model runs in evaluation mode, without gradients, and is left as it was. A layer that was never called has
    moments of 0 rows. Sums are float64 of float32 products; costs ``2 n^2`` FLOPs per row and ``8 n^2`` bytes per
    layer. Layers that read the same tensor share the product.
    Raises :class:`ConfigError` if no linear layer is meant, :class:`DataError` for a loader without batches and for
    activations that are not finite, with the layer, the batch and their number.
    """
    include, exclude = patterns("include", include), patterns("exclude", exclude)
    linears = {name: module for name, module in model.named_modules() if as_linear(module) is not None}
    wanted = {
        name: module
        for name, module in linears.items()
        if first_match(name, include) is not None and first_match(name, exclude) is None
    }
    if not wanted:
        without = f" without {', '.join(map(repr, exclude))}" if exclude else ""
        examples = ", ".join(list(linears)[:5]) or "none"
        raise ConfigError(
            f"{', '.join(map(repr, include))}{without} matches no linear layer: expected some of {examples}"
        )
    run = forward or _forward
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    recorder = _Recorder()
    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_pre_hook(recorder.hook(name), with_kwargs=True) for name, module in wanted.items()]
    try:
        model.eval()
        for batch in loader:
            batch = _to(batch, device)
            recorder.begin(batch)
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if recorder.batch < 0:
        raise DataError("calibration: the loader has no batches, expected at least one")
    return {name: recorder.moments(name, _in_features(module)) for name, module in wanted.items()}


@dataclass
class _Sums:
    rows: int
    total: Tensor  # (n,)
    products: Tensor  # (n, n)


@dataclass
class _Recorder:
    """Sums over batches, and the products of the tensor seen last, which the next layer may read as well."""

    batch: int = -1
    mask: Tensor | None = None
    sums: dict[str, _Sums] = field(default_factory=dict)
    last: tuple[Tensor, int | None, _Sums] | None = None

    def begin(self, batch: Any) -> None:
        self.batch += 1
        self.last = None
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # The version tells a tensor that was written to in place since; those of inference mode have none.
            version = None if x.is_inference() else x._version
            if self.last is None or self.last[0] is not x or version is None or self.last[1] != version:
                self.last = (x, version, self._of(name, x))
            new = self.last[2]
            old = self.sums.get(name)
            if old is None:
                self.sums[name] = _Sums(new.rows, new.total.clone(), new.products.clone())
            else:
                old.rows += new.rows
                old.total += new.total
                old.products += new.products

        return record

    def _of(self, name: str, x: Tensor) -> _Sums:
        if self.mask is not None and x.dim() == 3 and x.shape[:2] == self.mask.shape:
            rows = x[self.mask.to(x.device)]
        else:
            rows = x.reshape(-1, x.shape[-1])
        working = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            rows = rows.to(working)
            products = rows.mT @ rows
        if not bool(torch.isfinite(products).all()):
            wrong = int((~torch.isfinite(rows)).sum())
            raise DataError(
                f"calibration batch {self.batch}, input of {name}: {wrong} of {rows.numel()} values are not finite"
                + ("" if wrong else f", but their squares overflow {working}")
            )
        return _Sums(len(rows), rows.sum(0, dtype=torch.float64), products.double())

    def moments(self, name: str, features: int) -> InputMoments:
        sums = self.sums.get(name)
        if sums is None or sums.rows == 0:
            zeros = torch.zeros(features, dtype=torch.float64)
            return InputMoments(0, zeros, torch.zeros(features, features, dtype=torch.float64))
        return InputMoments(sums.rows, sums.total / sums.rows, sums.products / sums.rows)


def _in_features(module: nn.Module) -> int:
    linear = as_linear(module)
    assert linear is not None, "only linear layers are recorded"
    return linear.in_features


def _forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, Sequence) else batch)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_to(value, device) for value in batch]
    return batch
