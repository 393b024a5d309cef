"""The choice of ``backend="auto"``: pure, deterministic and sensible."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from structlayers import KSLinear, Layout, Pattern
from structlayers.backends import BACKENDS, available_backends, resolve
from structlayers.backends.auto import CPU_COSTS, GPU_CANDIDATES, choose, cpu_cost_s, gpu_cost_s
from structlayers.bench import grid
from structlayers.bench.heuristic import model_choices
from structlayers.bench.kernel_rows import read_rows
from structlayers.problem import Problem

LAYOUTS = tuple(Layout)


def problem(entries, n, layout=Layout.BATCH_FIRST, dtype=torch.float32, device="cpu") -> Problem:
    return Problem(Pattern(*entries), n, dtype, device, layout)


GRID = [
    problem(entries, n, layout, dtype)
    for entries in itertools.product((1, 7, 64), (1, 5, 64), (1, 16, 100), (1, 3, 128))
    for n, layout, dtype in itertools.product((0, 1, 100, 100_000), LAYOUTS, (torch.float32, torch.bfloat16))
]


def test_the_choice_can_always_run():
    for case in GRID:
        assert choose(case) in available_backends(case), case
        assert resolve("auto", case) is BACKENDS[choose(case)]


def test_the_choice_depends_on_the_problem_alone():
    first = [choose(case) for case in GRID]
    choose.cache_clear()
    torch.manual_seed(1)
    assert [choose(dataclasses.replace(case)) for case in reversed(GRID)] == first[::-1]


def test_the_choice_is_the_cheapest_estimate():
    for case in GRID:
        estimates = {name: cpu_cost_s(name, case) for name in CPU_COSTS[case.layout]}
        assert min(estimates.values()) > 0
        assert estimates[choose(case)] == min(estimates.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_estimates_grow_with_the_batch(layout):
    for entries, name in itertools.product([(1, 64, 16, 8), (512, 2, 2, 1), (13, 7, 7, 3)], CPU_COSTS[layout]):
        estimates = [cpu_cost_s(name, problem(entries, n, layout)) for n in (64, 512, 4096)]
        assert estimates == sorted(estimates)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("entries", "n", "expected"),
    [
        # wide blocks and long batches: the saved FLOPs decide
        ((1, 64, 16, 8), 4096, "bmm"),
        ((8, 16, 16, 1), 4096, "bmm"),
        ((4, 256, 256, 1), 4096, "bmm"),
        ((1, 2, 2, 512), 4096, "bmm"),
        ((512, 2, 2, 1), 4096, "bmm"),
        # a matrix of a few numbers: one call decides
        ((2, 2, 2, 2), 1, "dense"),
        ((2, 2, 2, 2), 4096, "dense"),
        ((1, 4, 4, 4), 64, "dense"),
    ],
)
def test_choices_where_measurements_leave_no_doubt(entries, n, expected, layout):
    assert choose(problem(entries, n, layout)) == expected


def test_a_large_factor_is_never_written_out():
    for entries, n, layout in itertools.product([(64, 64, 64, 1), (1, 64, 64, 64)], (1, 64, 4096), LAYOUTS):
        assert choose(problem(entries, n, layout)) != "dense"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_batches_on_a_gpu(dtype, layout):
    """Estimates are positive and grow with the batch; odd rows cost more; one product is never written out first."""
    for entries in ((1, 128, 128, 64), (64, 128, 128, 1), (1, 768, 768, 1), (3, 5, 7, 9), (1, 2, 2, 512)):
        for name in GPU_CANDIDATES:
            times = [gpu_cost_s(name, problem(entries, n, layout, dtype, "cuda")) for n in (1, 8, 64)]
            assert 0 < times[0] <= times[1] <= times[2] < 1e-3
    odd, whole = (gpu_cost_s("cuda", problem((1, 512, c, 8), 1, layout, dtype, "cuda")) for c in (511, 512))
    assert odd > whole
    assert choose(problem((2, 128, 128, 64), 1, layout, dtype, "cuda"), compiled=True) == "cuda"
    if layout is Layout.BATCH_FIRST:
        assert choose(problem((64, 64, 64, 1), 1, layout, dtype, "cuda"), compiled=True) == "cuda"


@pytest.mark.parametrize(
    ("entries", "n", "measured_us"),
    [
        ((64, 128, 128, 1), 1, 2.9),
        ((1, 128, 128, 64), 1, 3.6),
        ((1, 64, 64, 64), 1, 3.2),
        ((4, 192, 192, 1), 8, 2.2),
        ((1, 1024, 256, 4), 16, 4.4),
        ((1, 768, 768, 1), 1, 2.9),
        ((1, 128, 128, 64), 64, 8.2),
    ],
)
def test_estimates_of_small_batches_are_near_what_was_measured(entries, n, measured_us):
    estimate_us = gpu_cost_s("cuda", problem(entries, n, dtype=torch.bfloat16, device="cuda")) * 1e6
    assert 0.7 < estimate_us / measured_us < 1.4


def test_other_devices_take_bmm():
    assert choose(problem((2, 2, 2, 2), 1, device="meta")) == "bmm"


def test_a_layer_tells_what_auto_resolved_to():
    layer = KSLinear("(1,64,16,8)(8,16,16,1)")
    assert layer.resolved_backends(4096) == ["bmm", "bmm"]
    assert KSLinear("(1,64,16,8)(8,16,16,1)", backend="csr").resolved_backends(4096) == ["csr", "csr"]


def on_hopper(entries, dtype=torch.bfloat16) -> Problem:
    return dataclasses.replace(problem(entries, 25_087, dtype=dtype, device="cuda"), capability=(9, 0))


@pytest.mark.parametrize(
    ("entries", "dtype", "expected"),
    [
        # as measured on one H100
        *((entries, torch.bfloat16, "cuda") for entries in grid.ODD),
        *((entries, torch.float32, "cuda") for entries in grid.ODD if entries.d in (3, 5, 6, 7)),
        ((3, 127, 127, 1), torch.bfloat16, "cuda"),
        ((1, 128, 128, 3), torch.float32, "cuda"),
        ((4, 61, 64, 4), torch.bfloat16, "cuda"),
        # weights that do not stay
        ((3, 384, 384, 3), torch.bfloat16, "bmm"),
        ((1, 768, 768, 6), torch.bfloat16, "bmm"),
        ((1, 1021, 1021, 3), torch.float32, "bmm"),
    ],
)
def test_choices_where_nothing_is_made_of_whole_pieces(entries, dtype, expected):
    assert choose(on_hopper(entries, dtype), compiled=True) == expected


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ROWS = [*BENCHMARKS.glob("grid_h100*.jsonl.gz"), *BENCHMARKS.glob("kernels_h100*.jsonl.gz")]


@pytest.mark.skipif(not ROWS, reason="no committed rows")
def test_choices_by_the_committed_rows():
    """What was measured says how much slower the choice is than the fastest: the target, at every batch."""
    by_batch = defaultdict(list)
    for path in ROWS:
        for choice in model_choices(read_rows(path)):
            by_batch[choice.row.n].append(choice)
    assert {1, 16, 256, 4096, 25087, 25088} <= by_batch.keys()
    for n, choices in by_batch.items():
        worst = max(choices, key=lambda choice: choice.regret)
        assert statistics.median(choice.regret for choice in choices) <= 0.03, n
        assert worst.regret <= 0.2, f"n = {n}: {worst.row.pattern} {worst.row.dtype}: {worst.chosen}, not {worst.best}"
