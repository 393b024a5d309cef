import itertools

import pytest
import torch
from torch import Tensor

from structlayers.bench.compare import Case, Conditions, Contender, Variant, compare
from structlayers.bench.machine import Roofline
from structlayers.bench.timing import TimingPlan

PLAN = TimingPlan(warmup=1, budget_s=0.0, min_samples=3, max_samples=3)
W = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def right(x: Tensor) -> Tensor:
    return x @ W.T


def contender(call, **changes) -> Contender:
    values = {"call": call, "eager": call, "parameters": W.numel(), "weight_bytes": W.nbytes}
    return Contender(**(values | changes))


def variant(name: str, call, **changes) -> Variant:
    return Variant(name, "s", "b", "batch_first", lambda: contender(call, **changes), baseline="right")


def rows_of(*variants: Variant, oracle=None):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    exact = oracle or (lambda: x.double() @ W.double().T)
    case = Case("product", x, 4, exact, lambda out: out, 1e-6)
    conditions = Conditions(torch.device("cpu"), torch.float32, PLAN, Roofline(1.0, 1.0), {"torch": "?"})
    return {row.variant: row for row in compare(case, list(variants), conditions)}


def assert_no_time(row):
    assert row.p20_ms is row.p50_ms is row.p80_ms is row.throughput_per_s is row.speedup is None
    assert row.reason


def test_what_agrees_is_timed_and_described():
    rows = rows_of(variant("right", right), variant("again", right, resolved_backend=lambda x: "bmm"))
    row = rows["again"]
    assert row.status == "timed" and not row.reason
    assert row.p20_ms <= row.p50_ms <= row.p80_ms
    assert row.samples == 3
    assert row.throughput_per_s == pytest.approx(4 / row.p50_ms * 1e3)
    assert row.speedup == pytest.approx(rows["right"].p50_ms / row.p50_ms)
    assert row.flops == 2 * 4 * 8 * 16
    # Out 4 x 8, x 4 x 16, w 8 x 16 at 1 GB/s, against 1,024 FLOPs at 1 GFLOP/s.
    assert row.floor_ms == pytest.approx(max(4 * (32 + 64 + 128) / 1e6, 1024 / 1e6))
    assert (row.resolved_backend, row.parameters, row.dtype) == ("bmm", 128, "float32")
    assert 0 <= row.error <= row.tolerance == 1e-6
    assert row.peak_memory_bytes >= 4 * 8 * 4


def test_what_disagrees_is_not_timed():
    rows = rows_of(variant("right", right), variant("wrong", lambda x: right(x) * 1.001))
    assert rows["wrong"].status == "disagrees"
    assert rows["wrong"].error == pytest.approx(1e-3, rel=0.01)
    assert_no_time(rows["wrong"])
    assert rows["right"].status == "timed"


def test_the_closer_check_of_a_contender_counts():
    rows = rows_of(variant("right", right), variant("inside", right, check=lambda x: "layer 3 is off"))
    assert rows["inside"].status == "disagrees"
    assert rows["inside"].reason == "layer 3 is off"
    assert_no_time(rows["inside"])


def test_every_way_to_fail_is_a_row_and_stops_no_other():
    def unbuildable() -> Contender:
        raise ValueError("cannot be\nbuilt")

    def out_of_memory(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too large")

    calls = itertools.count()

    def fails_late(x: Tensor) -> Tensor:
        # The check, the FLOPs and the memory take a call each.
        if next(calls) > 3:
            raise RuntimeError("late")
        return right(x)

    rows = rows_of(
        Variant("unbuildable", "s", "b", "batch_first", unbuildable),
        variant("memory", out_of_memory),
        variant("late", fails_late),
        variant("right", right),
    )
    assert rows["unbuildable"].reason == "ValueError: cannot be"
    assert rows["memory"].reason == "OutOfMemoryError: too large"
    assert rows["late"].reason == "RuntimeError: late"
    for name in ("unbuildable", "memory", "late"):
        assert rows[name].status == "failed"
        assert_no_time(rows[name])
    assert rows["right"].status == "timed"


def test_without_an_oracle_nothing_is_timed():
    def oracle() -> Tensor:
        raise MemoryError("no room")

    row = rows_of(variant("right", right), oracle=oracle)["right"]
    assert row.status == "failed"
    assert "no oracle" in row.reason and "no room" in row.reason
    assert_no_time(row)
