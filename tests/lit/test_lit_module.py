"""The Lightning module: schedule, metrics, optimizer, what it stores, and its mistakes."""

import itertools
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from structlayers.errors import ConfigError
from structlayers.lit import LitModule, check_resumes
from structlayers.lit.module import warmup_cosine


def trainer(**options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


def test_schedule():
    factor = warmup_cosine(100, warmup=0.1, final_lr=0.2)
    values = [factor(step) for step in range(120)]
    assert values[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.6)
    assert values[100:] == [0.2] * 20
    assert all(later < earlier for earlier, later in itertools.pairwise(values[10:101]))


def test_schedule_without_warmup_starts_at_the_full_rate():
    assert warmup_cosine(10, warmup=0.0, final_lr=0.0)(0) == 1.0


class Fixed(nn.Module):
    """Logits that do not depend on the input; one parameter, for the optimizer."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits.expand(*x.shape[: x.ndim - 1 if x.is_floating_point() else x.ndim], -1)


def test_classification_metrics_weigh_every_example_once():
    logits = torch.tensor([2.0, 0.0, 1.0])
    y = torch.tensor([0, 0, 1, 2, 0])
    # Batches of 3 and 2, so a mean of the batches' means would be wrong.
    loader = DataLoader(TensorDataset(torch.zeros(5, 4), y), batch_size=3)
    module = LitModule(Fixed(logits), "classification", lr=1.0, label_smoothing=0.3)
    [metrics] = trainer().test(module, loader, verbose=False)
    assert metrics["test/accuracy"] == pytest.approx(3 / 5)
    assert metrics["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits.expand(5, 3), y).item())


def test_metrics_are_exact_in_16_bit_precision():
    y = (torch.arange(1000) >= 601).long()
    loader = DataLoader(TensorDataset(torch.zeros(1000, 4), y), batch_size=10)
    module = LitModule(Fixed(torch.tensor([1.0, 0.0])), "classification", lr=1.0)
    [metrics] = trainer(precision="bf16-true").test(module, loader, verbose=False)
    assert metrics["test/accuracy"] == pytest.approx(0.601, abs=1e-6)


def test_language_modelling_metrics():
    # Uniform over 16 of 256 bytes: 4 bits.
    logits = torch.full((256,), -math.inf)
    logits[:16] = 0
    x = torch.randint(16, (6, 8))
    module = LitModule(Fixed(logits), "language_modelling", lr=1.0)
    [metrics] = trainer().test(module, DataLoader(TensorDataset(x, x), batch_size=4), verbose=False)
    assert metrics["test/bits_per_byte"] == pytest.approx(4.0)
    assert metrics["test/perplexity"] == pytest.approx(16.0, rel=1e-5)
    assert metrics["test/loss"] == pytest.approx(math.log(16))
    assert "test/accuracy" not in metrics


def test_learning_rate_follows_the_schedule():
    class Rates(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, *_):
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    rates = Rates()
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    module = LitModule(model, "classification", lr=0.1, warmup=0.5, final_lr=0.1, weight_decay=0.1)
    loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.randint(3, (12,))), batch_size=3)
    trainer(max_epochs=2, callbacks=[rates]).fit(module, loader)
    factor = warmup_cosine(8, 0.5, 0.1)
    assert len(rates.seen) == 8
    for step, seen in enumerate(rates.seen):
        assert seen == pytest.approx([0.1 * factor(step)] * len(seen))


def test_schedule_length_can_be_given():
    module = LitModule(Fixed(torch.zeros(3)), "classification", lr=1.0, warmup=0.0, schedule_steps=10)
    module.trainer = trainer(max_steps=4)
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert scheduler.lr_lambdas[0](5) == pytest.approx(0.5)


class Gradients(pl.Callback):
    """What the optimizer is given."""

    def on_before_zero_grad(self, trainer, module, optimizer):
        found = [p.grad for p in module.parameters() if p.grad is not None]
        if found:
            self.norm = torch.nn.utils.get_total_norm(found)
            self.largest = max(gradient.abs().max() for gradient in found)
            self.fused = optimizer.defaults["fused"]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_gradients_are_clipped_in_every_precision(precision, algorithm):
    loader = DataLoader(TensorDataset(100 * torch.randn(12, 4), torch.randint(3, (12,))), batch_size=12)
    model, seen = nn.Linear(4, 3), Gradients()
    before = model.weight.detach().clone()
    module = LitModule(model, "classification", lr=0.1)
    clipping = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    trainer(max_steps=2, max_epochs=2, precision=precision, callbacks=[seen], **clipping).fit(module, loader)
    assert seen.fused
    found = seen.norm if algorithm == "norm" else seen.largest
    assert found == pytest.approx(0.01, rel=1e-3)
    assert not torch.equal(model.weight, before)
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("limit", [None, -1.0])
def test_without_a_limit_gradients_stay_as_they_are(limit):
    """As in Lightning, a limit below 0 is none: clipping to it would turn the gradients round."""
    loader = DataLoader(TensorDataset(-100 * torch.ones(12, 4), torch.zeros(12, dtype=torch.long)), batch_size=12)
    seen = Gradients()
    model = nn.Linear(4, 3)
    # All logits alike.
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    before = model.bias.detach().clone()
    module = LitModule(model, "classification", lr=0.1)
    options = {"precision": "bf16-mixed", "gradient_clip_val": limit}
    trainer(max_steps=2, max_epochs=2, callbacks=[seen], **options).fit(module, loader)
    assert seen.norm > 1
    # Class 0 is the only label, so its bias grows.
    assert module.model.bias[0] > before[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_names_of_weights_do_not_depend_on_compile(compiled):
    module = LitModule(nn.Sequential(nn.Linear(2, 2)), "classification", lr=1.0, compile=compiled)
    assert list(module.state_dict()) == ["model.0.weight", "model.0.bias"]


def test_hyperparameters_are_what_was_given():
    given = {"task": "classification", "config": {"model": {"width": 3}, "list": [1, "a", None]}}
    module = LitModule(nn.Linear(2, 2), "classification", lr=1.0, hyperparameters=given)
    assert dict(module.hparams) == given
    assert type(module.hparams["config"]) is dict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regression"}, "'regression'.*classification, language_modelling"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"warmup": 5}, "warmup = 5"),
        ({"final_lr": -0.1}, "final_lr = -0.1"),
        ({"label_smoothing": 2}, "label_smoothing = 2"),
        ({"schedule_steps": -5}, "schedule_steps = -5"),
        ({"weight_decay": None}, "weight_decay = None: expected a number of at least 0"),
        ({"betas": [0.9]}, r"betas = \[0.9\]: expected two numbers"),
        ({"betas": [0.9, 1.5]}, r"betas = \[0.9, 1.5\]"),
        ({"betas": ["a", "b"]}, r"betas = \['a', 'b'\]"),
        ({"base_width": "abc"}, "base_width = 'abc': expected an integer"),
        ({"no_decay": 5}, "no_decay = 5: expected a pattern or a list of patterns"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        LitModule(nn.Linear(2, 2), **({"task": "classification", "lr": 1.0} | options))


def test_endless_training_needs_the_length_of_the_schedule():
    module = LitModule(nn.Linear(2, 2), "classification", lr=1.0)
    module.trainer = trainer(max_epochs=-1)
    with pytest.raises(ConfigError, match=r"optim\.schedule_steps"):
        module.configure_optimizers()


STORED = {"lr": 3e-3, "weight_decay": 0.05, "betas": [0.9, 0.99], "rule": "structure", "no_decay": []}


@pytest.mark.parametrize(
    "same",
    [
        {},
        # What a resumed run does heed.
        {"warmup": 0.5, "final_lr": 0.5, "schedule_steps": 7, "label_smoothing": 0.1},
        # The same in other words.
        {"betas": (0.9, 0.99), "no_decay": (), "base_width": None, "input_layers": []},
    ],
)
def test_resuming_with_what_the_optimizer_was_made_from(same):
    check_resumes(STORED, STORED | same, "last.ckpt")
    check_resumes(STORED | same, STORED, "last.ckpt")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lr": 1e-5}, ["optim.lr is 1e-05, expected 0.003"]),
        ({"weight_decay": 0}, ["optim.weight_decay is 0, expected 0.05"]),
        ({"betas": [0.9, 0.999]}, ["optim.betas is [0.9, 0.999], expected [0.9, 0.99]"]),
        ({"no_decay": ["head*"]}, ["optim.no_decay is ['head*'], expected []"]),
        (
            {"rule": "mup", "base_width": 64},
            ["optim.rule is 'mup', expected 'structure'", "optim.base_width is 64, expected None"],
        ),
    ],
)
def test_resuming_with_another_optimizer_names_every_change(changed, named):
    with pytest.raises(ConfigError) as caught:
        check_resumes(STORED, STORED | changed, "last.ckpt")
    message = str(caught.value)
    assert message.startswith("last.ckpt: ") and "leave out ckpt_path" in message
    assert [part for part in named if part in message] == named
    assert message.count("expected") == len(named) + 1
