"""timm and transformers: one clear error without them, logits with them."""

import sys

import pytest
import torch

from structlayers.errors import ConfigError
from structlayers.models import timm_model, transformers_model

LANGUAGE = {"vocab_size": 32, "context_length": 16}
VISION = {"input_shape": (1, 8, 8), "num_classes": 3}


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="timm_model needs the package timm: pip install timm"):
        timm_model("vit_tiny_patch16_224", (3, 32, 32), 10)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="needs the package transformers: pip install transformers"):
        transformers_model("gpt2", **LANGUAGE)


def test_timm_logits():
    pytest.importorskip("timm")
    model = timm_model("vit_tiny_patch16_224", (1, 8, 8), 3, patch_size=2, embed_dim=24, depth=1, num_heads=2).eval()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    model = timm_model("resnet10t", (1, 32, 32), 3).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)


def test_timm_unknown_name():
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"name='resnet9999': timm has no such model; it has .*resnet"):
        timm_model("resnet9999", (3, 32, 32), 10)


def test_transformers_language_logits():
    pytest.importorskip("transformers")
    model = transformers_model("gpt2", **LANGUAGE, n_layer=1, n_embd=16, n_head=2).eval()
    assert model(torch.randint(32, (2, 16))).shape == (2, 16, 32)
    assert model.model.config.n_positions == 16


def test_transformers_vision_logits():
    pytest.importorskip("transformers")
    options = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers_model("vit", **VISION, patch_size=4, **options).eval()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_transformers_pretrained_from_a_local_folder(tmp_path):
    pytest.importorskip("transformers")
    model = transformers_model("gpt2", **LANGUAGE, n_layer=1, n_embd=16, n_head=2).eval()
    model.model.save_pretrained(tmp_path)
    again = transformers_model(str(tmp_path), **LANGUAGE, pretrained=True).eval()
    tokens = torch.randint(32, (2, 16))
    assert torch.equal(again(tokens), model(tokens))
    with pytest.raises(ConfigError, match="vocab_size=256: the pretrained model has only 32"):
        transformers_model(str(tmp_path), vocab_size=256, context_length=16, pretrained=True)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpt2", {}, "give vocab_size and context_length, or input_shape and num_classes"),
        ("gpt2", {**LANGUAGE, **VISION}, "give vocab_size and context_length, or"),
        ("gpt9", LANGUAGE, "name='gpt9': no model type of transformers"),
        ("gpt2", {**LANGUAGE, "n_layers_": 3}, "n_layers_=3: GPT2Config has no such field"),
        ("vit", {"input_shape": (1, 8, 4), "num_classes": 3}, r"input_shape=\(1, 8, 4\)"),
    ],
)
def test_transformers_bad_arguments(name, arguments, message):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=message):
        transformers_model(name, **arguments)
