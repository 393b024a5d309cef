"""Training checkpoints: written whole or not at all, and read with errors that say what is wrong with the file."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from structlayers.errors import CheckpointError
from structlayers.files import replace_file

_FACTOR = re.compile(r"(.*)\.factors\.(\d+)$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and move it there: a kill at any moment leaves the previous one intact.

    Lightning's own writer goes through the system's temporary folder, which is a copy, not a move, where that folder
    is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            replace_file(path, lambda temporary: torch.save(checkpoint, temporary))
        except RuntimeError as error:
            # What torch.save makes of a full disk names neither the file nor the disk.
            free = shutil.disk_usage(path.parent).free
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path}: not written, with {free:,} bytes free on its disk: {reason}") from error


def find_checkpoint(path: str | Path, name: str) -> Path:
    """``path``, or the checkpoint called ``name`` of the run folder at ``path``."""
    path = Path(path)
    return path / "checkpoints" / name if path.is_dir() else path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ``train.py`` onto the CPU.

    Keys used here: ``state_dict`` (names start with ``model.``) and ``hyper_parameters`` (``task``, ``model_args`` and
    ``config``, the resolved configuration, all plain Python). Raises ``CheckpointError`` if the file is absent, cut
    short, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint such as <run folder>/checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises many types here, according to where the file ends.
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint of train.py ({path.stat().st_size:,} bytes; truncated or another "
            f"kind of file): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    _require(path, "", checkpoint, "state_dict", "hyper_parameters")
    _require(path, "hyper_parameters", checkpoint["hyper_parameters"], "task", "model_args", "config")
    _require(path, "config", checkpoint["hyper_parameters"]["config"], "model", "structure", "data")
    _require(path, "model_args", checkpoint["hyper_parameters"]["model_args"])
    _require(path, "state_dict", checkpoint["state_dict"])
    return checkpoint


def _require(path: Path, where: str, found: object, *keys: str) -> None:
    """Raise ``CheckpointError`` unless what a checkpoint has in one place is a mapping with these keys."""
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        has = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) else f"a {type(found).__name__}"
        raise CheckpointError(
            f"{path}: not a checkpoint of train.py: expected {' and '.join(keys) or 'a mapping'}"
            f"{where and ' in '}{where}, found {has or 'nothing'}"
        )


def check_matches(checkpoint: dict[str, Any], model: nn.Module, path: str | Path) -> None:
    """Raise ``CheckpointError``, naming the chains or shapes that differ, unless the weights fit ``model`` exactly."""
    ours = {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    ours_named, theirs_named = _by_layer(ours), _by_layer(theirs)
    chains_first = sorted(ours_named.keys() | theirs_named.keys(), key=lambda name: (not name.endswith(" chain"), name))
    differing = [
        f"{name}: {theirs_named.get(name, 'absent')} in the checkpoint, {ours_named.get(name, 'absent')} in the model"
        for name in chains_first
        if ours_named.get(name) != theirs_named.get(name)
    ]
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(f"{path}: belongs to another model or structure: {'; '.join(differing[:3])}{more}")


def _by_layer(shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Text of each weight's shape, where the factors of one layer are put together as their chain."""
    named: dict[str, str] = {}
    for name, shape in shapes.items():
        factor = _FACTOR.match(name)
        if factor and len(shape) == 4:
            a, d, b, c = shape
            layer = f"{factor[1].removeprefix('model.')} chain"
            named[layer] = named.get(layer, "") + f"({a},{b},{c},{d})"
        else:
            named[name.removeprefix("model.")] = str(shape)
    return named
