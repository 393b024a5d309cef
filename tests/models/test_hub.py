"""timm and transformers: one clear error without them, logits with them."""

import sys

import pytest
import torch

from structlayers.errors import ConfigError
from structlayers.models import passage_matcher, timm_model, transformers_model
from structlayers.models.hub import pretrained_source

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


TINY_BERT = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def test_passage_matcher_scores_are_scaled_cosines(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = passage_matcher("bert", **LANGUAGE, pretrained=False, scale=7.0, **TINY_BERT).eval()
    pairs = torch.randint(32, (5, 2, 16))
    means = [model.model(pairs[:, i]).last_hidden_state.mean(1) for i in (0, 1)]
    cosines = torch.cosine_similarity(means[0][:, None], means[1][None], dim=-1)
    assert model(pairs).shape == (5, 5)
    torch.testing.assert_close(model(pairs), 7 * cosines, rtol=1e-4, atol=1e-4)
    model.model.save_pretrained(tmp_path)
    again = passage_matcher(str(tmp_path), **LANGUAGE, scale=7.0).eval()
    assert torch.equal(again(pairs), model(pairs))
    with pytest.raises(ConfigError, match="max_position_embeddings=17: the pretrained model has only 16"):
        passage_matcher(str(tmp_path), vocab_size=32, context_length=17)
    with pytest.raises(ConfigError, match=r"name='.*nothing': not loaded by AutoModel"):
        passage_matcher(str(tmp_path / "nothing"), **LANGUAGE)


def test_pretrained_source():
    assert pretrained_source("any/name") == "any/name"
    assert pretrained_source("package:structlayers/models").endswith("structlayers/models")
    with pytest.raises(ConfigError, match="no package 'nowhere' is installed"):
        pretrained_source("package:nowhere/model")
    with pytest.raises(ConfigError, match="the package has no folder 'nothing'"):
        pretrained_source("package:structlayers/nothing")


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
