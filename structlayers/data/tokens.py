"""Next-token prediction and passage retrieval on any text, in the tokens of a pretrained model's own tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structlayers.data.base import Split
from structlayers.data.loader import Batch, Fetch
from structlayers.data.text import TextDataModule
from structlayers.errors import ConfigError, DataError
from structlayers.models.hub import pretrained_source
from structlayers.values import TEXT, check, integer, nullable


class TokenDataModule(TextDataModule):
    """Tokens of a text, cut into contiguous parts and windows as in :class:`TextDataModule`, tokens in place of bytes.

    ``tokenizer``: a folder, one in an installed package ("package:<module>/<path>"), or a hub name, for
    ``AutoTokenizer`` of transformers; ``gguf_file``: the file of that folder which holds it, if it is a GGUF file.
    ``test_tokens``: only the first so many tokens of the test part, None for all.
    Raises ``ConfigError`` if transformers is absent or the tokenizer cannot be loaded, otherwise as TextDataModule.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        tokenizer: str,
        gguf_file: str | None = None,
        context_length: int = 128,
        batch_size: int = 4,
        eval_batch_size: int = 8,
        seed: int = 0,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        windows: str = "random",
        test_tokens: int | None = None,
    ) -> None:
        super().__init__(path, context_length, batch_size, eval_batch_size, seed, val_fraction, test_fraction, windows)
        check(locals(), {"tokenizer": TEXT, "gguf_file": nullable(TEXT), "test_tokens": nullable(integer(0))})
        if test_tokens is not None and test_tokens <= context_length:
            raise ConfigError(f"test_tokens={test_tokens!r}: expected more than context_length={context_length}")
        self.tokenizer_source = (tokenizer, gguf_file)
        self.test_tokens = test_tokens
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first asked for."""
        if self._tokenizer is None:
            name, gguf_file = self.tokenizer_source
            options = {} if gguf_file is None else {"gguf_file": gguf_file}
            try:
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(pretrained_source(name), **options)
            except (OSError, ImportError, ValueError) as error:
                raise ConfigError(f"tokenizer={name!r}: not loaded by AutoTokenizer: {error}") from error
        return self._tokenizer

    def model_args(self) -> dict[str, Any]:
        return {"vocab_size": len(self.tokenizer), "context_length": self.context_length}

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the text once; raises ``DataError`` if it is absent or a part is shorter than a window."""
        if self.splits:
            return
        super().setup(stage)
        # Characters that a cut between the parts has split are left out.
        texts = {split: bytes(part.numpy()).decode(errors="ignore") for split, part in self.splits.items()}
        encode = self.tokenizer
        self.splits = {split: self._encoded(encode, split, text) for split, text in texts.items()}

    def _encoded(self, encode: Any, split: Split, text: str) -> Tensor:
        tokens = torch.tensor(encode(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        if split == "test":
            tokens = tokens[: self.test_tokens]
        if len(tokens) <= self._window:
            raise DataError(
                f"{', '.join(self.paths)}: the {split} part has {len(tokens)} tokens, expected more than {self._window}"
            )
        return tokens

    @property
    def _window(self) -> int:
        """Tokens that one example takes."""
        return self.context_length


class PassagePairsDataModule(TokenDataModule):
    """Passages of a text, each dealt out into two halves: which of the batch's second halves belongs to a first one?

    A passage of ``2 n`` tokens gives ``run_length`` tokens to either half in turn. Batches: x (B, 2, T) int64, the
    halves of ``n`` tokens between the tokenizer's start and end tokens (where it has such), T = ``context_length`` with
    these; y = 0 ... B-1. The accuracy on a batch is the share of first halves whose own second half scores highest
    among B candidates; so that every batch has as many, validation and test end with the last whole batch, if there is
    one. Passages lie as the windows of :class:`TextDataModule`, side by side for validation and test.
    Raises ``ConfigError`` if ``run_length`` does not divide ``n``, otherwise as :class:`TokenDataModule`.
    """

    task = "classification"

    def __init__(self, path: str | Sequence[str], tokenizer: str, *, run_length: int = 8, **options: Any) -> None:
        super().__init__(path, tokenizer, **options)
        check(locals(), {"run_length": integer(1)})
        self.run_length = run_length

    def _source(self, split: Split) -> tuple[Fetch, int]:
        tokens = self.splits[split]
        start, end = self._ends
        windows = tokens.unfold(0, self._window, 1)
        random = split == "train" and self.windows == "random"

        def fetch(indices: Tensor, generator: torch.Generator) -> Batch:
            starts = (
                torch.randint(len(windows), indices.shape, generator=generator) if random else indices * self._window
            )
            halves = windows[starts].unflatten(1, (-1, 2, self.run_length)).transpose(1, 2).flatten(2)
            first, last = (halves.new_tensor(tokens).expand(*halves.shape[:2], -1) for tokens in (start, end))
            return torch.cat([first, halves, last], dim=-1), torch.arange(len(indices))

        size = len(tokens) // self._window
        if split != "train" and size >= self.eval_batch_size:
            size -= size % self.eval_batch_size
        return fetch, size

    @property
    def _ends(self) -> tuple[list[int], list[int]]:
        """The tokens before and behind a half."""
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return ([] if start is None else [start]), ([] if end is None else [end])

    @property
    def _window(self) -> int:
        start, end = self._ends
        length = self.context_length - len(start) - len(end)
        if length < 1 or length % self.run_length:
            raise ConfigError(
                f"context_length={self.context_length} leaves {length} tokens for half a passage: "
                f"expected a multiple of run_length={self.run_length}"
            )
        return 2 * length
