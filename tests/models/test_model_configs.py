"""Every file of configs/model and configs/data composes and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from structlayers.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
OPTIONAL = {"timm", "transformers"}


def names(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(group, name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [f"{group}={name}", *overrides])
    return cfg[group]


@pytest.mark.parametrize("name", names("data"))
def test_data_config(name):
    data = instantiate(composed("data", name, "seed=3", *(["data.path=a.txt"] if name == "text" else [])))
    assert data.seed == 3 and data.model_args()


@pytest.mark.parametrize("name", sorted(set(names("model")) - OPTIONAL))
def test_model_config(name):
    language = name == "gpt"
    args = {"vocab_size": 256, "context_length": 16} if language else {"input_shape": (1, 8, 8), "num_classes": 10}
    model = instantiate(composed("model", name), **args)
    x = torch.randint(256, (2, 16)) if language else torch.randn(2, 1, 8, 8)
    assert model(x).shape == ((2, 16, 256) if language else (2, 10))


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_optional_model_config(name):
    pytest.importorskip(name)
    images = {"input_shape": (3, 224, 224), "num_classes": 10}
    args = images if name == "timm" else {"vocab_size": 256, "context_length": 16}
    small = ["+model.n_layer=1"] if name == "transformers" else []
    model = instantiate(composed("model", name, *small), **args).eval()
    x = torch.randn(1, 3, 224, 224) if name == "timm" else torch.randint(256, (1, 16))
    assert model(x).shape == ((1, 10) if name == "timm" else (1, 16, 256))


def test_text_needs_a_path():
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue

    with pytest.raises((MissingMandatoryValue, InstantiationException), match="path"):
        instantiate(composed("data", "text"))


def test_argument_errors_survive_hydra():
    from hydra.errors import InstantiationException

    cfg = composed("model", "gpt", "model.heads=3")
    with pytest.raises(InstantiationException) as caught:
        instantiate(cfg, vocab_size=256, context_length=16)
    assert isinstance(caught.value.__cause__, ConfigError)
