"""How a run of ``python train.py`` ends: what it leaves behind, what it says, and its exit code."""

import csv
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["model.width=32", "structure.options.blocks=4", "data.batch_size=128", "trainer.max_epochs=1"]
QUICK += ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def train(script):
    return script("train")


@pytest.fixture
def run(train, tmp_path, monkeypatch, capsys):
    """Run train.py with overrides in ``tmp_path``; returns what it printed."""
    threads = torch.get_num_threads()

    def command(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}", *QUICK, *overrides])
        train.main()
        return capsys.readouterr().out

    yield command
    torch.set_num_threads(threads)


def test_a_training_that_max_steps_ends_in_an_epoch_leaves_its_last_checkpoint(run, tmp_path):
    printed = run("trainer.max_steps=3")
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert f"checkpoint (monarch, seed 0): {last}" in printed
    # Goes on from there: 9 steps per epoch. A run folder stands for its last checkpoint.
    run("trainer.max_steps=-1", "trainer.max_epochs=2", f"ckpt_path={tmp_path}", "optim.schedule_steps=18")
    assert torch.load(last, weights_only=True)["global_step"] == 18


def test_a_resumed_run_logs_every_step_once(run, train, tmp_path, monkeypatch):
    options = ["trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.val_check_interval=4"]
    batch_start = train.LitModule.on_train_batch_start

    def killed(self, batch, batch_idx):
        if self.global_step == 15:
            raise RuntimeError("killed")
        batch_start(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.LitModule, "on_train_batch_start", killed)
        run(*options)
    # 9 steps per epoch, validated after 4 and 8 of each.
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 13
    assert "\n14," in (tmp_path / "metrics.csv").read_text()
    run(*options, f"ckpt_path={tmp_path}")
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(18))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [3, 7, 12, 16]
    assert [int(row["step"]) for row in rows if row["test/loss"]] == [18]


def test_another_optimizer_on_resuming_is_a_mistake(run, tmp_path):
    """The restored one would win, or not fit, while config.yaml and metrics.csv show the new options."""
    run("trainer.max_steps=3")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".log"}
    with pytest.raises(SystemExit) as caught:
        run(f"ckpt_path={tmp_path}", "optim.lr=1e-5", "optim.weight_decay=0")
    message = str(caught.value.code)
    assert message.startswith(f"error: {tmp_path / 'checkpoints' / 'last.ckpt'}: ")
    assert "\n" not in message
    assert "optim.lr is 1e-05, expected 0.003; optim.weight_decay is 0, expected 0.05" in message
    assert {path: path.read_bytes() for path in before} == before


def test_without_checkpoint_callbacks_none_is_written(run, tmp_path):
    printed = run("~callbacks.best", "~callbacks.last")
    assert "none written" in printed
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_run_without_a_test_ends_with_its_table(run):
    printed = run("trainer.limit_test_batches=0")
    assert "last validation loss" in printed
    assert "test accuracy" not in printed


@pytest.mark.parametrize(
    "override", ["structure.options.blocks=abc", "structure.options.rank=0", "structure.max_kept=0.01"]
)
def test_a_structure_that_replaces_nothing_is_a_mistake(run, tmp_path, override):
    """Otherwise a dense model would be trained under the structure's name."""
    with pytest.raises(SystemExit, match=r"all are skipped: hidden\.0: ") as caught:
        run(override)
    assert "\n" not in str(caught.value.code)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_sigterm_is_no_success(run, train, monkeypatch, capsys):
    def killed(*_):
        raise SIGTERMException

    monkeypatch.setattr(train, "train", killed)
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 143
    assert capsys.readouterr().err == "error: ended by SIGTERM before the work was done\n"


@pytest.mark.parametrize("rates", ["-1,1e-3", "1e-3,-1"])
def test_a_mistake_in_one_job_of_a_sweep_does_not_stop_the_others(train, tmp_path, monkeypatch, capsys, rates):
    sweep = ["--multirun", f"hydra.sweep.dir={tmp_path}", *QUICK, f"optim.lr={rates}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *sweep])
    with pytest.raises(SystemExit, match="error: lr = -1"):
        train.main()
    printed = capsys.readouterr()
    assert printed.out.count("test accuracy") == 1
    job = rates.split(",").index("-1")
    assert f"error: job {job}: lr = -1: expected a positive number" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("experiment=null", "NoneType"),
        ("output_dir=/proc/none", "/proc/none"),
        ("hydra.run.dir=/proc/none", "/proc/none"),
        (f"ckpt_path={ROOT}", r"/checkpoints/last\.ckpt: no such file"),
    ],
)
def test_what_fails_before_or_around_the_training_is_one_line(run, override, named):
    with pytest.raises(SystemExit, match=named) as caught:
        run(override)
    assert re.fullmatch("error: .*", str(caught.value.code))
