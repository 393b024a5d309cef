"""Loggers: a CSV file that a resumed run continues, and Weights & Biases when it is installed."""

import csv
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from structlayers.errors import ConfigError
from structlayers.files import replace_file


class CSVLogger(Logger):
    """Write ``<folder>/metrics.csv``: one row per call, on disk at once, empty where a metric was not logged.

    Rows already there are kept, which Lightning's own CSV logger does not do in a folder that has files; after
    ``resume_after`` only those that the resumed training does not write again.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._resumed_after: int | None = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has ``config.yaml``."""

    def resume_after(self, steps: int) -> None:
        """Drop what a killed run logged after ``steps`` steps: with the first row that is logged, not before."""
        self._resumed_after = steps

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not set(row) <= set(self._columns):
            self._widen(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _widen(self, row: Mapping[str, Any]) -> None:
        """Rewrite the file with the columns of ``row`` added."""
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or ())
                rows = [row for row in reader if self._resumed_after is None or _steps(row) <= self._resumed_after]
            self._resumed_after = None
        self._columns = list(dict.fromkeys([*self._columns, *row]))
        self.path.parent.mkdir(parents=True, exist_ok=True)

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

        replace_file(self.path, write)


def _steps(row: Mapping[str, str]) -> int:
    """How many training steps had surely been done when ``row`` was logged; 0 where it does not say."""
    if not (row.get("step") or "").isdigit():
        return 0
    # Lightning gives a row of the training the index of its step, from 0; the test at the end, and a validation between
    # two batches of one step, the number of steps.
    evaluation = any(value and name.startswith(("val/", "test/")) for name, value in row.items())
    return int(row["step"]) + (not evaluation)


def wandb_logger(**options: Any) -> WandbLogger:
    """Lightning's ``WandbLogger``; ``ConfigError`` if the package is absent."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("logger=wandb needs the package wandb: pip install wandb, or choose logger=csv")
    return WandbLogger(**options)
