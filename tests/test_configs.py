"""Every file of every configuration group composes, and what it describes can be built."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from structlayers.bench.timing import TimingPlan
from structlayers.build import build_model, locate
from structlayers.cli import CONFIGS
from structlayers.lit import LitModule
from structlayers.lit.summary import count_flops, disguised_chains, example_input

FILES = sorted(path for path in Path(CONFIGS).glob("*/*.yaml"))
IMAGE = {"input_shape": (1, 8, 8), "num_classes": 10}
TEXT = {"vocab_size": 256, "context_length": 16}
# Values that have no default.
GIVEN = {
    ("data", "text"): ["data.path=some.txt"],
    ("pretrained", "causal_lm"): ["model.name=a_folder"],
    ("pretrained", "encoder"): ["model.name=a_folder"],
    ("pretrained", "timm"): ["model.name=vit_tiny_patch16_224"],
    ("pretrained", "checkpoint"): ["ckpt_path=a_folder"],
}
PACKAGES = {"timm": "timm", "transformers": "transformers", "wandb": "wandb"}


def composed(*overrides, config="train"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def built(cfg, model_args):
    plain = OmegaConf.to_container(cfg, resolve=True)
    return build_model(plain["model"], plain["structure"], model_args, backend=cfg.backend)


def check_structure(cfg):
    model, report = built(cfg, IMAGE)
    if cfg.structure:
        assert report.swapped
        assert report.kept <= 0.35
        assert disguised_chains(model) == ()


def check_model(cfg):
    is_text = cfg.model._target_.endswith(("GPT", "transformers_model"))
    task, args = ("language_modelling", TEXT) if is_text else ("classification", IMAGE)
    if cfg.model._target_.endswith("timm_model"):
        args = {"input_shape": (3, 224, 224), "num_classes": 10}
    model, report = built(cfg, args)
    assert report.swapped
    assert count_flops(model, example_input(task, args)) > 0


def check_data(cfg):
    data = instantiate(cfg.data)
    assert data.task in ("classification", "language_modelling")
    assert data.model_args()


def check_optim(cfg):
    model, _ = built(cfg, IMAGE)
    module = LitModule(model, "classification", **OmegaConf.to_container(cfg.optim, resolve=True))
    module.trainer = instantiate(cfg.trainer, logger=False, accelerator="cpu", max_steps=10)
    optimizer = module.configure_optimizers()["optimizer"]
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len(list(model.parameters()))


def check_trainer(cfg):
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert instantiate(cfg.trainer, logger=False).gradient_clip_val == 1.0


def check_callbacks(cfg):
    assert [instantiate(callback) for callback in cfg.callbacks.values()]


def check_logger(cfg):
    assert len([instantiate(logger) for logger in cfg.logger.values()]) == len(cfg.logger)


def check_profiler(cfg):
    assert cfg.profiler == {} or instantiate(cfg.profiler).summary() is not None


def check_experiment(cfg):
    data = instantiate(cfg.data)
    # Some are of a GPU's size.
    with torch.device("meta"):
        model, report = built(cfg, data.model_args())
    assert report.kept <= (0.4 if cfg.trainer.accelerator == "gpu" else 0.35)
    assert disguised_chains(model) == ()
    LitModule(model, data.task, **OmegaConf.to_container(cfg.optim, resolve=True))


def check_hydra(cfg):
    assert cfg.seed == 0


def check_pretrained(cfg):
    """What convert.py does with it before it reads a model."""
    assert len(wanted(cfg)) == len(cfg.budgets) * len(cfg.inits) * len({*cfg.compare, cfg.chain})
    if cfg.ckpt_path is None:
        assert callable(locate(cfg.model._target_))
        data = instantiate(cfg.data)
        assert data.task in ("classification", "language_modelling")
        assert not OmegaConf.missing_keys(cfg)
    LitModule(torch.nn.Linear(2, 2), "classification", **OmegaConf.to_container(cfg.optim, resolve=True))


def wanted(cfg):
    spec = importlib.util.spec_from_file_location("convert", Path(CONFIGS).parent / "convert.py")
    module = importlib.util.module_from_spec(spec)
    # Where the dataclasses of a script look for its names.
    sys.modules["convert"] = module
    spec.loader.exec_module(module)
    return module.wanted(cfg)


def check_bench(cfg):
    TimingPlan(**cfg.bench)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def test_every_group_has_a_check():
    assert {path.parent.name for path in FILES} == CHECKS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_file_of_a_group(path, tmp_path):
    group, name = path.parent.name, path.stem
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    # Wandb would look for an account.
    offline = ["logger.wandb.offline=true"] if name == "wandb" else []
    given = GIVEN.get((group, name), [])
    config = {"bench": "infer", "pretrained": "convert"}.get(group, "train")
    folder = [] if config == "infer" else [f"output_dir={tmp_path}"]
    CHECKS[group](composed(f"{group}={name}", *folder, *offline, *given, config=config))


@pytest.mark.parametrize(("config", "choice"), [("train", "structure"), ("infer", "structure"), ("convert", "chain")])
def test_top_file(config, choice):
    cfg = composed(config=config)
    assert {"model", choice, "data"} <= set(cfg)


def test_default_is_structured_digits(tmp_path):
    cfg = composed(f"output_dir={tmp_path}")
    model, report = built(cfg, IMAGE)
    assert cfg.data._target_.endswith("DigitsDataModule")
    assert report.kept <= 0.35
    assert disguised_chains(model) == ()
