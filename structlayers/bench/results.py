"""What one contender of one case came to."""

from dataclasses import dataclass

from structlayers.bench.rows import FAILED
from structlayers.bench.timing import Timing


@dataclass
class Result:
    """One contender of one case: "timed", "disagrees" (with the oracle), "failed" or "skipped", with the reason.

    None is "not measured"; ``energy_reason`` says why an energy that was asked for is None.
    """

    contender: str
    status: str = FAILED
    reason: str = ""
    resolved: str | None = None  # the backend that ran
    tile: str | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    error: float | None = None  # ||out - oracle|| / ||oracle|| over the rows compared
    plan: str | None = None  # how a chain was executed
    copies: int | None = None  # of the weights, used in turn so that they come from memory
    wall_ms: float | None = None  # of an eager call, the host's part included
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None  # beyond weights and input; of a training step, all that it holds
    energy_j: float | None = None  # of one call
    energy_per_sample_j: float | None = None
    power_w: float | None = None  # mean while it was called without a pause
    energy_window_s: float | None = None
    energy_reason: str = ""

    @property
    def has_energy(self) -> bool:
        """Whether nothing about energy is left to be measured."""
        return self.energy_j is not None or self.p50_ms is None

    def set_timing(self, timing: Timing) -> None:
        self.p20_ms, self.p50_ms, self.p80_ms = timing.p20_ms, timing.p50_ms, timing.p80_ms
        self.samples = timing.samples
