"""Options of Lightning are checked before it takes them for something else."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn

from structlayers.errors import ConfigError
from structlayers.lit import LitModule, check_monitors, check_trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "trainer"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_epochs", "abc"),
        ("max_epochs", 1.5),
        ("max_steps", None),
        ("max_time", 5),
        ("accumulate_grad_batches", 0),
        ("val_check_interval", 0),
        ("val_check_interval", 1.5),
        ("check_val_every_n_epoch", 0),
        ("gradient_clip_val", float("nan")),
        ("gradient_clip_val", "abc"),
        ("limit_train_batches", "abc"),
        ("log_every_n_steps", -1),
        ("deterministic", "foo"),
        ("enable_progress_bar", "foo"),
    ],
)
def test_a_wrong_value_is_named(option, value):
    with pytest.raises(ConfigError, match=rf"trainer\.{option} = {value!r}: expected "):
        check_trainer({"max_epochs": 1, option: value})


def test_what_lightning_takes_is_left_to_it():
    check_trainer({"max_epochs": None, "max_time": "00:01:00:00", "val_check_interval": {"minutes": 5}})
    check_trainer({"val_check_interval": 300, "check_val_every_n_epoch": None, "limit_val_batches": 0.0})
    check_trainer({"gradient_clip_val": -1, "deterministic": "warn", "an_option_of_tomorrow": object()})
    check_trainer(yaml.safe_load((CONFIGS / "default.yaml").read_text()))


def test_a_callback_waits_for_a_metric_that_is_logged():
    module = LitModule(nn.Linear(2, 2), "language_modelling", lr=1.0)
    known = {name: EarlyStopping(name) for name in module.logged}
    check_monitors({**known, "every": ModelCheckpoint(), "epoch": ModelCheckpoint(monitor="epoch")}, module)
    with pytest.raises(ConfigError, match=r"callbacks\.stop\.monitor = 'val/accuracy': .*val/bits_per_byte"):
        check_monitors({"stop": EarlyStopping("val/accuracy")}, module)

    class Logs(Callback):
        """From elsewhere: it may log the metric."""

    check_monitors({"logs": Logs(), "stop": EarlyStopping("val/accuracy")}, module)
