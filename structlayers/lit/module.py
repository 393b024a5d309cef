"""The Lightning module: one loss, two tasks, AdamW with warm-up and cosine."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from structlayers import optim
from structlayers.errors import ConfigError
from structlayers.optim import param_groups
from structlayers.values import FLAG, SHARE, Kind, check, integer, listed, nullable, number, one_of, patterns

_BETA = number("a number of at least 0, below 1", lambda value: 0 <= value < 1)
# Each with what is logged of it besides the loss.
TASKS = {"classification": ("accuracy",), "language_modelling": ("perplexity", "bits_per_byte")}
# What the parameter groups are made from: an optimizer that is restored keeps its own, whatever the module was given.
_RESTORED = ("lr", "weight_decay", "betas", "rule", "base_width", "input_layers", "no_decay")
KINDS: dict[str, Kind] = {
    **optim.KINDS,
    "task": one_of(*TASKS),
    "betas": Kind(
        "two numbers of at least 0, below 1", lambda value: len(listed(value)) == 2 and all(map(_BETA.holds, value))
    ),
    "warmup": SHARE,
    "final_lr": SHARE,
    "label_smoothing": SHARE,
    "schedule_steps": nullable(integer(1)),
    "compile": FLAG,
}


def warmup_cosine(total_steps: int, warmup: float, final_lr: float) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear over ``warmup * total_steps``, then a cosine to ``final_lr``.

    Both ``warmup`` (share of the steps) and ``final_lr`` (share of the rate) lie in [0, 1]; after ``total_steps`` the
    factor stays at ``final_lr``.
    """
    warmup_steps = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


