"""Options of Lightning that it takes without a look, or refuses in words that do not name them."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from structlayers.errors import ConfigError
from structlayers.lit.module import LitModule
from structlayers.values import FLAG, TEXT, Kind, check, either, integer, nullable, number

_SHARE_OF_BATCHES = Kind("a share above 0, at most 1", lambda value: isinstance(value, float) and 0 < value <= 1)
_BATCHES = Kind(
    "a share from 0.0 to 1.0, or a number of batches",
    lambda value: (isinstance(value, float) and 0 <= value <= 1) or integer(0).holds(value),
)
# Of these Lightning itself looks at the rest.
_TIME = Kind("a time DD:HH:MM:SS", lambda value: isinstance(value, str | Mapping))
_TRAINER = {
    "max_epochs": nullable(integer(-1)),
    "min_epochs": nullable(integer(0)),
    "max_steps": integer(-1),
    "min_steps": nullable(integer(0)),
    "max_time": nullable(_TIME),
    "num_nodes": integer(1),
    "accumulate_grad_batches": integer(1),
    "val_check_interval": nullable(either(_SHARE_OF_BATCHES, integer(1), _TIME)),
    "check_val_every_n_epoch": nullable(integer(1)),
    "gradient_clip_val": nullable(number("a finite number", math.isfinite)),
    "limit_train_batches": nullable(_BATCHES),
    "limit_val_batches": nullable(_BATCHES),
    "limit_test_batches": nullable(_BATCHES),
    "log_every_n_steps": nullable(integer(0)),
    "num_sanity_val_steps": nullable(integer(-1)),
    "default_root_dir": nullable(TEXT),
    "deterministic": nullable(
        Kind("true, false or warn", lambda value: isinstance(value, bool) or value == "warn"),
    ),
    "detect_anomaly": FLAG,
    "enable_progress_bar": nullable(FLAG),
    "enable_checkpointing": nullable(FLAG),
    "enable_model_summary": nullable(FLAG),
}

_KNOWN_PACKAGES = ("lightning", "pytorch_lightning", "structlayers")


def check_trainer(options: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an option of the Trainer that would end in a traceback or be taken for true."""
    check(options, _TRAINER, "trainer.")


def check_monitors(callbacks: Mapping[str, pl.Callback], module: LitModule) -> None:
    """Raise ``ConfigError`` for a callback that waits for a metric which is not logged: that ends the first epoch."""
    if any(type(callback).__module__.split(".")[0] not in _KNOWN_PACKAGES for callback in callbacks.values()):
        # One from elsewhere may log what another waits for.
        return
    # The last two are Lightning's own.
    known = (*module.logged, "epoch", "step")
    for name, callback in callbacks.items():
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in known:
            raise ConfigError(f"callbacks.{name}.monitor = {monitor!r}: expected one of {', '.join(module.logged)}")
