"""Timing: warm-up, L2 flush, interleaved rounds, medians."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from structlayers.errors import ConfigError
from structlayers.values import FLAG, NOT_NEGATIVE, check, integer, one_of

# Ways of timing a call; what rows say of it.
EAGER, GRAPH, IN_TURN = "eager call, L2 flushed", "graph replay, L2 flushed", "graph replay, weights in turn"
ON_CPU = {EAGER: "eager call", GRAPH: "eager call", IN_TURN: "calls in turn, weights in turn"}
TIMINGS = ("graph", "eager")
LARGEST_SMALL_BATCH = 64
# Moving so many bytes takes 0.7 ms, of which the host's part is nothing.
_LARGEST_GRAPH = 2 * 10**9


def way_of_timing(device: torch.device, timing: str, n: int, n_bytes: int = 0) -> str:
    """How a product with a batch of ``n`` is timed. ``timing``: "graph", or "eager", where the host's part counts.

    ``n_bytes`` are those of input, weights and output. Large products are called eagerly all the same: what a graph
    needs stays its own, so that those of several contenders do not fit a GPU together.
    """
    if timing not in TIMINGS:
        raise ConfigError(f"timing = {timing!r}: expected one of {', '.join(TIMINGS)}")
    if timing == "eager" or (n_bytes > _LARGEST_GRAPH and n > LARGEST_SMALL_BATCH):
        way = EAGER
    else:
        way = IN_TURN if n <= LARGEST_SMALL_BATCH else GRAPH
    return way if device.type == "cuda" else ON_CPU[way]


def takes_turns(way: str) -> bool:
    """Whether every sample calls several times, with copies of the weights."""
    return way in (IN_TURN, ON_CPU[IN_TURN])


def check_batches(batches: Sequence[int]) -> None:
    """Raises ``ConfigError`` for a batch below 1, of which there is nothing to check or to time."""
    for n in batches:
        if n < 1:
            raise ConfigError(f"batch = {n}: expected an integer >= 1")


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

    def per_call(self, calls: int) -> "Timing":
        """The latency of one of ``calls`` calls that every sample ran one after the other."""
        return Timing(self.p20_ms / calls, self.p50_ms / calls, self.p80_ms / calls, self.samples)


# The least of each is the plan's to say, in one sentence.
_KINDS = {
    **dict.fromkeys(("warmup", "min_samples", "max_samples"), integer(0)),
    "budget_s": NOT_NEGATIVE,
    "flush_l2": FLAG,
    "flush_by": one_of("write", "read"),
}


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
    # "write" fills the cache with lines that must be written back before others take their place, as the work before a
    # layer does; "read" fills it with clean ones.
    flush_by: str = "write"

    def __post_init__(self) -> None:
        check(vars(self), _KINDS)
        if self.warmup < 1 or not 1 <= self.min_samples <= self.max_samples or not self.budget_s >= 0:
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
    sampler = _cuda_sampler(device, plan) if device.type == "cuda" else _cpu_sample
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


def in_turn(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """One call that makes all ``calls``, on CUDA as a captured graph, so that the host takes no part in it.

    Every call is made once before the capture, for what it compiles or allocates at first. Raises whatever a call
    raises, and torch's own error where one cannot be captured.
    """
    if device.type != "cuda":

        def run() -> None:
            for call in calls:
                call()

        return run
    with torch.cuda.device(device):
        # One stream for both, whose workspaces the first round allocates.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(): it empties the allocator's cache every time, which takes longer than short cases.
        with torch.cuda.stream(stream), _no_garbage_collection():
            graph.capture_begin()
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
    return graph.replay


def call_to_time(
    way: str,
    call: Callable[[], object],
    copy: Callable[[], Callable[[], object]],
    read_bytes: int,
    device: torch.device,
) -> tuple[Callable[[], object], int | None]:
    """What is sampled to time ``call`` that ``way``, and how many calls it makes, or None for one.

    ``copy()`` gives the same call with weights of its own; ``read_bytes`` are those that a call reads of them.
    """
    if takes_turns(way):
        count = copies_beyond_cache(read_bytes, device)
        return in_turn([call, *(copy() for _ in range(count - 1))], device), count
    return (in_turn([call], device) if way == GRAPH else call), None


def release_memory(device: torch.device) -> None:
    """Give back what the allocator holds and nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_room(device: torch.device) -> None:
    """Release memory where most of the GPU's is held: graphs of earlier cases keep theirs in pools of their own, which
    no allocation in a capture can free.
    """
    if device.type == "cuda" and 2 * torch.cuda.memory_reserved(device) > torch.cuda.mem_get_info(device)[1]:
        release_memory(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What a collection frees may be another graph, which a capture does not survive."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def copies_beyond_cache(n_bytes: int, device: torch.device, most: int = 128) -> int:
    """How many copies of ``n_bytes`` are twice as large as the L2: 2 to ``most``; on a CPU always 2.

    Where ``most`` are smaller than that, they come from memory if the L2 is flushed before every round.
    """
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-2 * cache // max(n_bytes, 1)), 2), most)


def wall_time_ms(call: Callable[[], object], device: torch.device, plan: TimingPlan) -> float:
    """Median wall time of one eager call, the device idle before and after it."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def sample() -> float:
        finish()
        start = time.perf_counter()
        call()
        finish()
        return (time.perf_counter() - start) * 1e3

    for _ in range(plan.warmup):
        call()
    return Timing.of([sample() for _ in range(plan.n_samples(sample()))]).p50_ms


def _cpu_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_sampler(device: torch.device, plan: TimingPlan) -> Callable[[Callable[[], object]], float]:
    flush = _flusher(device, plan.flush_by) if plan.flush_l2 else lambda: None

    def sample(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            flush()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

    return sample


def _flusher(device: torch.device, by: str) -> Callable[[], object]:
    # Twice the cache, so that nothing of the previous call survives whatever the replacement policy.
    scratch = torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
    if by == "write":
        return scratch.zero_
    total = torch.empty((), device=device)
    return lambda: torch.sum(scratch, dim=0, out=total)
