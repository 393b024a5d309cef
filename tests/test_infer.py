"""``python infer.py``: both ways in, its files, and its mistakes."""

import math
import sys
from pathlib import Path

import pytest
import torch

from structlayers.bench.rows import read_rows
from structlayers.build import build_model
from structlayers.data import DigitsDataModule

QUICK = ["bench=quick", "bench.max_samples=3", "roofline=false", "threads=1"]


@pytest.fixture(scope="module")
def infer(script):
    return script("infer")


@pytest.fixture
def run(infer, tmp_path, monkeypatch, capsys):
    """Run infer.py with overrides: its run folder and what it printed, or the SystemExit that it ends in."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()

    def command(*overrides: str) -> tuple[Path, str]:
        folder = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["infer.py", f"hydra.run.dir={folder}", *QUICK, *overrides])
        infer.main()
        return folder, capsys.readouterr().out

    yield command
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run folder as train.py leaves it, of a small model with random weights."""
    torch.manual_seed(0)
    config = {
        "model": {"_target_": "structlayers.models.MLP", "width": 32, "depth": 2},
        "structure": {"structure": "monarch", "options": {"blocks": 2}, "exclude": ["head"]},
        "data": {"_target_": "structlayers.data.DigitsDataModule", "eval_batch_size": 100},
    }
    model_args = {"input_shape": (1, 8, 8), "num_classes": 10}
    model, _ = build_model(config["model"], config["structure"], model_args)
    folder = tmp_path_factory.mktemp("training")
    path = folder / "checkpoints" / "best.ckpt"
    path.parent.mkdir()
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    stored = {"task": "classification", "model_args": model_args, "config": config}
    torch.save({"state_dict": weights, "hyper_parameters": stored}, path)
    return folder


