"""How long a step takes, and where its time goes."""

import json
import time

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from structlayers import Chain, KSLinear
from structlayers.errors import ConfigError
from structlayers.lit import LitModule
from structlayers.lit.callbacks import StepTimer
from structlayers.lit.profiler import OperatorProfiler


def fit(*callbacks: pl.Callback, model: nn.Module | None = None, validate: bool = False, **options) -> pl.Trainer:
    loader = DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(3, (32,))), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **quiet,
        **{"max_epochs": 1, **options},
    )
    module = LitModule(model or nn.Linear(8, 3), "classification", lr=0.1)
    trainer.fit(module, loader, *([loader] if validate else []))
    return trainer


class Slow(nn.Linear):
    """Takes its time: in every forward pass, and as much longer in those of validation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01 if self.training else 0.05)
        return super().forward(x)


class Clutter(pl.Callback):
    """What may happen between two steps."""

    def on_train_batch_end(self, *_: object) -> None:
        time.sleep(0.05)


# ---- StepTimer


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_is_its_forward_and_backward_passes_and_no_more(accumulated):
    timer = StepTimer(warmup=1)
    fit(
        timer,
        Clutter(),
        model=Slow(8, 3),
        validate=True,
        val_check_interval=4,
        limit_val_batches=1,
        accumulate_grad_batches=accumulated,
    )
    # One pass a batch; between the batches of one step the clutter counts.
    least = 10 * accumulated + 50 * (accumulated - 1)
    assert least <= timer.step_ms < least + 30


def test_a_validation_in_the_middle_of_a_step_is_not_timed():
    timer = StepTimer(warmup=0)
    fit(timer, model=Slow(8, 3), validate=True, val_check_interval=1, accumulate_grad_batches=2, limit_val_batches=1)
    # Every step has a validation between its two batches, or before its first one.
    assert timer.step_ms is None


def test_the_first_steps_and_old_ones_do_not_count():
    timer = StepTimer(warmup=5)
    fit(timer, max_steps=5)
    assert timer.step_ms is None
    timer = StepTimer(warmup=5, most=2)
    fit(timer, max_steps=8)
    assert len(timer._steps) == 2


def test_a_timer_starts_anew_with_each_training():
    timer = StepTimer(warmup=0)
    fit(timer, model=Slow(8, 3))
    slow = timer.step_ms
    fit(timer)
    assert timer.step_ms < slow


@pytest.mark.parametrize("options", [{"warmup": -1}, {"most": 0}])
def test_impossible_timers(options):
    with pytest.raises(ConfigError, match="StepTimer"):
        StepTimer(**options)


# ---- OperatorProfiler


def test_operators_of_a_few_training_batches(tmp_path):
    model = nn.Sequential(KSLinear(Chain.parse("(1,4,4,2)(2,4,4,1)")), nn.Linear(8, 3))
    profiler = OperatorProfiler(str(tmp_path), wait=2, steps=3, rows=100)
    fit(model=model, validate=True, profiler=profiler)
    text = (tmp_path / "fit-profile.txt").read_text()
    assert "operators of 3 training batches, after the first 2" in text
    # Three steps of the optimizer, three products forward with each of two factors.
    rows = [line.split() for line in text.splitlines() if line.count("%") == 2]
    calls = {row[0]: int(row[-1]) for row in rows if row[0] != "Name"}
    assert calls["Optimizer.step#AdamW.step"] == 3
    assert calls["_RecordedLinear"] == 6
    trace = json.loads((tmp_path / "profile.json").read_text())
    assert any(event.get("name") == "aten::bmm" for event in trace["traceEvents"])


def test_a_training_that_ends_early_says_so(tmp_path):
    fit(profiler=OperatorProfiler(str(tmp_path), wait=20))
    assert "ended within its first 20 batches" in (tmp_path / "fit-profile.txt").read_text()
    fit(profiler=OperatorProfiler(str(tmp_path), filename="short", wait=6, steps=9))
    assert "operators of 2 training batches" in (tmp_path / "fit-short.txt").read_text()


@pytest.mark.parametrize("options", [{"wait": -1}, {"steps": 0}, {"rows": 0}])
def test_impossible_profilers(options, tmp_path):
    with pytest.raises(ConfigError, match="profiler: "):
        OperatorProfiler(str(tmp_path), **options)
