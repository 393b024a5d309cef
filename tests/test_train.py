"""``python train.py``: its files, its table, its comparison, resuming, and its mistakes."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["model.width=64", "model.depth=2", "structure.options.blocks=4", "data.batch_size=128"]
QUICK = [*SMALL, "trainer.max_epochs=2", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def train(script):
    return script("train")


@pytest.fixture
def run(train, tmp_path, monkeypatch, capsys):
    """Run train.py with overrides: its run folder and what it printed, or the SystemExit that it ends in."""
    threads = torch.get_num_threads()

    def command(*overrides: str, folder: str = "run") -> tuple[Path, str]:
        path = tmp_path / folder
        monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={path}", *overrides])
        train.main()
        return path, capsys.readouterr().out

    yield command
    torch.set_num_threads(threads)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    return (
        all(map(plain, value)) if type(value) in (list, tuple) else type(value) in (str, int, float, bool, type(None))
    )


def test_run_folder_and_table(run):
    folder, printed = run(*QUICK)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    stored = checkpoint["hyper_parameters"]
    assert plain(stored)
    assert stored["config"] == OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert stored["config"]["output_dir"] == str(folder)
    assert stored["task"] == "classification"
    table = printed.partition("\n\n")[2]
    rows = (
        "parameters",
        "replaced linears keep",
        "FLOPs per sample",
        "test accuracy",
        "last validation loss",
        "time per step",
    )
    for row in (*rows, "wall time"):
        assert re.search(rf"^{row}.*\d", table, re.MULTILINE), row
    assert re.search(r"^chains dense in disguise +0 of 2$", table, re.MULTILINE)
    assert f"checkpoint (monarch, seed 0): {folder / 'checkpoints' / 'best.ckpt'}" in table
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows if row["val/accuracy"]] == ["0", "1"]
    assert any(row["test/accuracy"] for row in rows)


def test_compare_with_dense_over_seeds(run):
    folder, printed = run(*QUICK, "compare=dense", "seeds=2", "seed=3")
    for below in (".", "seed_4", "dense", "dense/seed_4"):
        assert (folder / below / "checkpoints" / "best.ckpt").is_file()
        assert (folder / below / "metrics.csv").is_file()
    configs = {below: OmegaConf.load(folder / below / "config.yaml") for below in ("seed_4", "dense/seed_4")}
    assert [cfg.seed for cfg in configs.values()] == [4, 4]
    assert [cfg.data.seed for cfg in configs.values()] == [4, 4]
    assert configs["dense/seed_4"].structure == {}
    assert configs["dense/seed_4"].optim == configs["seed_4"].optim
    assert re.search(r"^mean of 2 seeds +monarch +dense$", printed, re.MULTILINE)
    found = re.search(r"^test accuracy +([\d.]+)% +([\d.]+)%\n +of each seed +(.*)$", printed, re.MULTILINE)
    values = [float(value) for value in re.findall(r"[\d.]+", found[3])]
    assert float(found[1]) == pytest.approx((values[0] + values[1]) / 2, abs=0.01)
    assert float(found[2]) == pytest.approx((values[2] + values[3]) / 2, abs=0.01)


def test_compare_with_dense_shows_loss_and_time_after_equal_steps(run):
    folder, printed = run(*QUICK, "compare=dense")
    assert re.search(r"^training steps +18 +18$", printed, re.MULTILINE)
    assert re.search(r"^replaced linears keep +\d+\.\d% +-$", printed, re.MULTILINE)
    for label, unit in (("last validation loss (nats)", ""), ("time per step", " ms")):
        pattern = rf"^{re.escape(label)} +([\d.]+){unit} +([\d.]+){unit}\n  monarch / dense +([\d.]+) +-$"
        structured, dense, ratio = map(float, re.search(pattern, printed, re.MULTILINE).groups())
        assert ratio == pytest.approx(structured / dense, abs=0.02)
        if not unit:
            with (folder / "dense" / "metrics.csv").open() as file:
                losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
            assert dense == pytest.approx(losses[-1], abs=1e-4)


def test_mixed_precision_keeps_float32_weights_and_learns(run):
    folder, printed = run(*QUICK, "trainer.max_epochs=8", "trainer.precision=bf16-mixed")
    assert {value.dtype for value in weights(folder).values() if value.is_floating_point()} == {torch.float32}
    assert float(re.search(r"^test accuracy +([\d.]+)%", printed, re.MULTILINE)[1]) > 70


def test_compiled_in_mixed_precision_and_recomputing(run, monkeypatch):
    # Inductor takes a minute and changes nothing about what train.py does.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    options = ["trainer.precision=bf16-mixed", "compile=true", "recompute=true"]
    folder, printed = run(*QUICK, *options)
    assert not [name for name in weights(folder) if "_orig_mod" in name]
    assert "test accuracy" in printed


@pytest.mark.parametrize("profiler", ["simple", "pytorch"])
def test_a_profiler_shows_where_the_time_goes(run, profiler):
    folder, printed = run(*QUICK, f"profiler={profiler}")
    assert ("run_training_batch" if profiler == "simple" else "_RecordedLinear") in printed
    assert f"all of it: {folder / 'profile' / 'fit-profile.txt'}" in printed
    assert (folder / "profile" / "profile.json").is_file() == (profiler == "pytorch")


def test_the_progress_line_shows_samples_per_second(train, tmp_path, monkeypatch, capsys):
    quick = [option for option in QUICK if "progress_bar" not in option]
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}", *quick, "callbacks.progress_bar.log_every_s=0"]
    )
    train.main()
    assert "samples/s" in capsys.readouterr().err


TINY = ["trainer=cpu", "trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.enable_progress_bar=false"]
TINY += ["compile=false", "model.dim=32", "model.depth=1", "model.heads=2", "compare=dense"]


def test_the_experiment_of_a_gpus_size_for_images(run):
    _, printed = run("experiment=vit_gpu", "data=digits", "data.batch_size=8", *TINY)
    assert re.search(r"^replaced linears keep +37\.5% +-$", printed, re.MULTILINE)
    assert re.search(r"^training steps +4 +4$", printed, re.MULTILINE)


def test_the_experiment_of_a_gpus_size_for_text(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word. " * 300)
    sizes = ["data.context_length=16", "data.batch_size=4", "data.eval_batch_size=4"]
    _, printed = run("experiment=gpt_gpu", "data=text", f"data.path={text}", *sizes, *TINY)
    assert re.search(r"^replaced linears keep +37\.5% +-$", printed, re.MULTILINE)
    assert re.search(r"^training steps +4 +4$", printed, re.MULTILINE)


def test_same_seed_same_weights(run):
    first, second, other = (weights(run(*QUICK, f"seed={seed}", folder=f"{i}")[0]) for i, seed in enumerate((1, 1, 2)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_resume_with_ckpt_path(run):
    whole, _ = run(*QUICK, folder="whole")
    # 9 steps per epoch.
    half, _ = run(*QUICK, "trainer.max_epochs=1", "optim.schedule_steps=18", folder="half")
    before = (half / "checkpoints" / "last.ckpt").read_bytes()
    resumed, _ = run(*QUICK, f"ckpt_path={half}/checkpoints/last.ckpt", folder="resumed")
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert (half / "checkpoints" / "last.ckpt").read_bytes() == before


def test_multirun(train, tmp_path, monkeypatch, capsys):
    overrides = [*QUICK, f"hydra.sweep.dir={tmp_path}", "optim.lr=1e-3,2e-3"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--multirun", *overrides])
    train.main()
    assert [OmegaConf.load(tmp_path / job / "config.yaml").optim.lr for job in "01"] == [1e-3, 2e-3]
    assert capsys.readouterr().out.count("test accuracy") == 2


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("optm.lr=1", ["optm.lr"]),
        ("optim.lrr=1", ["optim.lrr"]),
        ("structure=monach", ["structure/monach", "monarch", "butterfly"]),
        ("structure.options.block=4", ["structure.options.block"]),
        ("trainer.max_epoch=3", ["max_epoch"]),
        ("+trainer.max_epoch=3", ["Trainer", "max_epoch"]),
        ("+optim.momentum=0.9", ["momentum"]),
        ("+model.widht=3", ["widht"]),
        ("+data.shuffle=true", ["shuffle"]),
        ("optim.rule=fast", ["'fast'", "structure"]),
        ("optim.warmup=10", ["warmup", "10"]),
        ("optim.lr=-1", ["lr", "-1"]),
        ("backend=fast", ["'fast'", "bmm"]),
        ("compare=sparse", ["compare", "'sparse'", "dense"]),
        ("optim.lr=abc", ["lr", "'abc'"]),
        ("seed=abc", ["seed", "'abc'"]),
        ("seeds=0", ["seeds", "0"]),
        ("compile=no_thanks", ["compile", "no_thanks"]),
        ("recompute=3", ["recompute", "3"]),
        ("profiler=slow", ["profiler/slow", "pytorch", "simple"]),
        ("trainer.profiler=simple", ["trainer.profiler"]),
        ("threads=0", ["threads", "0"]),
        ("trainer.precision=float17", ["float17"]),
        ("ckpt_path=none.ckpt", ["none.ckpt", "no such file"]),
        ("lr", ["lr"]),
        ("trainer.max_epochs=abc", ["trainer.max_epochs = 'abc'", "integer"]),
        ("trainer.gradient_clip_val=nan", ["trainer.gradient_clip_val = nan", "finite"]),
        # Lightning's own words, when it knows the number of batches.
        ("trainer.val_check_interval=1000", ["val_check_interval", "1000", "9"]),
        ("optim.betas=[0.9,1.5]", ["betas = [0.9, 1.5]", "below 1"]),
        ("optim.no_decay=[5]", ["no_decay = [5]", "pattern"]),
        ("structure.scale=foo", ["scale = 'foo'", "variance"]),
        ("structure.options=5", ["options = 5", "mapping"]),
        ("structure.include=5", ["include = 5", "pattern"]),
        ("+structure.rules=5", ["rule 5", "mapping"]),
        ("seed=4294967296", ["seed = 4294967296", "4294967295"]),
        ("threads=true", ["threads = True", "integer"]),
        ("data.val_fraction=0.001", ["val_fraction = 0.001", "classes"]),
        ("model._target_=3", ["_target_ = 3", "text"]),
        ("ckpt_path=5", ["ckpt_path = 5", "text"]),
        ("callbacks.last.every_n_steps=abc", ["every_n_steps = 'abc'", "integer"]),
        ("callbacks.best.monitor=val/acc", ["callbacks.best.monitor = 'val/acc'", "val/accuracy"]),
    ],
)
def test_mistake_is_one_line(run, override, names, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(*QUICK, override)
    message = str(caught.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert all(name in message for name in names), message
    assert not list(tmp_path.rglob("*.ckpt"))


def test_absent_data_are_named_before_anything_is_written(run, tmp_path):
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        run("experiment=fashion_mnist", f"data.data_dir={tmp_path}/nowhere")
    assert not list(tmp_path.rglob("config.yaml"))


def test_compare_of_dense_with_itself_is_a_mistake(run):
    with pytest.raises(SystemExit, match="structure=dense"):
        run("structure=dense", "compare=dense")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_absent_wandb_is_named(run):
    with pytest.raises(SystemExit, match="pip install wandb"):
        run(*QUICK, "logger=wandb")


def test_wandb_offline(run):
    pytest.importorskip("wandb")
    folder, _ = run(*QUICK, "logger=wandb", "logger.wandb.offline=true")
    assert list(folder.glob("wandb/offline-run-*"))
    assert (folder / "metrics.csv").is_file()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def replace_by_text(path: Path) -> None:
    path.write_text("not a checkpoint")


def replace_by_weights(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("damage", "overrides", "names"),
    [
        (cut, [], ["truncated"]),
        (replace_by_text, [], ["cannot be read"]),
        (replace_by_weights, [], ["state_dict", "weight"]),
        (None, ["structure.options.blocks=8"], ["hidden.1", "(1,16,16,4)(4,16,16,1)", "(1,8,8,8)(8,8,8,1)"]),
        (None, ["model.width=128"], ["hidden.0 chain", "(1,16,16,4)", "(1,32,16,4)"]),
    ],
)
def test_bad_checkpoint_changes_nothing(run, damage, overrides, names):
    folder, _ = run(*QUICK, "trainer.max_epochs=1")
    last = folder / "checkpoints" / "last.ckpt"
    if damage:
        damage(last)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    with pytest.raises(SystemExit) as caught:
        run(*QUICK, f"ckpt_path={last}", *overrides)
    message = str(caught.value.code)
    assert "\n" not in message
    assert all(name in message for name in [str(last), *names]), message
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("override", ["optm.lr=1", "optim.lr=-1"])
def test_mistake_on_the_command_line(tmp_path, override):
    command = [sys.executable, "train.py", f"hydra.run.dir={tmp_path}", override]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_checkpoint(run, tmp_path):
    options = [*SMALL, "trainer.max_epochs=30", "trainer.accelerator=cpu", "callbacks.last.every_n_steps=1"]
    whole, _ = run(*options, folder="whole")
    process = subprocess.Popen([sys.executable, "train.py", f"hydra.run.dir={tmp_path}/killed", *options], cwd=ROOT)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    while not last.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.kill()
    assert process.wait() == -9
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 270
    resumed, _ = run(*options, f"ckpt_path={last}", folder="resumed")
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


@pytest.mark.slow
def test_two_processes(tmp_path):
    options = [*QUICK, "trainer=ddp", "trainer.devices=2", "compare=dense"]
    done = subprocess.run(
        [sys.executable, "train.py", f"hydra.run.dir={tmp_path}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert (tmp_path / "dense" / "checkpoints" / "best.ckpt").is_file()
