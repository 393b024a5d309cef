"""Energy of one call, from a counter that moves only every few tens of milliseconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from structlayers.bench.nvml import NvmlUnavailable, energy_counter
from structlayers.bench.results import Result
from structlayers.bench.rows import Row
from structlayers.bench.timing import in_turn

# Both ends of a window are ticks of the counter, each seen within one batch of launches: 2 % of so many periods of
# 0.1 s, as an H100's counter has.
_LEAST_PERIODS = 5
# So long is one batch of launches between two readings, and the graph that a launch replays.
_CHUNK_S = 5e-3
_GRAPH_S = 2e-3
_MOST_CALLS_IN_A_GRAPH = 500
# A counter that stands still for so long is broken.
_PATIENCE_S = 5.0


class EnergyError(RuntimeError):
    """The energy counter stands still or runs backwards: a reading of zero is no result."""


@dataclass(frozen=True)
class Energy:
    """Energy of one call, averaged over a window without a pause."""

    per_call_j: float
    power_w: float
    window_s: float
    calls: int


class EnergyMeter:
    """Measures calls by ``read_j``, the energy used so far in joules; ``finish`` waits until the device is idle.

    ``window_s`` grows to five periods of the counter, which is found out first, with ``idle_power_w``.
    Raises :class:`EnergyError` if the counter does not move.
    """

    def __init__(
        self,
        read_j: Callable[[], float],
        finish: Callable[[], object],
        window_s: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read_j, self._finish, self._clock = read_j, finish, clock
        self.period_s = self._measure_period()
        self.window_s = max(window_s, _LEAST_PERIODS * self.period_s)
        self.idle_power_w = self._measure(self._pause, 1).power_w

    def measure(self, call: Callable[[], object], calls_per_launch: int = 1) -> Energy:
        """Energy of one of the ``calls_per_launch`` calls that ``call()`` makes, launched again and again."""
        call()
        self._finish()
        start = self._clock()
        call()
        self._finish()
        launches = max(1, round(_CHUNK_S / max(self._clock() - start, 1e-6)))

        def chunk() -> None:
            for _ in range(launches):
                call()
            self._finish()

        return self._measure(chunk, launches * calls_per_launch)

    def _measure_period(self) -> float:
        self._next_tick(self._pause)
        start = self._clock()
        for _ in range(3):
            self._next_tick(self._pause)
        return (self._clock() - start) / 3

    def _measure(self, chunk: Callable[[], object], calls_per_chunk: int) -> Energy:
        """From a tick of the counter to the first one after the window; the load runs before the first one too."""
        warm_until = self._clock() + self.window_s / 4
        while self._clock() < warm_until:
            chunk()
        self._next_tick(chunk)
        first_j, start, chunks = self._read_j(), self._clock(), 0
        while self._clock() - start < self.window_s:
            chunk()
            chunks += 1
        chunks += self._next_tick(chunk)
        window_s, used_j = self._clock() - start, self._read_j() - first_j
        if used_j <= 0:
            raise EnergyError(f"the energy counter read {used_j} J over {window_s:.1f} s")
        calls = chunks * calls_per_chunk
        return Energy(used_j / calls, used_j / window_s, window_s, calls)

    def _next_tick(self, chunk: Callable[[], object]) -> int:
        """Run ``chunk`` until the counter changes; how often that was."""
        before, start, chunks = self._read_j(), self._clock(), 0
        while self._read_j() == before:
            if self._clock() - start > _PATIENCE_S:
                raise EnergyError(f"the energy counter stood still at {before} J for {_PATIENCE_S:.0f} s")
            chunk()
            chunks += 1
        return chunks

    def _pause(self) -> None:
        time.sleep(1e-3)


def open_meter(device: torch.device, window_s: float = 1.0) -> EnergyMeter:
    """The meter of a CUDA device. Raises :class:`NvmlUnavailable` or :class:`EnergyError` with the reason."""
    read_j = energy_counter(device)
    torch.cuda.synchronize(device)
    return EnergyMeter(read_j, lambda: torch.cuda.synchronize(device), window_s)


class EnergyColumn:
    """Fills the energy of results, or says in each why it cannot; opened once for a whole sweep."""

    def __init__(self, device: torch.device, window_s: float = 1.0) -> None:
        self.device = device
        self.meter: EnergyMeter | None = None
        self.reason = ""
        try:
            self.meter = open_meter(device, window_s)
        except (NvmlUnavailable, EnergyError) as error:
            self.reason = str(error)

    @property
    def idle_power_w(self) -> float | None:
        return None if self.meter is None else self.meter.idle_power_w

    def fill(self, result: Result | Row, call: Callable[[], object], batch: int, calls: int | None = None) -> None:
        """Measure ``call``, which ``result`` has timed; it makes ``calls`` calls, or one, which is then replayed as a
        graph where it can be captured.
        """
        if self.meter is None or result.p50_ms is None:
            result.energy_reason = self.reason or "not timed, so not measured"
            return
        launch = call
        if calls is None:
            count = min(max(1, round(_GRAPH_S / (result.p50_ms * 1e-3))), _MOST_CALLS_IN_A_GRAPH)
            try:
                launch, calls = in_turn([call] * count, self.device), count
            except Exception:  # what cannot be captured is launched one by one
                calls = 1
                torch.cuda.synchronize(self.device)
        try:
            energy = self.meter.measure(launch, calls)
        except (EnergyError, RuntimeError) as error:
            result.energy_reason = str(error).splitlines()[0]
            return
        result.energy_j, result.power_w = energy.per_call_j, energy.power_w
        result.energy_per_sample_j = energy.per_call_j / max(batch, 1)
        result.energy_window_s = energy.window_s
