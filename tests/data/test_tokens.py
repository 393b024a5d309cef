"""Tokens of a text: the tokenizer's own, contiguous parts, passages dealt out into halves."""

import sys
from pathlib import Path

import pytest
import torch

from structlayers.data import PassagePairsDataModule, TokenDataModule
from structlayers.errors import ConfigError, DataError

WORDS = [f"w{i}" for i in range(97)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A text of 1000 words of two letters or more, and a folder whose tokenizer numbers them from 3."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokens")
    vocabulary = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    path = folder / "text.txt"
    path.write_text(" ".join(WORDS[i % 97] for i in range(1000)))
    return str(path), str(folder)


def made(kind, sources, **options):
    sizes = {"context_length": 8, "batch_size": 3, "eval_batch_size": 4, "val_fraction": 0.2, "test_fraction": 0.2}
    data = kind(*sources, **{**sizes, **options})
    data.setup()
    return data


def test_parts_are_the_tokens_of_the_text_in_order(sources):
    data = made(TokenDataModule, sources)
    assert data.model_args() == {"vocab_size": 100, "context_length": 8}
    text = Path(sources[0]).read_text()
    bounds = [0, round(len(text) * 0.6), round(len(text) * 0.8), len(text)]
    for split, start, end in zip(("train", "val", "test"), bounds, bounds[1:], strict=False):
        # A word that a cut has split is another word, or none.
        words = text[start:end].split()
        assert data.splits[split].dtype == torch.int64
        assert data.splits[split].tolist() == [3 + WORDS.index(w) if w in WORDS else 2 for w in words]


def test_targets_are_the_next_tokens_and_the_test_part_may_be_cut(sources):
    data = made(TokenDataModule, sources, test_tokens=34)
    batches = list(data.test_dataloader())
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert x.shape == y.shape == (4, 8)
    assert x.flatten().tolist() == data.splits["test"][:32].tolist()
    assert y.flatten().tolist() == data.splits["test"][1:33].tolist()
    assert len(data.splits["test"]) == 34


def test_a_second_setup_changes_nothing(sources):
    data = made(TokenDataModule, sources)
    before = data.splits
    data.setup("test")
    assert data.splits is before


def test_characters_that_a_cut_has_split_are_left_out(sources, tmp_path):
    path = tmp_path / "umlaut.txt"
    # 602 bytes: the middle is between the two of the umlaut.
    path.write_text("w1 " * 100 + "ü" + " w1" * 100)
    data = made(TokenDataModule, (str(path), sources[1]), val_fraction=0.3, test_fraction=0.2)
    assert data.splits["train"].tolist() == [4] * 100
    assert data.splits["val"].tolist() == [4] * 60


def test_halves_of_passages(sources):
    data = made(PassagePairsDataModule, sources, context_length=8, run_length=3)
    [(x, y), *_] = data.test_dataloader()
    assert x.shape == (4, 2, 8) and y.tolist() == [0, 1, 2, 3]
    assert data.task == "classification"
    # 6 tokens each between [CLS] and [SEP], 3 to either half in turn; passages side by side.
    tokens = data.splits["test"]
    for i, (first, second) in enumerate(x.tolist()):
        passage = tokens[12 * i : 12 * (i + 1)].tolist()
        assert first == [0, *passage[0:3], *passage[6:9], 1]
        assert second == [0, *passage[3:6], *passage[9:12], 1]


def test_every_test_batch_of_passages_has_as_many_candidates(sources):
    data = made(PassagePairsDataModule, sources, context_length=8, run_length=2, eval_batch_size=5)
    sizes = [len(y) for _, y in data.test_dataloader()]
    assert len(data.splits["test"]) // 12 % 5, "a rest is there to be dropped"
    assert set(sizes) == {5} and len(sizes) == len(data.splits["test"]) // 12 // 5


def test_random_training_passages_are_of_the_training_part(sources):
    data = made(PassagePairsDataModule, sources, context_length=8, run_length=3)
    windows = {tuple(w.tolist()) for w in data.splits["train"].unfold(0, 12, 1)}
    seen = set()
    for x, _ in data.train_dataloader():
        for first, second in x[:, :, 1:-1].tolist():
            seen.add((*first[:3], *second[:3], *first[3:], *second[3:]))
    assert len(seen) > 10 and seen <= windows


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (TokenDataModule, {"test_tokens": 8}, ConfigError, "test_tokens=8: expected more than context_length=8"),
        (TokenDataModule, {"context_length": 300}, DataError, "the val part has .* tokens, expected more than 300"),
        (PassagePairsDataModule, {"run_length": 0}, ConfigError, "run_length = 0: expected an integer of at least 1"),
        (PassagePairsDataModule, {"run_length": 4}, ConfigError, "context_length=8 leaves 6 tokens .* run_length=4"),
    ],
)
def test_mistakes(sources, kind, options, error, message):
    with pytest.raises(error, match=message):
        made(kind, sources, **options)


def test_no_tokenizer(sources, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="not loaded by AutoTokenizer"):
        made(TokenDataModule, (sources[0], str(tmp_path)))
    with pytest.raises(ConfigError, match="no package 'nowhere' is installed"):
        made(TokenDataModule, (sources[0], "package:nowhere/model"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="not loaded by AutoTokenizer"):
        made(TokenDataModule, sources)
