"""What every long benchmark command shares: options, rows that are kept as they come, a time limit, resuming."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from structlayers.bench.machine import Roofline, describe_machine, measure_roofline
from structlayers.bench.nvml import busy_reason, device_state
from structlayers.bench.products import float32_precision
from structlayers.errors import ConfigError
from structlayers.values import check, number


def add_sweep_options(options: argparse.ArgumentParser, out: str) -> None:
    """The options of a resumable sweep; ``out`` is where its rows go by default."""
    add = options.add_argument
    add("--out", type=Path, default=Path(out), help="rows, append-only (default %(default)s)")
    add("--minutes", type=float, default=float("inf"), help="start no new case after so long; run again to go on")
    add("--budget", type=float, default=0.1, help="seconds of sampling for every contender (default %(default)s)")
    add("--samples", type=int, nargs=2, default=[10, 100], metavar=("LEAST", "MOST"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--energy", action="store_true", help="also joules per call, by NVML's counter")
    add("--energy-window", type=float, default=1.0, help="least seconds of an energy window (default %(default)s)")
    add("--commit", help="the commit to name in the rows, where the files are not in a git repository")
    add("--wandb", metavar="PROJECT", help="log the rows to Weights & Biases too")


def device_of(name: str) -> torch.device:
    """The device that an option names; raises ``ConfigError`` where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r}: expected cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name!r}: expected cpu, cuda or cuda:<number>")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: this torch ({torch.__version__}) sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device = {name!r}: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def machine_of(device: torch.device, commit: str | None) -> dict[str, object]:
    """The machine's description, with the commit that was named, and why its timings are doubtful where they are."""
    machine = describe_machine(device)
    if commit is not None:
        machine["commit"] = commit
    if reason := busy_reason(device):
        machine["busy"] = reason
        print(f"warning: {reason}", flush=True)
    return machine


def command_line() -> str:
    """The command that is running, as a shell would read it."""
    program = Path(sys.argv[0])
    if program.parent.name == "bench":
        name = "structlayers.bench" if program.stem == "__main__" else f"structlayers.bench.{program.stem}"
        return shlex.join(["python", "-m", name, *sys.argv[1:]])
    # Where it lies on one machine is of no use on another.
    return shlex.join(["python", program.name, *sys.argv[1:]])


class Rooflines:
    """The ceilings of a device, measured once for each dtype."""

    def __init__(
        self, device: torch.device, measure: Callable[[torch.device, torch.dtype], Roofline] = measure_roofline
    ):
        self._device, self._measure = device, measure
        self._found: dict[tuple[torch.dtype, bool], Roofline] = {}

    def of(self, dtype: torch.dtype, tf32: bool) -> Roofline:
        kind = (dtype, tf32)
        if kind not in self._found:
            self._found[kind] = self._measured(*kind)
        return self._found[kind]

    def _measured(self, dtype: torch.dtype, tf32: bool) -> Roofline:
        with float32_precision(tf32):
            measured = self._measure(self._device, dtype)
        if dtype != torch.float32 or tf32 or self._device.type != "cuda":
            return measured
        # float32 accuracy may also come from three TF32 products.
        with float32_precision(True):
            split = self._measure(self._device, dtype).matmul_gflop_per_s / 3
        return Roofline(measured.copy_gb_per_s, max(measured.matmul_gflop_per_s, split))


class StateSampler:
    """Clocks, temperature, power and load of a device, asked for at most every ``interval_s``: asking takes time."""

    def __init__(self, device: torch.device, interval_s: float = 10.0) -> None:
        self._device, self._interval_s = device, interval_s
        self._next, self._state = float("-inf"), dict[str, float]()

    def now(self) -> dict[str, float]:
        """The state of a moment not longer ago than the interval."""
        if time.monotonic() >= self._next:
            self._state = device_state(self._device)
            self._next = time.monotonic() + self._interval_s
        return self._state


class Deadline:
    """Counts from now; ``over`` after so many minutes. Raises ``ConfigError`` for a time before now."""

    def __init__(self, minutes: float) -> None:
        check(locals(), {"minutes": number("a number of at least 0", lambda value: value >= 0)})
        self._end = time.monotonic() + 60 * minutes
        self.minutes = minutes

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end

    def __str__(self) -> str:
        return f"{self.minutes:g} min are over; run again to go on with what the file does not have"


class WandbLog:
    """Logs flat rows to a Weights & Biases project; a project of None logs nothing.

    Raises ``ConfigError`` if the package is absent.
    """

    def __init__(self, project: str | None, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        if project is None:
            return
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--wandb needs the package wandb: pip install wandb") from error
        self._run = wandb.init(project=project, job_type="benchmark", config=dict(config))

    def log(self, row: Mapping[str, Any]) -> None:
        """One row; what is None or empty is left out."""
        if self._run is not None:
            self._run.log({name: value for name, value in row.items() if value not in (None, "", {}, [])})

    def log_results(self, case: Mapping[str, Any]) -> None:
        """A row with ``results``, as one flat row for each of them."""
        shared = {name: value for name, value in case.items() if name != "results"}
        for result in case["results"]:
            self.log({**shared, **result})

    def finish(self) -> None:
        """Close the run, so that nothing is lost."""
        if self._run is not None:
            self._run.finish()


def lost_context(reasons: list[str]) -> bool:
    """Whether a failure took the CUDA context with it, so that nothing else can run in this process."""
    return any("CUDA error" in reason for reason in reasons)


LOST_CONTEXT = "a kernel failed and took the CUDA context with it; run again to go on after this case"
