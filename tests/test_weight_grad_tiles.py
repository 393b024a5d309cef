"""The choice of a tile and of splits for a weight gradient: pure, possible for every problem, that of the kernels."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch

from structlayers import Layout, Pattern, ops
from structlayers.backends import bmm, cuda, resolve
from structlayers.backends.weight_grad_tiles import (
    GRAD_TILES_16BIT,
    GRAD_TILES_32BIT,
    GRAD_TILES_HOPPER,
    SMALL_BLOCK,
    choose_grad_tile,
    estimate,
    grad_tiles_for,
    split_counts,
)
from structlayers.problem import Problem

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1, 3, 4, 16, 17, 32, 64, 192, 256, 1024)
# (a, d, n)
REST = (
    (1, 1, 0),
    (1, 1, 1),
    (7, 1, 300),
    (64, 1, 25_088),
    (1, 2, 25_088),
    (1, 4, 25_088),
    (1, 7, 4096),
    (1, 8, 25_088),
)
REST += ((1, 64, 25_088), (2, 24, 777), (128, 1, 1_000_000))
FAMILY = [
    Problem(Pattern(a, b, c, d), n, dtype, "cuda", layout, tf32, capability=(9, 0))
    for b, c in itertools.product(SIZES, SIZES)
    for a, d, n in REST
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False))
    for layout in Layout
]
MULTIPROCESSORS = 132


def test_every_problem_gets_a_tile_that_can_compute_it_and_splits_with_rows_in_them():
    for problem in FAMILY:
        choice = choose_grad_tile(problem, MULTIPROCESSORS)
        assert choice is not None and choice.tile in grad_tiles_for(problem), problem
        assert choice.tile.layout is problem.layout, problem
        assert choice.tile.number != 0 or max(problem.pattern.b, problem.pattern.c) <= SMALL_BLOCK, problem
        assert 1 <= choice.splits <= max(1, -(-problem.n // choice.tile.step)), problem
        # Longer sums than this lose accuracy in the tensor cores' accumulators.
        assert problem.n <= choice.splits * 32_768, problem


def test_the_choice_depends_on_the_problem_alone():
    some = FAMILY[::7]
    first = [choose_grad_tile(problem, MULTIPROCESSORS) for problem in some]
    choose_grad_tile.cache_clear()
    again = [choose_grad_tile(dataclasses.replace(problem), MULTIPROCESSORS) for problem in reversed(some)]
    assert again == first[::-1]


def test_a_long_batch_and_few_blocks_fill_the_gpu_by_splits():
    problem = Problem(Pattern(1, 64, 64, 1), 100_000, torch.bfloat16, "cuda", Layout.BATCH_FIRST, capability=(9, 0))
    choice = choose_grad_tile(problem, MULTIPROCESSORS)
    assert MULTIPROCESSORS // 2 < choice.splits <= 4 * MULTIPROCESSORS


def test_the_chosen_tile_is_expected_to_be_the_fastest():
    for problem in FAMILY[::11]:
        choice = choose_grad_tile(problem, MULTIPROCESSORS)
        expected = estimate(problem, choice.tile, choice.splits, MULTIPROCESSORS)
        for tile in grad_tiles_for(problem):
            for splits in split_counts(problem, tile, MULTIPROCESSORS):
                assert expected <= estimate(problem, tile, splits, MULTIPROCESSORS), (problem, tile)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0)])
def test_no_tile_where_shared_memory_is_small(capability):
    pattern = Pattern(4, 64, 64, 1)
    problem = Problem(pattern, 4096, torch.float16, "cuda", Layout.BATCH_FIRST, capability=capability)
    assert choose_grad_tile(problem, 84) is None


def test_auto_takes_another_backend_where_no_tile_fits(monkeypatch):
    pattern, n = Pattern(4, 64, 64, 1), 32
    problem = Problem(pattern, n, torch.float32, "cuda", Layout.BATCH_FIRST, capability=(8, 6))
    monkeypatch.setattr(cuda, "why_missing", lambda: None)
    monkeypatch.setattr(cuda, "why_device_does_not_serve", lambda device: None)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 84)
    monkeypatch.setattr(ops, "_problem", lambda *arguments: problem)
    assert resolve("auto", problem).name == "cuda"
    dy, x = torch.randn(n, pattern.out_features), torch.randn(n, pattern.in_features)
    found = ops._ks_weight_grad(dy, x, pattern.weight_shape, "batch_first", "auto")
    torch.testing.assert_close(found, bmm.weight_grad(dy, x, pattern, Layout.BATCH_FIRST))


def test_tiles_of_an_older_gpu_fit_its_shared_memory():
    for problem in FAMILY[::13]:
        older = dataclasses.replace(problem, capability=(8, 0))
        tiles = grad_tiles_for(older)
        assert tiles and all(tile.shared_bytes(problem.dtype.itemsize) <= 163 * 1024 for tile in tiles), problem


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [2, 4, 8])
def test_wide_blocks_in_short_runs_go_to_wgmma(dtype, d):
    problem = Problem(Pattern(1, 512, 512, d), 16_384, dtype, "cuda", Layout.BATCH_FIRST, capability=(9, 0))
    choice = choose_grad_tile(problem, MULTIPROCESSORS)
    assert choice is not None and choice.tile in GRAD_TILES_HOPPER and choice.tile.run == d


@pytest.mark.parametrize(
    "changes",
    [
        {"capability": (10, 0)},
        {"capability": (8, 0)},
        {"dtype": torch.float32},
        {"layout": Layout.BATCH_LAST},
        {"pattern": Pattern(1, 512, 516, 4)},
        {"pattern": Pattern(1, 512, 512, 1)},
        {"pattern": Pattern(1, 512, 512, 16)},
        {"pattern": Pattern(3, 511, 512, 4)},
        {"n": 0},
    ],
    ids=str,
)
def test_what_wgmma_does_not_take(changes):
    pattern = Pattern(1, 512, 512, 4)
    problem = Problem(pattern, 4096, torch.bfloat16, "cuda", Layout.BATCH_FIRST, capability=(9, 0))
    assert set(GRAD_TILES_HOPPER) & set(grad_tiles_for(problem))
    assert not set(GRAD_TILES_HOPPER) & set(grad_tiles_for(dataclasses.replace(problem, **changes)))


# ---- the tables are those of the kernels


def compiled_tiles(function: str) -> dict[str, tuple[int, ...]]:
    """By enumerator, the template's numbers: l, warps along i, j, k and n, warp tile, rows of a warp, stages."""
    text = (ROOT / "csrc" / "launch_weight_grad.cuh").read_text(encoding="utf-8")
    body = text[text.index(f"cudaError_t {function}(") :]
    body = body[: body.index("\n}\n")]
    tiles = {}
    for name, numbers in re.findall(r"case (k\w+): .*WeightGradTile<T, \w+, (?:true|false), ([^>]+)>", body):
        tiles[name] = tuple(int(number) for number in numbers.split(","))
    return tiles


