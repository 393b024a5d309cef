"""Where the time of a training step goes, by operator and GPU kernel."""

from pathlib import Path

import torch
from lightning.pytorch.profilers import Profiler
from torch.profiler import ProfilerActivity, profile

from structlayers.errors import ConfigError


class OperatorProfiler(Profiler):
    """Record ``steps`` training batches with ``torch.profiler`` after the first ``wait`` of a training.

    At the end ``<dirpath>/fit-<filename>.txt`` has the ``rows`` operators and kernels that took the most time of their
    own, and ``<dirpath>/<filename>.json`` is the trace for chrome://tracing. Unlike Lightning's ``PyTorchProfiler`` it
    records once, no validation, and no step that compiles. Raises ``ConfigError`` for impossible numbers.
    """

    def __init__(self, dirpath: str, filename: str = "profile", wait: int = 10, steps: int = 3, rows: int = 30) -> None:
        super().__init__(dirpath, filename)
        self._batches = 0
        self._recorder: profile | None = None
        self._table = ""
        if wait < 0 or steps < 1 or rows < 1:
            raise ConfigError(
                f"profiler: wait={wait}, steps={steps}, rows={rows}: expected wait >= 0, steps >= 1, rows >= 1"
            )
        self.first, self.end, self.rows = wait, wait + steps, rows

    def start(self, action_name: str) -> None:
        if action_name == _BATCH and self._batches == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._recorder = profile(activities=activities)
            self._recorder.start()

    def stop(self, action_name: str) -> None:
        if action_name != _BATCH:
            return
        self._batches += 1
        if self._batches == self.end:
            self._finish()

    def summary(self) -> str:
        if self._stage != "fit":
            return ""
        self._finish()
        if not self._table:
            return f"no operators recorded: the training ended within its first {self.first} batches\n"
        recorded = min(self._batches, self.end) - self.first
        return f"operators of {recorded} training batches, after the first {self.first}\n{self._table}"

    def teardown(self, stage: str | None) -> None:
        self._finish()
        super().teardown(stage)

    def _finish(self) -> None:
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        if torch.cuda.is_available():
            # The last batch's kernels.
            torch.cuda.synchronize()
        recorder.stop()
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self._table = recorder.key_averages().table(sort_by=order, row_limit=self.rows, max_name_column_width=60)
        folder = Path(str(self.dirpath))
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{self.local_rank}" if self.local_rank else ""
        recorder.export_chrome_trace(str(folder / f"{self.filename}{rank}.json"))


# What Lightning's training loop calls forward, backward and update of one batch.
_BATCH = "run_training_batch"
