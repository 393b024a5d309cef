"""Keep a model's structure and weights in one safetensors file, without Lightning.

The tensors are the model's state dict, a tied tensor once; the metadata hold, as JSON, the chain and options of every
:class:`KSLinear` by module name, and the names of tied tensors. Nothing in the file is executed on loading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from structlayers.errors import BackendError, ChainError, CheckpointError
from structlayers.files import replace_file
from structlayers.nn import KSLinear, unfreeze
from structlayers.patterns import Chain
from structlayers.surgery import as_linear, dress, install

FORMAT_VERSION = "1"
# "format": "pt" is what other readers of safetensors files look for.
_VERSION, _LAYERS, _TIED = "structlayers.version", "structlayers.layers", "structlayers.tied"


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the model's state dict and the chains of its layers to ``path``; returns the path.

    The file appears whole or not at all: a failure or a kill while writing leaves a former file as it was.
    Raises :class:`CheckpointError`, naming the file, if it cannot be written, or naming the key, for a state that is
    no tensor or has no values (meta device).
    """
    path = Path(path)
    model = _unwrap(model)
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}: expected only tensors in the state dict")
        if value.is_meta:
            raise CheckpointError(f"{path}: {key} is on the meta device: expected a tensor with values")
        kept = first.setdefault(_identity(value), key)
        if kept == key:
            tensors[key] = value.detach().contiguous()
        else:
            tied[key] = kept
    layers = {name: asdict(_Layer.of(module)) for name, module in model.named_modules() if isinstance(module, KSLinear)}
    metadata = {"format": "pt", _VERSION: FORMAT_VERSION, _LAYERS: json.dumps(layers), _TIED: json.dumps(tied)}
    try:
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not written: {error}") from error
    return path


def load(
    path: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    backend: str | None = None,
) -> nn.Module:
    """Restore what :func:`save` wrote into ``model``, in place, and return it.

    ``model``: the dense model of the same architecture (its linears become the chains of the file), one that has these
    chains already, or a function that builds either. None only for a file that holds a single :class:`KSLinear`.
    Devices, training mode and ``requires_grad`` are the model's, dtypes the file's; tensors on the meta device get
    memory on the CPU. ``backend`` replaces those that the file names for the layers that are built.
    Raises :class:`CheckpointError`, naming the file and the first differences, if the file is truncated, foreign, of
    another version or of another model; the model is then unchanged.
    """
    path = Path(path)
    content = _read(path)
    if model is not None:
        built = model if isinstance(model, nn.Module) else model()
    elif list(content.layers) == [""]:
        built = content.layers[""].build(path, "", backend).to_empty(device="cpu")
    else:
        raise CheckpointError(f"{path} holds the weights of a model, not its code: expected the model as well")
    target = _unwrap(built)
    undo = install(target, _missing_layers(content, target, backend))
    try:
        _check(content, target)
        # Frozen factors have the dtype that they were frozen in.
        unfreeze(target)
        _give_memory(content, target)
        target.load_state_dict({name: content.get(name) for name in content.names}, strict=True)
    except BaseException:
        undo()
        raise
    return built


@dataclass(frozen=True)
class _Layer:
    """What it takes to build one :class:`KSLinear` again."""

    chain: str
    bias: bool
    backend: str
    layout: str
    activation: str
    init: str
    recompute: bool

    @classmethod
    def of(cls, layer: KSLinear) -> _Layer:
        return cls(
            chain=layer.chain.spec,
            bias=layer.bias is not None,
            backend=layer.backend,
            layout=layer.layout,
            activation=layer.activation,
            init=layer.init,
            recompute=layer.recompute,
        )

    @property
    def function(self) -> dict[str, object]:
        """The part that decides what the layer computes."""
        return {name: getattr(self, name) for name in ("chain", "bias", "layout", "activation")}

    def build(self, path: Path, name: str, backend: str | None) -> KSLinear:
        """The layer on the meta device: its values are read next, so none are drawn."""
        options = {**asdict(self), "backend": self.backend if backend is None else backend}
        try:
            return KSLinear(**options, device="meta")
        except (ChainError, BackendError, ValueError) as error:
            raise CheckpointError(f"{path}: layer {name!r} cannot be built: {error}") from error


@dataclass(frozen=True)
class _Content:
    path: Path
    layers: dict[str, _Layer]
    tensors: dict[str, Tensor]
    tied: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [*self.tensors, *self.tied]

    def get(self, name: str) -> Tensor:
        return self.tensors[self.tied.get(name, name)]


