"""Timing: warm-up, L2 flush, interleaved rounds, medians."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structlayers.errors import ConfigError


@dataclass(frozen=True)
class Timing:
    """Latency quantiles over repeated calls."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Timing":
        levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        p20, p50, p80 = torch.tensor(samples_ms, dtype=torch.float64).quantile(levels)
        return cls(float(p20), float(p50), float(p80), len(samples_ms))


@dataclass(frozen=True)
class TimingPlan:
    """How long to measure: every call is sampled for about ``budget_s`` seconds, within the limits of samples.

    Raises ``ConfigError`` for numbers that allow no sample.
    """

    warmup: int = 3
    budget_s: float = 1.0
    min_samples: int = 10
    max_samples: int = 200
    flush_l2: bool = True

    def __post_init__(self) -> None:
        if self.warmup < 1 or not 1 <= self.min_samples <= self.max_samples or self.budget_s < 0:
            raise ConfigError(f"{self}: expected warmup >= 1, 1 <= min_samples <= max_samples, budget_s >= 0")

    def n_samples(self, pilot_ms: float) -> int:
        """How often to sample a call that took ``pilot_ms``."""
        wanted = self.budget_s * 1e3 / max(pilot_ms, 1e-6)
        return int(min(max(wanted, self.min_samples), self.max_samples))


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, plan: TimingPlan
) -> dict[str, Timing | Exception]:
    """Time several calls in interleaved rounds, so that drift (clocks, other load) meets all of them and ratios come
    from one run.

    On CUDA: events around one call, L2 flushed before it, the stream idle before the flush; what the host needs to
    launch beyond the flush counts, as it does for a user. On CPU: ``perf_counter`` around one call, caches as the
    previous call left them. A call that raises gets its exception as result and the others go on.
    """
    sampler = _cuda_sampler(device, plan.flush_l2) if device.type == "cuda" else _cpu_sample
    results: dict[str, Timing | Exception] = {}
    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        try:
            for _ in range(plan.warmup):
                call()
            counts[name] = plan.n_samples(sampler(call))
        except Exception as error:  # whatever one variant raises is its result; the others are still to be timed
            results[name] = error
    n_rounds = max(counts.values(), default=0)
    for round_ in range(n_rounds):
        for name in list(counts):
            # A slow call takes part in fewer rounds, spread evenly over the whole run.
            if (round_ + 1) * counts[name] // n_rounds == round_ * counts[name] // n_rounds:
                continue
            try:
                samples[name].append(sampler(calls[name]))
            except Exception as error:
                results[name] = error
                del counts[name]
    results.update({name: Timing.of(samples[name]) for name in counts})
    return results


def _cpu_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_sampler(device: torch.device, flush_l2: bool) -> Callable[[Callable[[], object]], float]:
    scratch: Tensor | None = None
    if flush_l2:
        # Twice the cache, so that nothing of the previous call survives whatever the replacement policy.
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        scratch = torch.empty(size, dtype=torch.int8, device=device)

    def sample(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            if scratch is not None:
                scratch.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

    return sample