def test_random_weights(run):
    folder, out = run(
        "model.width=64", "structure.options.blocks=4", "batch_size=[1,5]", "backend=[auto,einsum]", "commit=abc"
    )
    rows = read_rows(folder / "rows.jsonl")
    assert [(row.variant, row.batch, row.status) for row in rows] == [
        (variant, batch, "timed") for batch in (1, 5) for variant in ("dense", "monarch, auto", "monarch, einsum")
    ]
    assert all(row.p20_ms <= row.p50_ms <= row.p80_ms for row in rows)
    assert all(row.machine["torch"] == torch.__version__ and row.metrics == {} for row in rows)
    assert {row.machine["commit"] for row in rows} == {"abc"}
    assert (folder / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert "monarch, einsum" in out and "MLP, random weights" in out


def test_a_killed_run_goes_on_in_its_folder(run):
    arguments = ["model.width=64", "structure.options.blocks=4", "plot=false", "batch_size=[1,2]"]
    folder, _ = run(*arguments[:3], "batch_size=1")
    first = (folder / "rows.jsonl").read_text()
    # A kill leaves half a line.
    (folder / "rows.jsonl").write_text(first + first[:100])
    folder, out = run(*arguments)
    assert (folder / "rows.jsonl").read_text().startswith(first)
    assert [row.batch for row in read_rows(folder / "rows.jsonl")] == [1, 1, 2, 2]
    assert "batch 1: " not in out and "float32, batch 2: 2 variants done" in out
    before = (folder / "rows.jsonl").read_text()
    _, out = run(*arguments)
    assert (folder / "rows.jsonl").read_text() == before and "monarch, auto" in out


def test_how_rows_call_a_structure(infer):
    spec = {"structure": "(1,2,2,1)"}
    assert infer.structure_name({"structure": "monarch"}) == "monarch"
    assert infer.structure_name({}) == "dense"
    assert infer.structure_name(spec) == infer.structure_name({"rules": [spec, spec]}) == "chain"
    assert infer.structure_name({"rules": [spec, {"structure": "monarch"}]}) == "mixed"


def test_an_experiment_at_a_small_size(run):
    small = ["experiment=infer/block", "model_args={input_shape: [4, 16]}", "batch_size=2", "dtype=float32"]
    folder, out = run(*small, "compile=[false,graphed]", "freeze=false", "energy=true", "name=tiny block")
    rows = read_rows(folder / "rows.jsonl")
    assert {row.case for row in rows} == {"tiny block"}
    assert [row.variant for row in rows if row.status == "timed"] == [
        "dense",
        "dense, epilogue",
        "dense as one factor, auto",
        "monarch, auto",
        "linears free",
    ]
    assert {row.energy_reason for row in rows if row.status == "timed"} == {
        "NVML reads NVIDIA GPUs; this device is cpu"
    }
    assert "captures CUDA graphs" in out


def test_a_checkpoint_with_its_metric(run, checkpoint):
    folder, out = run(f"ckpt_path={checkpoint}", "batch_size=500", "dtype=[float32,bfloat16]", "plot=false")
    rows = read_rows(folder / "rows.jsonl")
    assert [(row.variant, row.dtype, row.batch, row.status) for row in rows] == [
        (variant, dtype, 500, "timed") for dtype in ("float32", "bfloat16") for variant in ("dense", "monarch, auto")
    ], [row.reason for row in rows]
    assert not (folder / "latency.png").exists()

    # The metric, computed by hand.
    stored = torch.load(checkpoint / "checkpoints" / "best.ckpt", weights_only=True)
    config = stored["hyper_parameters"]["config"]
    model, _ = build_model(config["model"], config["structure"], stored["hyper_parameters"]["model_args"])
    model.load_state_dict({name.removeprefix("model."): value for name, value in stored["state_dict"].items()})
    data = DigitsDataModule()
    data.setup()
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    accuracy = float((model.eval()(images).argmax(-1) == labels).float().mean())
    assert math.isclose(rows[0].metrics["accuracy"], accuracy, abs_tol=1e-6)
    assert f"test accuracy {accuracy:.2%}" in out


def test_a_checkpoint_without_its_data(run, checkpoint):
    best = checkpoint / "checkpoints" / "best.ckpt"
    folder, out = run(f"ckpt_path={best}", "evaluate=false", "batch_size=3", "plot=false")
    assert [row.status for row in read_rows(folder / "rows.jsonl")] == ["timed", "timed"]
    assert "test accuracy" not in out


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["backend=tpu"], "'tpu'"),
        (["backend=[auto,tpu]"], "'tpu'"),
        (["dtype=float8"], "'float8'"),
        (["layout=sideways"], "'sideways'"),
        (["compile=quickly"], "'quickly'"),
        (["batch_size=0"], "batch size = 0"),
        (["device=tpu"], "'tpu'"),
        (["threads=0"], "threads = 0"),
        (["float32_precision=low"], "'low'"),
        (["bench.warmup=0"], "warmup=0"),
        (["batchsize=4"], "batchsize"),
        (["structure=mnoarch"], "mnoarch"),
        (["model_args={num_classes: 2}"], "input_shape"),
        (["oracle_rows=abc"], "oracle_rows = 'abc'"),
        (["seed=abc"], "seed = 'abc'"),
        (["threads=true"], "threads = True"),
        (["model_args=5"], "model_args = 5"),
        (["freeze=foo"], "freeze = 'foo'"),
        (["evaluate=foo"], "evaluate = 'foo'"),
        (["bench.budget_s=abc"], "budget_s = 'abc'"),
        (["+bench.foo=1"], "bench.foo = 1: expected one of warmup"),
        (["ckpt_path=5"], "ckpt_path = 5"),
        (["ckpt_path=nowhere/best.ckpt"], "nowhere/best.ckpt: no such file"),
        (["ckpt_path=nowhere/best.ckpt", "model.width=64"], "model.width=64"),
        (["ckpt_path=nowhere/best.ckpt", "structure=butterfly"], "structure=butterfly"),
    ],
)
def test_mistakes_end_in_one_line(run, overrides, named):
    with pytest.raises(SystemExit) as exit:
        run(*overrides)
    assert isinstance(exit.value.code, str)  # which is exit code 1
    assert exit.value.code.startswith("error: ") and named in exit.value.code
    assert "\n" not in exit.value.code


def test_a_truncated_checkpoint_is_named_and_left_alone(run, checkpoint, tmp_path):
    path = tmp_path / "cut.ckpt"
    path.write_bytes((checkpoint / "checkpoints" / "best.ckpt").read_bytes()[:-500])
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"cut\.ckpt.*cannot be read"):
        run(f"ckpt_path={path}")
    assert path.read_bytes() == before
    assert not list((tmp_path / "run").glob("rows.jsonl"))


def test_a_checkpoint_of_a_training_that_diverged_is_named(run, checkpoint, tmp_path):
    content = torch.load(checkpoint / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"]["model.head.bias"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(SystemExit, match=r"error: head\.bias: 10 of 10 values are not finite"):
        run(f"ckpt_path={tmp_path}/nan.ckpt")


def test_a_checkpoint_whose_weights_are_another_structures(run, checkpoint, tmp_path):
    stored = torch.load(checkpoint / "checkpoints" / "best.ckpt", weights_only=True)
    stored["hyper_parameters"]["config"]["structure"]["options"] = {"blocks": 4}
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match="another model or structure"):
        run(f"ckpt_path={tmp_path / 'other.ckpt'}")


def test_nothing_timed_is_a_failure_that_keeps_its_rows(run, monkeypatch):
    # A check that nothing passes.
    monkeypatch.setattr("structlayers.bench.models.model_tolerance", lambda layer_tolerance, n_layers: 0.0)
    with pytest.raises(SystemExit, match="no variant could be timed"):
        run("model.width=32", "structure.options.blocks=4", "batch_size=2")
