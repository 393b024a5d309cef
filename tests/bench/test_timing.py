import time

import pytest
import torch

from structlayers.bench.timing import Timing, TimingPlan, time_interleaved
from structlayers.errors import ConfigError

CPU = torch.device("cpu")
FOUR = TimingPlan(warmup=2, budget_s=0.0, min_samples=4, max_samples=4)


def test_rounds_are_interleaved():
    calls: list[str] = []
    results = time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, FOUR)
    # Two calls to warm up and one pilot each, then turns.
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 4
    assert all(isinstance(timing, Timing) and timing.samples == 4 for timing in results.values())


def test_a_slow_call_is_sampled_less_often_but_over_the_whole_run():
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    plan = TimingPlan(warmup=1, budget_s=0.05, min_samples=2, max_samples=40)
    results = time_interleaved({"fast": lambda: order.append("fast"), "slow": slow}, CPU, plan)
    assert results["fast"].samples == 40
    assert 2 <= results["slow"].samples <= 3
    turns = order[4:]
    assert turns[0] != "slow" and turns[-1] == "slow"
    assert "fast" in turns[turns.index("slow") :]


def test_times_are_those_of_the_call():
    timing = time_interleaved({"sleep": lambda: time.sleep(0.005)}, CPU, FOUR)["sleep"]
    assert 5.0 <= timing.p20_ms <= timing.p50_ms <= timing.p80_ms
    assert timing.p20_ms < 50.0


def test_a_failing_call_stops_no_other():
    count = iter(range(100))

    def fails_late() -> None:
        if next(count) == 5:
            raise MemoryError("late")

    def fails() -> None:
        raise RuntimeError("at once")

    results = time_interleaved({"fails": fails, "late": fails_late, "works": lambda: None}, CPU, FOUR)
    assert str(results["fails"]) == "at once"
    assert str(results["late"]) == "late"
    assert results["works"].samples == 4


def test_quantiles():
    timing = Timing.of([float(n) for n in range(11)])
    assert (timing.p20_ms, timing.p50_ms, timing.p80_ms, timing.samples) == (pytest.approx(2.0), 5.0, 8.0, 11)


@pytest.mark.parametrize("values", [{"budget_s": "abc"}, {"warmup": 1.5}, {"flush_l2": "no"}, {"flush_by": "hand"}])
def test_a_plan_of_other_kinds_of_values_names_them(values):
    [(name, value)] = values.items()
    with pytest.raises(ConfigError, match=f"{name} = {value!r}: expected"):
        TimingPlan(**values)


@pytest.mark.parametrize("values", [{"warmup": 0}, {"min_samples": 0}, {"min_samples": 9, "max_samples": 8}])
def test_plans_without_samples_are_refused(values):
    with pytest.raises(ConfigError, match="expected warmup >= 1"):
        TimingPlan(**values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_see_the_work_of_the_call():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    calls = {"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}
    results = time_interleaved(calls, device, TimingPlan(budget_s=0.2))
    assert 3.0 < results["four"].p50_ms / results["one"].p50_ms < 5.0
