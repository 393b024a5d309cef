"""The named experiments of infer.py: each composes, has the chains that it says it has, and runs at a small size."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from structlayers.bench.model_variants import structured_layers
from structlayers.bench.models import ModelSweep, random_input, time_model
from structlayers.bench.timing import TimingPlan
from structlayers.build import build_model
from structlayers.cli import CONFIGS
from structlayers.lit.summary import disguised_chains

EXPERIMENTS = sorted(path.stem for path in Path(CONFIGS).glob("experiment/infer/*.yaml"))
PAPER = {
    "vit_s16_paper": {
        "attention.q_proj": "(1,192,48,2)(2,48,192,1)",
        "attention.k_proj": "(1,192,48,2)(2,48,192,1)",
        "attention.v_proj": "(1,192,48,2)(2,48,192,1)",
        "feed_forward.up": "(1,768,192,2)(6,64,64,1)",
        "feed_forward.down": "(1,128,128,3)(6,64,256,1)",
    },
    "gpt2_medium_paper": {"feed_forward.down": "(1,64,256,16)(64,64,64,1)"},
}
ALL = ["attention.k_proj", "attention.out_proj", "attention.q_proj", "attention.v_proj"]
ALL += ["feed_forward.down", "feed_forward.up"]
# (dim, depth) of the whole models.
SIZES = {"vit_s16": (384, 12), "vit_b16": (768, 12), "gpt2_medium": (1024, 24)}


def composed(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(
            compose("infer", overrides=[f"experiment=infer/{name}", "output_dir=x", *overrides]), resolve=True
        )


def built(cfg, **changes):
    torch.manual_seed(0)
    model_args = cfg["model_args"] | changes
    return build_model(cfg["model"], cfg["structure"], model_args)[0], model_args


def test_they_are_all_here():
    assert set(EXPERIMENTS) >= {*PAPER, "vit_s16_monarch", "vit_b16_monarch", "gpt2_medium_monarch"}
    assert set(EXPERIMENTS) >= {"layer", "feed_forward", "block"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_sizes_and_chains(name):
    cfg = composed(name, *(["model.depth=1"] if "_" in name and name != "feed_forward" else []))
    assert cfg["dtype"] == ["float32", "bfloat16"] and cfg["compile"] == [False, True, "graphed"]
    assert cfg["one_factor"] and cfg["free"] and cfg["layout"] == "batch_first"
    kind = name.rpartition("_")[0]
    if kind in SIZES:
        full = composed(name)["model"]
        assert (full["dim"], full["depth"]) == SIZES[kind]
        assert cfg["batch_size"] == (32 if kind == "gpt2_medium" else 128)
    model, _ = built(cfg, **({"vocab_size": 50} if "vocab_size" in cfg["model_args"] else {}))
    chains = {name.removeprefix("blocks.0."): layer.chain for name, layer in structured_layers(model).items()}
    if name in PAPER:
        assert {key: chain.spec for key, chain in chains.items()} == PAPER[name]
    elif kind in SIZES:
        assert sorted(chains) == ALL
        assert {tuple(p.n_blocks for p in chain) for chain in chains.values()} == {(4, 4)}
    assert chains and disguised_chains(model) == ()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_they_run_at_a_small_size(name):
    small = {"layer": [], "feed_forward": [], "block": []}.get(name, ["model.depth=1"])
    cfg = composed(name, *small)
    sizes = {"input_shape": (3, 32, 32)} if "vit" in name else {"input_shape": (4, 64)}
    sizes = {"vocab_size": 20, "context_length": 4} if "gpt" in name else sizes
    model, model_args = built(cfg, **sizes)
    plan = TimingPlan(warmup=1, budget_s=0.0, min_samples=1, max_samples=1)
    sweep = ModelSweep(
        batch_sizes=(1,),
        dtypes=cfg["dtype"],
        epilogue=cfg["epilogue"],
        frozen=cfg["freeze"] if isinstance(cfg["freeze"], list) else [cfg["freeze"]],
        one_factor=cfg["one_factor"],
        free=cfg["free"],
        roofline=False,
        oracle_rows=1,
        plan=plan,
    )
    rows = [r for group in time_model(model, name, "s", lambda n: random_input(model_args, n), sweep) for r in group]
    assert {(row.status, row.reason) for row in rows} == {("timed", "")}
    variants = {row.variant for row in rows}
    assert {"dense", "s, auto", "linears free", "dense as one factor, auto"} <= variants
    assert ("dense, epilogue" in variants) == ("s, auto, frozen" in variants) == cfg["epilogue"]