@pytest.mark.parametrize(
    ("table", "function", "itemsize"),
    [(GRAD_TILES_16BIT, "start_grad_16bit", 2), (GRAD_TILES_32BIT, "start_grad_32bit", 4)],
    ids=["16bit", "32bit"],
)
def test_the_table_says_what_is_compiled(table, function, itemsize):
    header = (ROOT / "csrc" / "weight_grad.h").read_text(encoding="utf-8")
    numbers = {name: int(number) for name, number in re.findall(r"(kGrad\w+) = (\d+),", header)}
    compiled = compiled_tiles(function)
    assert len({tile.name for tile in table}) == len(table) == len(compiled)
    assert {numbers[name] for name in compiled} == {tile.number for tile in table}
    for name, (run, groups, warps_j, warps_k, warps_n, rows, columns, warp_rows, stages) in compiled.items():
        tile = next(tile for tile in table if tile.number == numbers[name])
        assert (tile.layout is Layout.BATCH_LAST) == ("Last" in name), name
        assert (tile.run, tile.groups) == (run, groups), name
        assert (tile.rows, tile.columns) == (warps_j * rows, warps_k * columns), name
        assert (tile.step, tile.stages) == (warps_n * warp_rows, stages), name
        assert tile.shared_bytes(itemsize) <= 227 * 1024, name


def test_the_table_of_wgmma_tiles_says_what_is_compiled():
    header = (ROOT / "csrc" / "weight_grad.h").read_text(encoding="utf-8")
    launch = (ROOT / "csrc" / "launch_weight_grad_hopper.cuh").read_text(encoding="utf-8")
    kernel = (ROOT / "csrc" / "weight_grad_hopper.cuh").read_text(encoding="utf-8")
    numbers = {name: int(number) for name, number in re.findall(r"(kGrad\w+) = (\d+),", header)}
    compiled = re.findall(r"(?:case (k\w+)|default): .*HopperGradTile<T, (\d), (\d)>", launch)
    assert len(compiled) == len(GRAD_TILES_HOPPER)
    for (name, run, cluster), tile in zip(compiled, GRAD_TILES_HOPPER, strict=True):
        assert (tile.number, tile.run, tile.cluster) == (numbers[name or f"kGradHopper{run}"], int(run), int(cluster))
        assert (tile.rows, tile.columns) == (128, 256 // tile.run) and tile.step == (16 if tile.run == 8 else 32)
    assert "TJ = 128, TK = 256 / DL, Rows = DL == 8 ? 16 : 32" in kernel
    assert [tile.stages for tile in GRAD_TILES_HOPPER] == [5, 4, 4] and "DyStages = DL == 2 ? 5 : 4" in kernel
