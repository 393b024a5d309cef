"""Models of the optional packages timm and transformers, adapted to return logits."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from structlayers.errors import ConfigError
from structlayers.models._validate import image_shape, positive


def _require(package: str, builder: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{builder} needs the package {package}: pip install {package} ({error})") from error


def pretrained_source(name: str) -> str:
    """What ``from_pretrained`` takes: ``name`` itself, or for ``"package:<module>/<path>"`` the folder in that package.

    The package is found, not imported. Raises ``ConfigError`` if it is not installed or has no such folder.
    """
    if not name.startswith("package:"):
        return name
    module, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"name={name!r}: no package {module!r} is installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise ConfigError(f"name={name!r}: the package has no folder {inside!r}")
    return str(folder)


def timm_model(
    name: str, input_shape: Sequence[int], num_classes: int, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Build a timm image model for images (B, *input_shape) and logits (B, num_classes).

    Architectures of a fixed image size are built for the one in ``input_shape``; ``options`` go to
    ``timm.create_model``. Weights are downloaded only with ``pretrained=True``. Raises ``ConfigError`` if timm is
    absent or does not know the name.
    """
    timm = _require("timm", "timm_model")
    channels, height, width = image_shape(input_shape)
    positive(num_classes=num_classes)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:4]}*")[:5])
        raise ConfigError(f"name={name!r}: timm has no such model" + (f"; it has {close} ..." if close else ""))
    pretrained_cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options.setdefault("img_size", (height, width))
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **options)


class LogitsOf(nn.Module):
    """A transformers model whose forward takes one tensor and returns ``.logits``. Linears: ``model.<their name>``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T) to (B, T, vocab), or images (B, C, H, W) to (B, num_classes)."""
        return self.model(x).logits


def transformers_model(
    name: str,
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a causal language model or an image classifier of transformers that returns plain logits.

    Give ``vocab_size`` and ``context_length``, or ``input_shape`` (square images) and ``num_classes``. With
    ``pretrained=False`` ``name`` is a model type ("gpt2", "vit", ...), built with random weights from its configuration
    class, and nothing is downloaded; with ``pretrained=True`` it is a local folder, one in an installed package
    (:func:`pretrained_source`) or a hub name for ``from_pretrained``, whose ``gguf_file`` may be among the options; the
    weights are float32 unless ``dtype`` says otherwise. Other ``options`` are fields of the configuration
    (``n_layer=4``, ``hidden_size=192``, ...).
    Raises ``ConfigError`` if transformers is absent, the name or an option is unknown, or the sizes do not fit.
    """
    transformers = _require("transformers", "transformers_model")
    language = vocab_size is not None and context_length is not None
    vision = input_shape is not None and num_classes is not None
    if language == vision:
        raise ConfigError(
            f"transformers_model: give vocab_size and context_length, or input_shape and num_classes; got "
            f"{vocab_size=}, {context_length=}, {input_shape=}, {num_classes=}"
        )
    if vision:
        channels, height, width = image_shape(input_shape)  # type: ignore[arg-type]
        if height != width:
            raise ConfigError(f"input_shape={tuple(input_shape)}: transformers takes square images")  # type: ignore[arg-type]
        fields = {"num_labels": num_classes, "num_channels": channels, "image_size": height}
        auto = transformers.AutoModelForImageClassification
    else:
        fields = {"vocab_size": vocab_size, "max_position_embeddings": context_length, "use_cache": False}
        auto = transformers.AutoModelForCausalLM

    if pretrained:
        # The sizes of pretrained weights are the checkpoint's; only a classifier's head may be new.
        kept = {"num_labels": num_classes, "ignore_mismatched_sizes": True} if vision else {"use_cache": False}
        model = _from_pretrained(auto, name, **{"dtype": torch.float32, **kept, **options})
        if language:
            _check_language_sizes(model.config, vocab_size, context_length)  # type: ignore[arg-type]
        return LogitsOf(model)

    return LogitsOf(auto.from_config(_config(transformers, name, fields, options)))


class PassageMatcher(nn.Module):
    """A transformers text encoder that finds each passage's partner: cosines of mean-pooled embeddings.

    ``scale`` multiplies the cosines, so that their softmax is a matching. Linears: ``model.<their name>``.
    """

    def __init__(self, model: nn.Module, scale: float = 20.0) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def embed(self, x: Tensor) -> Tensor:
        """Map tokens (B, T), none of them padding, to embeddings (B, dim) of length 1."""
        return normalize(self.model(x).last_hidden_state.mean(1), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map pairs of passages (B, 2, T) to logits (B, B): row i scores all second passages for first passage i."""
        first, second = self.embed(x.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.scale * first @ second.mT


def passage_matcher(
    name: str, *, vocab_size: int, context_length: int, pretrained: bool = True, scale: float = 20.0, **options: Any
) -> nn.Module:
    """Build a text encoder of transformers (BERT and its kin) that scores pairs of passages, for retrieval.

    ``name``, ``pretrained``, ``options`` and errors as in :func:`transformers_model`.
    """
    transformers = _require("transformers", "passage_matcher")
    if pretrained:
        model = _from_pretrained(transformers.AutoModel, name, **{"dtype": torch.float32, **options})
        _check_language_sizes(model.config, vocab_size, context_length)
    else:
        fields = {"vocab_size": vocab_size, "max_position_embeddings": context_length}
        model = transformers.AutoModel.from_config(_config(transformers, name, fields, options))
    return PassageMatcher(model, scale)


def _from_pretrained(auto: Any, name: str, **options: Any) -> nn.Module:
    try:
        return auto.from_pretrained(pretrained_source(name), **options)
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"name={name!r}: not loaded by {auto.__name__}: {error}") from error


def _config(transformers: ModuleType, name: str, fields: dict[str, Any], options: dict[str, Any]) -> Any:
    """A configuration of a model type; raises ``ConfigError`` for an unknown type or field."""
    if name not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"name={name!r}: no model type of transformers; a folder or hub name needs pretrained=true")
    config_class = transformers.CONFIG_MAPPING[name]
    known = config_class()
    unknown = [key for key in options if not hasattr(known, key)]
    if unknown:
        raise ConfigError(f"{unknown[0]}={options[unknown[0]]!r}: {config_class.__name__} has no such field")
    return config_class(**{**fields, **options})


def _check_language_sizes(config: Any, vocab_size: int, context_length: int) -> None:
    for name, needed in (("vocab_size", vocab_size), ("max_position_embeddings", context_length)):
        has = getattr(config, name, None)
        if has is not None and has < needed:
            raise ConfigError(f"{name}={needed}: the pretrained model has only {has}")
