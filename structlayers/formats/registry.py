"""The known layouts by name: weights in and out, and the layers of a whole state dict."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from structlayers.errors import CheckpointError, ConfigError, ShapeError
from structlayers.formats.blast import from_blast, to_blast
from structlayers.formats.btt import from_btt, to_btt
from structlayers.formats.butterfly import from_butterfly, to_butterfly
from structlayers.formats.ksmm import from_ksmm, to_ksmm
from structlayers.formats.matrix import FactoredMatrix, PermutedLinear
from structlayers.formats.monarch import from_monarch, to_monarch
from structlayers.formats.refusal import Source
from structlayers.nn import KSLinear


@dataclass(frozen=True)
class Format:
    """One layout: its importer, its exporter, and how its modules call their tensors in a state dict.

    ``keys``: the names of the tensors, in the importer's order; a name that ends in ``.`` stands for a numbered list.
    ``is_padded``: whether the layout crops, so that sizes are not in its tensors.
    """

    read: Callable[..., FactoredMatrix]
    write: Callable[[Source], Sequence[Any]]
    keys: tuple[str, ...]
    bias: str = "bias"
    is_padded: bool = False

    def find(self, state_dict: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """The keys of every layer's tensors, in order, by the layer's name; a layer is where the first key is found."""
        names = "|".join(re.escape(key) + (r"\d+" if key.endswith(".") else "") for key in self.keys)
        layers: dict[str, list[str]] = {}
        for key in state_dict:
            match = re.fullmatch(rf"(?:(.*)\.)?({names})", key)
            if match:
                layers.setdefault(match[1] or "", []).append(match[2])
        ordered = {name: sorted(found, key=self._position) for name, found in layers.items()}
        return {name: found for name, found in ordered.items() if self._position(found[0]) == (0, 0)}

    def _position(self, key: str) -> tuple[int, int]:
        if key in self.keys:
            return self.keys.index(key), 0
        stem, number = key.rsplit(".", 1)
        return self.keys.index(f"{stem}."), int(number)


def _read_ksmm(*weights: Tensor) -> FactoredMatrix:
    return from_ksmm(weights)


FORMATS: dict[str, Format] = {
    "monarch": Format(from_monarch, to_monarch, ("blkdiag1", "blkdiag2"), is_padded=True),
    "btt": Format(from_btt, to_btt, ("op_params.",), bias="b"),
    "butterfly": Format(from_butterfly, to_butterfly, ("twiddle",), is_padded=True),
    "ksmm": Format(_read_ksmm, to_ksmm, ("factors.",)),
    "blast": Format(from_blast, to_blast, ("B", "D", "C")),
}


def import_weights(format: str, tensors: Sequence[Any], **options: Any) -> FactoredMatrix:
    """The chain, weights and permutations of ``tensors`` in the layout that ``format`` names; no value is changed.

    ``format``, ``tensors`` and ``options`` by name, see there: ``"monarch"`` (:func:`from_monarch`), ``"btt"``
    (:func:`from_btt`), ``"butterfly"`` (:func:`from_butterfly`), ``"ksmm"`` (:func:`from_ksmm`, the list itself),
    ``"blast"`` (:func:`from_blast`). What :func:`export_weights` returns may be given as ``tensors``.
    Raises :class:`ConfigError` for an unknown name, :class:`ShapeError` and :class:`ChainError` for tensors that do not
    fit it.
    """
    read = _format(format).read
    signature = inspect.signature(read)
    try:
        signature.bind(*tensors, **options)
    except TypeError as error:
        given = f"{len(tensors)} tensors" + (f" and {', '.join(options)}" if options else "")
        raise ShapeError(f"{format} of {given}: expected {', '.join(signature.parameters)}; {error}") from error
    return read(*tensors, **options)


def export_weights(format: str, source: Source) -> Sequence[Any]:
    """The tensors of a matrix or layer in the layout that ``format`` names, as a named tuple or a list.

    Bias and activation of a layer are no part of it. The tensors may share memory with the layer.
    Raises :class:`ConfigError` for an unknown name, :class:`ChainError` with the reason for a chain or permutation that
    the layout cannot express.
    """
    return _format(format).write(source)


def layers_from_state_dict(
    state_dict: Mapping[str, Tensor],
    format: str,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    **options: Any,
) -> dict[str, KSLinear | PermutedLinear]:
    """A layer for every module of another project that a state dict holds in the layout ``format``, by its name.

    Modules are found by the keys that the original project gives their tensors: ``name.blkdiag1`` and ``blkdiag2``;
    ``op_params.0`` and ``.1``; ``twiddle``; ``factors.0`` ...; ``B``, ``D``, ``C``; and the bias, ``name.bias``
    (``name.b`` for ``"btt"``). ``sizes``: ``(in_features, out_features)`` by name, for layers that are padded; others
    have the sizes of their blocks. ``options`` are the importer's and those of :class:`KSLinear`.
    :func:`structlayers.surgery.install` puts the layers into a model.
    Raises :class:`CheckpointError` if no such module is found, or naming the one that does not fit.
    """
    known = _format(format)
    found = known.find(state_dict)
    if not found:
        some = ", ".join(list(state_dict)[:5])
        raise CheckpointError(f"no {format} layer: expected keys that end in {', '.join(known.keys)}, found {some} ...")
    if unknown := set(sizes or ()) - set(found):
        raise CheckpointError(f"sizes for {', '.join(sorted(unknown))}: expected some of {', '.join(found)}")
    parameters = inspect.signature(known.read).parameters
    reading = {key: options.pop(key) for key in list(options) if key in parameters}
    layers: dict[str, KSLinear | PermutedLinear] = {}
    for name, keys in found.items():
        prefix = f"{name}." if name else ""
        size = (sizes or {}).get(name)
        cropped = dict(zip(("in_features", "out_features"), size, strict=True)) if size and known.is_padded else {}
        bias = state_dict.get(prefix + known.bias)
        try:
            matrix = import_weights(format, [state_dict[prefix + key] for key in keys], **reading, **cropped)
            if size is not None and size != (matrix.in_features, matrix.out_features):
                raise ShapeError(f"{matrix.in_features} -> {matrix.out_features} features: expected {size}")
            if bias is not None and bias.dim() > 1 and bias.numel() == bias.shape[0]:
                # Kept as a column where the batch is last.
                bias = bias.flatten()
            layers[name] = matrix.layer(bias, **options)
        except ValueError as error:
            raise CheckpointError(f"{format} layer {name!r}: {error}") from error
    return layers


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"format = {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]
