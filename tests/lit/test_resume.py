"""A run that is stopped and resumed ends with the weights of a run that was not."""

import copy

import lightning.pytorch as pl
import pytest
import torch

from structlayers.data import DigitsDataModule
from structlayers.lit import AtomicCheckpointIO, LitModule
from structlayers.lit.callbacks import BestCheckpoint, LastCheckpoint
from structlayers.lit.module import warmup_cosine
from structlayers.models import MLP
from structlayers.surgery import swap_linears

# 1,257 training images: 9 batches of 128 per epoch.
STEPS = 27


class Killed(Exception):
    """Stands for a SIGKILL after a training step: nothing gets to tidy up."""


class KillAfter(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


def train(folder, *, kill_after=None, ckpt_path=None, every_n_steps=0, compile=False, callbacks=(), **trainer_options):
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10, width=32, depth=2, dropout=0.3)
    swap_linears(model, {"structure": "monarch", "options": {"blocks": 2}, "exclude": ["head"]})
    module = LitModule(
        model, "classification", lr=3e-3, weight_decay=0.1, seed=1, compile=compile, hyperparameters={"config": {}}
    )
    checkpoints = str(folder / "checkpoints")
    callbacks = [BestCheckpoint(checkpoints), LastCheckpoint(checkpoints, every_n_steps), *callbacks]
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, *([KillAfter(kill_after)] if kill_after is not None else [])],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        **({"max_steps": STEPS} | trainer_options),
    )
    data = DigitsDataModule(batch_size=128, seed=1, shift=1)
    if kill_after is None:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    else:
        with pytest.raises(Killed):
            trainer.fit(module, datamodule=data, weights_only=True)
    return trainer, module


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer, module = train(tmp_path_factory.mktemp("uninterrupted"))
    assert trainer.global_step == STEPS
    return copy.deepcopy(module.state_dict()), trainer.optimizers[0].state_dict()


def assert_same(trainer, module, expected) -> None:
    weights, optimizer = expected
    assert trainer.global_step == STEPS
    assert module.state_dict().keys() == weights.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for index, state in trainer.optimizers[0].state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, optimizer["state"][index][key]), (index, key)


# The same training, ended in two ways that Lightning resumes differently.
LIMITS = [{"max_steps": STEPS}, {"max_steps": -1, "max_epochs": 3}]


# Where the checkpoint was written: end of an epoch, middle of the first and of a later one, next to last step.
@pytest.mark.parametrize("limits", LIMITS, ids=["max_steps", "max_epochs"])
@pytest.mark.parametrize(
    ("kill_after", "every_n_steps", "written_at"),
    [(9, 0, 9), (12, 0, 9), (5, 4, 4), (14, 4, 12), (18, 9, 18), (26, 1, 26)],
)
def test_resume_is_exact(tmp_path, uninterrupted, limits, kill_after, every_n_steps, written_at):
    train(tmp_path / "first", kill_after=kill_after, every_n_steps=every_n_steps, **limits)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == written_at
    trainer, module = train(tmp_path / "second", ckpt_path=last, **limits)
    assert_same(trainer, module, uninterrupted)


def test_resume_in_the_same_folder_keeps_on_writing_the_same_files(tmp_path, uninterrupted):
    train(tmp_path, kill_after=14, every_n_steps=4)
    trainer, module = train(tmp_path, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert_same(trainer, module, uninterrupted)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("limits", LIMITS, ids=["max_steps", "max_epochs"])
@pytest.mark.parametrize(("kill_after", "written_at"), [(5, 4), (9, 9), (16, 13)])
def test_resume_is_exact_with_validation_inside_epochs(tmp_path, uninterrupted, limits, kill_after, written_at):
    options = {"val_check_interval": 4, **limits}
    train(tmp_path / "first", kill_after=kill_after, **options)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == written_at
    trainer, module = train(tmp_path / "second", ckpt_path=last, **options)
    assert_same(trainer, module, uninterrupted)


def test_resume_is_exact_with_accumulated_gradients(tmp_path):
    options = {"accumulate_grad_batches": 2, "max_steps": 12}
    _, whole = train(tmp_path / "whole", **options)
    expected = copy.deepcopy(whole.state_dict())
    train(tmp_path / "first", kill_after=8, every_n_steps=3, **options)
    _, module = train(tmp_path / "second", ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt", **options)
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]), name


class Rates(pl.Callback):
    """The rate that each step used, and what ``train/lr`` shows for it."""

    def __init__(self) -> None:
        self.used, self.shown = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        # That of dense layers; the rule multiplies it for factors.
        self.used.append(min(group["lr"] for group in optimizer.param_groups))

    def on_train_batch_end(self, trainer, module, *args):
        self.shown.append(float(trainer.callback_metrics["train/lr"]))


def test_a_longer_training_follows_its_own_schedule_from_the_first_step(tmp_path):
    train(tmp_path, max_epochs=1, max_steps=-1)
    rates = Rates()
    last = tmp_path / "checkpoints" / "last.ckpt"
    train(tmp_path, ckpt_path=last, max_epochs=2, max_steps=-1, log_every_n_steps=1, callbacks=[rates])
    assert rates.used == pytest.approx([3e-3 * warmup_cosine(18, 0.05, 0.0)(step) for step in range(9, 18)])
    assert rates.shown == pytest.approx(rates.used)


def test_best_so_far_comes_along_into_another_folder(tmp_path):
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "first", kill_after=12)
    resumed, _ = train(tmp_path / "second", ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt")
    best = resumed.checkpoint_callback
    assert best.best_model_path == str(tmp_path / "second" / "checkpoints" / "best.ckpt")
    assert best.best_model_score == whole.checkpoint_callback.best_model_score
    ours, theirs = (torch.load(t.checkpoint_callback.best_model_path, weights_only=True) for t in (resumed, whole))
    assert ours["global_step"] == theirs["global_step"]
    # What was resumed from is left as it was.
    assert torch.load(tmp_path / "first" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 9


def test_a_lost_best_checkpoint_is_not_missed(tmp_path):
    train(tmp_path / "first", kill_after=12)
    (tmp_path / "first" / "checkpoints" / "best.ckpt").unlink()
    trainer, _ = train(tmp_path / "second", ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "second" / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize("compiled_first", [True, False])
def test_checkpoints_load_across_compile(tmp_path, compiled_first, monkeypatch):
    # Inductor takes a minute and changes nothing about names.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    train(tmp_path / "first", kill_after=12, compile=compiled_first)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert not [name for name in torch.load(last, weights_only=True)["state_dict"] if "_orig_mod" in name]
    trainer, _ = train(tmp_path / "second", ckpt_path=last, compile=not compiled_first)
    assert trainer.global_step == STEPS