def _read(path: Path) -> _Content:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    if _VERSION not in metadata:
        raise CheckpointError(f"{path}: no {_VERSION} in its metadata: expected a file that structlayers.save wrote")
    if metadata[_VERSION] != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {metadata[_VERSION]!r}: expected {FORMAT_VERSION!r}")
    try:
        layers = {name: _Layer(**layer) for name, layer in json.loads(metadata[_LAYERS]).items()}
        tied = dict(json.loads(metadata[_TIED]))
        for layer in layers.values():
            Chain.parse(layer.chain)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable description of its layers: {error}") from error
    if lost := set(tied.values()) - set(tensors):
        raise CheckpointError(f"{path}: tied to absent tensors: {_some(lost)}")
    return _Content(path, layers, tensors, tied)


def _missing_layers(content: _Content, model: nn.Module, backend: str | None) -> dict[str, KSLinear]:
    """The layers of the file that the model still has as dense ones, built; the others are compared."""
    path = content.path
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, KSLinear) and name not in content.layers:
            raise CheckpointError(f"{path}: no chain for layer {name!r}: the model has {module.chain.spec}")
    missing = {}
    for name, layer in content.layers.items():
        module = modules.get(name)
        if isinstance(module, KSLinear):
            if (found := _Layer.of(module)).function != layer.function:
                raise CheckpointError(
                    f"{path}: layer {name!r} is {layer.function}: expected {found.function}, which the model has"
                )
            continue
        linear = None if module is None else as_linear(module)
        if linear is None or name == "":
            found_module = "no such module" if module is None else f"a {type(module).__name__}"
            raise CheckpointError(
                f"{path}: layer {name!r} has the chain {layer.chain}: expected a linear layer below the model, found "
                f"{found_module}"
            )
        new = layer.build(path, name, backend)
        sizes = (new.in_features, new.out_features, new.bias is not None)
        if sizes != (linear.in_features, linear.out_features, linear.bias is not None):
            raise CheckpointError(
                f"{path}: layer {name!r} with the chain {layer.chain} is {_shape(*sizes)}: expected "
                f"{_shape(linear.in_features, linear.out_features, linear.bias is not None)}, which the model has"
            )
        device = linear.weight.device
        new.to(linear.weight.dtype)
        missing[name] = dress(new.to_empty(device="cpu" if device.type == "meta" else device), linear)
    return missing


def _check(content: _Content, model: nn.Module) -> None:
    """Raise :class:`CheckpointError` unless the file and the model agree on keys, shapes, kinds and ties."""
    path = content.path
    state = model.state_dict(keep_vars=True)
    if missing := state.keys() - set(content.names):
        raise CheckpointError(f"{path} lacks {_some(missing)}: expected every tensor of the {type(model).__name__}")
    if unexpected := set(content.names) - state.keys():
        raise CheckpointError(f"{path} has {_some(unexpected)}: the {type(model).__name__} has no such tensors")
    for name, value in state.items():
        found = content.get(name)
        if found.shape != value.shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(found.shape)}: expected {tuple(value.shape)}")
        if (found.is_floating_point(), found.is_complex()) != (value.is_floating_point(), value.is_complex()):
            raise CheckpointError(f"{path}: {name} is {found.dtype}: expected {value.dtype} or of its kind")
    first: dict[object, str] = {}
    in_model = {name: first.setdefault(_identity(value), name) for name, value in state.items()}
    first = {}
    in_file = {name: first.setdefault(content.tied.get(name, name), name) for name in state}
    for name in state:
        if in_model[name] != in_file[name]:
            other = in_file[name] if in_file[name] != name else in_model[name]
            tied, untied = ("the file", "the model") if in_file[name] != name else ("the model", "the file")
            raise CheckpointError(f"{path}: {name} and {other} are one tensor in {tied}: they are two in {untied}")
    stored = set(map(id, state.values()))
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in stored:
            raise CheckpointError(
                f"{path} lacks {name}, which no state dict holds: expected it with values in the model"
            )


def _give_memory(content: _Content, model: nn.Module) -> None:
    """Give every tensor of the model the file's dtype, and memory where it has none, without untying any."""
    dtypes = {id(value): content.get(name).dtype for name, value in model.state_dict(keep_vars=True).items()}
    fresh: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None or id(old) not in dtypes:
                    continue
                dtype = dtypes[id(old)]
                if old.is_meta:
                    if id(old) not in fresh:
                        new = torch.empty_like(old, dtype=dtype, device="cpu", requires_grad=False)
                        is_parameter = isinstance(old, nn.Parameter)
                        fresh[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                    table[key] = fresh[id(old)]  # type: ignore[assignment]
                elif old.dtype != dtype:
                    old.data = old.data.to(dtype)


def _identity(tensor: Tensor) -> object:
    """Equal for two names of one tensor: safetensors refuses shared memory, so such a pair is written once."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _unwrap(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, so that names are the same with and without it."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _shape(in_features: int, out_features: int, bias: bool) -> str:
    return f"{in_features} -> {out_features} {'with' if bias else 'without'} bias"


def _some(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