class LitModule(pl.LightningModule):
    """Cross-entropy training of ``model`` on batches ``(x, y)``.

    ``model(x)`` returns logits: ``(B, classes)`` with ``y`` ``(B,)`` for "classification", ``(B, T, vocabulary)`` with
    ``y`` ``(B, T)`` for "language_modelling" over bytes. Logged: ``train/loss``, ``train/lr``; ``val/`` and ``test/``
    ``loss`` (nats, without label smoothing) and ``accuracy``, or ``perplexity`` and ``bits_per_byte``.

    ``hyperparameters`` must be plain Python (dicts, lists, strings, numbers): it goes into the checkpoint as it is,
    and a checkpoint with anything else in it does not load with ``weights_only=True``.
    Raises ``ConfigError`` for an unknown task or a setting outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        rule: str = "structure",
        base_width: int | None = None,
        input_layers: Sequence[str] | str = (),
        no_decay: Sequence[str] | str = (),
        warmup: float = 0.05,
        final_lr: float = 0.0,
        schedule_steps: int | None = None,
        label_smoothing: float = 0.0,
        seed: int = 0,
        compile: bool = False,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check(locals(), KINDS)
        self.save_hyperparameters(dict(hyperparameters or {}))
        self.model = model
        self.task = task
        self.lr, self.betas = lr, (betas[0], betas[1])
        self.group_options: dict[str, Any] = {
            "rule": rule,
            "weight_decay": weight_decay,
            "base_width": base_width,
            "input_layers": patterns("input_layers", input_layers),
            "no_decay": patterns("no_decay", no_decay),
        }
        self.warmup, self.final_lr, self.schedule_steps = warmup, final_lr, schedule_steps
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.val_loss, self.val_hits, self.test_loss, self.test_hits = (MeanMetric() for _ in range(4))
        if compile:
            # In place: a wrapper would put `_orig_mod` into the names of the weights.
            model.compile()

    @property
    def logged(self) -> tuple[str, ...]:
        """The names of the metrics that a training logs."""
        return ("train/loss", "train/lr", *(f"val/{name}" for name in ("loss", *TASKS[self.task])))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def on_train_start(self) -> None:
        # A restored optimizer has the rate of the old schedule, which a longer training or other options have changed.
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate * self._factor(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout depends on the seed and the batch only, so a resumed run draws what an uninterrupted one draws.
        batches = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = (self.seed * 1_000_003 + batches) * self.trainer.world_size + self.global_rank
        # Not torch.manual_seed, which is 60 times slower: it looks for devices to seed.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.model(x)
        loss = cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=self.label_smoothing)
        # Logging costs more than a step of a small model: only call it where the trainer writes a row.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train/loss", loss.detach())
            self.log("train/lr", self.lr * self._factor(self.global_step))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation(self.val_loss, self.val_hits)

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation(self.test_loss, self.test_hits)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_loss, self.val_hits)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_loss, self.test_hits)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val", self.val_loss, self.val_hits)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", self.test_loss, self.test_hits)

    def _begin_evaluation(self, *metrics: MeanMetric) -> None:
        for metric in metrics:
            # With precision 16-true or bf16-true the trainer has made the sums 16-bit as well.
            metric.set_dtype(torch.float32)

    def _evaluate(self, batch: tuple[Tensor, Tensor], loss: MeanMetric, hits: MeanMetric) -> None:
        x, y = batch
        logits = self.model(x)
        loss.update(cross_entropy(logits.flatten(0, -2).float(), y.flatten()), y.numel())
        if self.task == "classification":
            hits.update((logits.argmax(-1) == y).float())

    def _log_evaluation(self, stage: str, loss: MeanMetric, hits: MeanMetric) -> None:
        nats = loss.compute()
        values = {"loss": nats}
        if self.task == "classification":
            values["accuracy"] = hits.compute()
        else:
            values |= {"perplexity": nats.exp(), "bits_per_byte": nats / math.log(2)}
        # Already summed over the processes by torchmetrics.
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)
        loss.reset()
        hits.reset()

    def configure_optimizers(self) -> Any:
        steps = self.schedule_steps or self.trainer.estimated_stepping_batches
        # Counting made the training loader, before a resumed run's place in it is restored: have it made again.
        self.trainer.fit_loop._combined_loader = None
        if not math.isfinite(steps) or steps <= 0:
            raise ConfigError(
                f"the learning-rate schedule has {steps} steps; set trainer.max_epochs, trainer.max_steps or "
                "optim.schedule_steps"
            )
        self._factor = warmup_cosine(int(steps), self.warmup, self.final_lr)
        groups = param_groups(self.model, self.lr, **self.group_options)
        # One kernel for all weights. With float16 it would take the loss scale off the gradients itself, after they
        # have been clipped.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Like Lightning, no limit below 0: torch would turn the gradients round.
        if self.trainer.precision != "bf16-mixed" or not gradient_clip_val or gradient_clip_val < 0:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        # Lightning refuses this for a fused optimizer in any mixed precision, but bfloat16 has no loss scale.
        elif gradient_clip_algorithm == "value":
            clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            clip_grad_norm_(self.parameters(), gradient_clip_val)


def check_resumes(stored: Mapping[str, Any], optim: Mapping[str, Any], path: str | Path) -> None:
    """Raise ``ConfigError`` where ``optim`` differs from the options ``stored`` in the checkpoint at ``path``.

    Only for those that a resumed training would not heed, as they are part of the optimizer that is restored; the
    schedule and the label smoothing are always those of ``optim``.
    """
    parameters = inspect.signature(LitModule).parameters
    changed = {}
    for key in _RESTORED:
        was, is_now = (_plain(options.get(key, parameters[key].default)) for options in (stored, optim))
        if was != is_now:
            changed[key] = (was, is_now)
    if changed:
        listed = "; ".join(f"optim.{key} is {is_now!r}, expected {was!r}" for key, (was, is_now) in changed.items())
        raise ConfigError(
            f"{path}: resuming restores its optimizer, so its settings cannot change: {listed}; resume with the "
            "expected values, or leave out ckpt_path to train anew"
        )


def _plain(value: Any) -> Any:
    """A default is a tuple where YAML has a list."""
    return list(value) if isinstance(value, tuple) else value
