"""Callbacks: a progress bar in samples per second, the time of a step, checkpoints to resume a killed run from."""

import shutil
import sys
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from tqdm import tqdm

from structlayers.errors import ConfigError
from structlayers.values import NOT_NEGATIVE, check, integer


class ProgressBar(LightningProgressBar):
    """One bar for the whole training: samples done, samples per second, loss, newest validation metrics.

    On a terminal it is redrawn five times per second; elsewhere it writes once per ``log_every_s`` seconds.
    """

    def __init__(self, log_every_s: float = 10.0) -> None:
        super().__init__()
        check(locals(), {"log_every_s": NOT_NEGATIVE})
        self.log_every_s = log_every_s
        self._enabled = True
        self._bar: tqdm | None = None
        # Samples not shown yet, and when to show them.
        self._pending = 0
        self._next_s = 0.0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        samples = len(batch[0]) * trainer.world_size
        if self._bar is None:
            # Opened after the first step, so that compilation or warm-up does not spoil the rate.
            per_step = samples * trainer.accumulate_grad_batches
            self._bar = tqdm(
                total=int(trainer.estimated_stepping_batches) * per_step,
                initial=trainer.global_step * per_step,
                unit="samples",
                unit_scale=True,
                # Drawn when told to, not by a clock of its own.
                mininterval=0,
                miniters=1,
                dynamic_ncols=True,
                disable=not self._enabled,
            )
        else:
            self._pending += samples
        if time.monotonic() >= self._next_s:
            # Only now: reading the loss waits for the device.
            self._show(trainer, {"loss": float(outputs["loss"])})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._show(trainer, {})
            self._bar.close()
            self._bar = None

    def _show(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        assert self._bar is not None
        known, wanted = trainer.callback_metrics, ("val/loss", "val/accuracy", "val/bits_per_byte")
        values |= {name: float(known[name]) for name in wanted if name in known}
        shown = {name: f"{value:.3f}" for name, value in values.items()}
        self._bar.set_postfix({"epoch": trainer.current_epoch, **shown}, refresh=False)
        self._bar.update(self._pending)
        self._pending = 0
        self._next_s = time.monotonic() + (0.2 if sys.stderr.isatty() else self.log_every_s)


class StepTimer(pl.Callback):
    """Time of an optimizer step: forward, backward and update, without the loading, validation and checkpoints between.

    On a GPU between CUDA events, so that no step waits for the device. The first ``warmup`` steps of a training, which
    compile and allocate, and all but the newest ``most`` are left out.
    """

    def __init__(self, warmup: int = 5, most: int = 1000) -> None:
        if warmup < 0 or most < 1:
            raise ConfigError(f"StepTimer(warmup={warmup}, most={most}): expected warmup >= 0 and most >= 1")
        self.warmup = warmup
        self._steps: deque[tuple[_Moment, _Moment]] = deque(maxlen=most)
        self._start: _Moment | None = None
        self._between_steps = True
        self._counted_from = self._step = 0

    @property
    def step_ms(self) -> float | None:
        """Median over the steps, in milliseconds; None where none was timed. Waits for the device."""
        return median(_between_ms(*step) for step in self._steps) if self._steps else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.clear()
        self._start, self._between_steps = None, True
        self._step = trainer.global_step
        self._counted_from = self._step + self.warmup

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A step is several batches where gradients accumulate.
        if self._between_steps:
            self._start, self._between_steps = _moment(pl_module.device), False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In the middle of a step: this one is not counted.
        self._start = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        if self._start is not None and self._step >= self._counted_from:
            self._steps.append((self._start, _moment(pl_module.device)))
        self._step, self._start, self._between_steps = trainer.global_step, None, True


# A point of the device's own time on a GPU, else of the host's in seconds.
_Moment = torch.cuda.Event | float


def _moment(device: torch.device) -> _Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_ms(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt`` of the monitored metric; a run resumed in another folder takes the best so far along."""

    def __init__(self, dirpath: str, monitor: str = "val/loss", mode: str = "min") -> None:
        # After validation, so that it is done when LastCheckpoint writes what is the best so far.
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self._copies = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._copies = trainer.is_global_zero

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["dirpath"] != self.dirpath:
            state_dict = {**state_dict, "dirpath": self.dirpath, **self._bring_along(state_dict)}
        super().load_state_dict(state_dict)

    def _bring_along(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        old = Path(state_dict["best_model_path"])
        if not old.is_file():
            # Nothing to compare with, so the next validation makes a new best.
            return {"best_model_path": "", "kth_best_model_path": "", "best_k_models": {}, "best_model_score": None}
        new = Path(str(self.dirpath)) / old.name
        if self._copies:
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, new)
        path, score = str(new), state_dict["best_model_score"]
        return {"best_model_path": path, "kth_best_model_path": path, "best_k_models": {path: score}}


class LastCheckpoint(Checkpoint):
    """``last.ckpt``, to resume from: after epochs, validations, ``every_n_steps`` steps if not 0, and the end."""

    def __init__(self, dirpath: str, every_n_steps: int = 0) -> None:
        super().__init__()
        check(locals(), {"every_n_steps": integer(0)})
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            # Between two steps, where gradients accumulate: a checkpoint does not hold them.
            return
        self._step = trainer.global_step
        # Not on_train_epoch_end: resumed from there, Lightning counts an epoch twice where max_steps ends the training.
        # max_steps may end the training in the middle of an epoch, where nothing else would keep what it has learnt.
        at_end = trainer.is_last_batch or self._step == trainer.max_steps
        if at_end or (self.every_n_steps and self._step % self.every_n_steps == 0):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Again, where the last batch has just been saved: the best metric is part of the checkpoint.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
