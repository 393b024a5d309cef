"""Test metrics of a model, against their definitions."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from structlayers.data import DigitsDataModule, TextDataModule
from structlayers.lit import evaluate

CPU = torch.device("cpu")


def test_classification():
    data = DigitsDataModule(batch_size=64)
    data.setup()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = evaluate(model, data.task, data, CPU)
    x, y = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    logits = model(x).detach()
    assert metrics == {
        "loss": pytest.approx(float(cross_entropy(logits, y)), rel=1e-5),
        "accuracy": pytest.approx(float((logits.argmax(-1) == y).float().mean()), rel=1e-6),
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_language_modelling(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(200)) * 3)
    data = TextDataModule(str(tmp_path / "text.txt"), context_length=7, val_fraction=0.2, test_fraction=0.3)
    data.setup()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 12), nn.Linear(12, 256))
    metrics = evaluate(model, data.task, data, CPU)
    x, y = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    loss = float(cross_entropy(model(x).detach().flatten(0, 1), y.flatten()))
    assert metrics == {
        "loss": pytest.approx(loss, rel=1e-5),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-4),
        "bits_per_byte": pytest.approx(loss / math.log(2), rel=1e-5),
    }
