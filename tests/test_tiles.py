"""The choice of a compiled tile: pure, possible for every problem, and of the problem's own layout."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch

from structlayers import Layout, Pattern
from structlayers.backends import cuda, resolve
from structlayers.backends.auto import GPU_CANDIDATES, choose
from structlayers.backends.tiles import (
    SMALL_BATCH,
    SMALL_BATCH_ROWS,
    SMALL_BLOCK,
    SMALL_BLOCKS,
    TILES_16BIT,
    TILES_32BIT,
    choose_tile,
    tiles_for,
)
from structlayers.backends.tuning import Entry
from structlayers.problem import Problem

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 48, 64, 65, 127, 128, 1024)
# (a, d, n)
REST = (
    (1, 1, 1),
    (7, 1, 300),
    (1, 2, 300),
    (3, 2, 64),
    (1, 3, 65),
    (128, 4, 25_088),
    (5, 7, 4096),
    (2, 8, 300),
    (1, 64, 99),
    (1, 16, 4096),
)
FAMILY = [
    Problem(Pattern(a, b, c, d), n, dtype, "cuda", layout, tf32, capability=capability)
    for capability in ((8, 0), (9, 0), (10, 0))
    for b, c in itertools.product(SIZES, SIZES)
    for a, d, n in REST
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False))
    for layout in Layout
]


def test_every_problem_gets_a_tile_that_can_run_it():
    for problem in FAMILY:
        tile = choose_tile(problem)
        assert tile in tiles_for(problem), problem
        assert tile.layout is problem.layout, problem
        assert tile.name != SMALL_BLOCKS or problem.pattern.c <= SMALL_BLOCK, problem
        assert not tile.wgmma or problem.capability == (9, 0), problem
        assert not choose_tile(problem, wgmma=False).wgmma, problem
        assert tile.takes(problem.pattern), problem


def test_the_choice_depends_on_the_problem_alone():
    first = [choose_tile(problem) for problem in FAMILY]
    choose_tile.cache_clear()
    torch.manual_seed(1)
    assert [choose_tile(dataclasses.replace(problem)) for problem in reversed(FAMILY)] == first[::-1]


def test_every_tile_is_chosen_somewhere():
    chosen = {(problem.dtype.itemsize, choose_tile(problem).name) for problem in FAMILY}
    for itemsize, table in ((2, TILES_16BIT), (4, TILES_32BIT)):
        expected = {tile.name for tile in table} | {SMALL_BLOCKS, SMALL_BATCH}
        assert {name for size, name in chosen if size == itemsize} == expected


def test_no_tile_takes_more_shared_memory_than_the_gpu_has():
    for problem in FAMILY:
        if problem.capability != (8, 0):
            continue
        assert choose_tile(problem).shared_bytes <= 163 * 1024, problem
        small = dataclasses.replace(problem, capability=(8, 9))
        tiles = tiles_for(small)
        assert all(tile.shared_bytes <= 99 * 1024 for tile in tiles), small
        assert choose_tile(small) in tiles, small


def test_small_batches_stand_in_where_no_tile_fits(monkeypatch):
    monkeypatch.setattr(cuda, "why_missing", lambda: None)
    monkeypatch.setattr(cuda, "why_device_does_not_serve", lambda device: None)
    problem = Problem(Pattern(1, 64, 64, 4), 4096, torch.float16, "cuda", Layout.BATCH_FIRST, capability=(8, 6))
    assert choose_tile(problem).name == SMALL_BATCH
    assert choose_tile(dataclasses.replace(problem, capability=(8, 0))).name == "run2"
    assert cuda.reason_against(problem) is None
    assert resolve("auto", problem).name == "bmm"


def test_shared_memory_is_what_the_kernels_take():
    launches = (ROOT / "csrc" / "launch.cuh").read_text()
    aliases = dict(re.findall(r"using (\w+LastTile) = (BatchLastTile<.*>);", launches))
    found = {}
    for id_, text in re.findall(r"case (kBatch\w+): return launch_batch_\w+<(.*)>\(p, stream\)", launches):
        text = aliases.get(text.split("<")[0], text)
        kind, numbers = text.split("<")[0], [int(number) for number in re.findall(r"\b\d+\b", text)]
        size = 4 if "Split" in text else 2
        if kind == "BatchFirstTile":
            run, _, warps_n, warps_j, rows, columns, k_bytes, stages, parts = numbers
            x, w = run * warps_n * rows * k_bytes, run * warps_j * columns * k_bytes
            y = run * warps_n * rows * (warps_j * columns // parts * size + 16)
            found[size, id_] = 2 * x + stages * w + y
        else:
            warps_j, warps_n, rows_j, rows_n, k_bytes, stages = numbers
            tj, row = warps_j * rows_j, warps_n * rows_n * size
            k, ready = k_bytes // size, tj * k_bytes + k_bytes // size * row
            raw = tj * (k_bytes + 16) + k * (row + 16)
            aligned, unaligned = stages * ready + tj * (row + 16), ready + stages * raw + tj // 2 * (row + 16)
            found[size, id_] = max(aligned, unaligned)
    header = (ROOT / "csrc" / "tiles.h").read_text()
    numbers = dict(re.findall(r"(k\w+) = (\d+),", header))
    tables = {2: TILES_16BIT, 4: TILES_32BIT}
    expected = {(size, t.number): t.shared_bytes for size, table in tables.items() for t in table if t.shared_bytes}
    assert {(size, int(numbers[id_])): value for (size, id_), value in found.items()} == expected


def test_a_tuned_tile_decides_where_it_exists():
    problem = Problem(Pattern(1, 64, 64, 4), 4096, torch.float16, "cuda", Layout.BATCH_FIRST, capability=(10, 0))
    for tile in tiles_for(problem):
        assert choose_tile(problem, tile.name) == tile
    # A name of another layout, of another version or of nothing.
    for name in ("last", SMALL_BLOCKS, "run3", "", None):
        assert choose_tile(problem, name) == choose_tile(problem)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_batches_have_a_kernel_of_their_own(dtype, layout):
    for b, c, d in ((128, 128, 64), (61, 37, 1), (4096, 4096, 1), (64, 16, 2)):
        for n, own in ((0, True), (1, True), (SMALL_BATCH_ROWS, True), (SMALL_BATCH_ROWS + 1, False)):
            problem = Problem(Pattern(1, b, c, d), n, dtype, "cuda", layout)
            assert (choose_tile(problem).name == SMALL_BATCH) is own, problem
            assert (SMALL_BATCH in [tile.name for tile in tiles_for(problem)]) is own, problem


def test_tiny_blocks_keep_theirs_in_small_batches():
    problem = Problem(Pattern(1, 2, 2, 512), 1, torch.bfloat16, "cuda", Layout.BATCH_FIRST)
    assert choose_tile(problem).name == SMALL_BLOCKS


def test_the_copy_engine_is_given_whole_pieces():
    def names(b: int, c: int, d: int, dtype: torch.dtype = torch.float16) -> set[str]:
        problem = Problem(Pattern(2, b, c, d), 4096, dtype, "cuda", Layout.BATCH_FIRST, capability=(9, 0))
        return {tile.name for tile in tiles_for(problem) if tile.registers}

    assert names(64, 64, 4) == {"registers4", "registers4_wide", "registers4_pair"}
    assert names(64, 64, 8) == {"registers8", "registers8_pair"}
    assert names(61, 8, 2) == {"registers2"}
    assert names(64, 64, 16) == names(64, 64, 24) == {"registers16", "registers16_pair"}
    for b, c, d in ((64, 61, 4), (64, 64, 3), (64, 64, 12), (64, 64, 20), (64, 64, 1)):
        assert not names(b, c, d)
    # float32: pieces of four, of x alone.
    assert names(61, 61, 4, torch.float32) == {"registers4"}
    assert names(64, 64, 8, torch.float32) == names(61, 61, 24, torch.float32) == {"registers8"}
    assert names(61, 60, 1, torch.float32) == {"registers1"}
    for b, c, d in ((64, 61, 1), (64, 61, 2), (64, 64, 3), (64, 64, 12)):
        assert not names(b, c, d, torch.float32)


def test_ctas_share_x_where_blocks_are_wide():
    def chosen(b: int, c: int, d: int) -> str:
        problem = Problem(Pattern(2, b, c, d), 25088, torch.bfloat16, "cuda", Layout.BATCH_FIRST, capability=(9, 0))
        return choose_tile(problem).name

    assert [chosen(768, 768, d) for d in (4, 8, 16)] == ["registers4_pair", "registers8_pair", "registers16_pair"]
    # An odd number of tiles leaves one CTA without work; short b or c are bound by memory.
    assert [chosen(320, 768, d) for d in (4, 8)] == ["registers4", "registers8"]
    assert [chosen(b, c, 4) for b, c in ((768, 256), (256, 768))] == ["registers4", "registers4_wide"]


def test_batch_last_tiles_go_by_how_blocks_divide():
    def chosen(b: int, c: int = 96, dtype: torch.dtype = torch.float16, n: int = 4096, hopper: bool = True) -> str:
        capability = (9, 0) if hopper else (8, 0)
        problem = Problem(Pattern(4, b, c, 4), n, dtype, "cuda", Layout.BATCH_LAST, capability=capability)
        return choose_tile(problem).name

    for dtype in (torch.float16, torch.bfloat16):
        assert [chosen(b, dtype=dtype) for b in (48, 64)] == ["registers_last_narrow"] * 2
        assert [chosen(b, dtype=dtype) for b in (65, 128)] == ["registers_last"] * 2
        # Two CTAs share x where b makes an even number of tiles.
        assert [chosen(b, dtype=dtype) for b in (192, 256, 512)] == ["registers_last_pair"] * 3
        # A third of the tiles along j half empty: narrow ones, unless c is so long that fetching x so often costs more.
        assert [chosen(320, c, dtype) for c in (96, 256, 264)] == ["registers_last_narrow"] * 2 + ["registers_last"]
        assert [chosen(192, c, dtype) for c in (128, 192)] == ["registers_last_pair", "registers_last_narrow"]
        # Few tiles: none waits for a cluster, and the smaller tile of before has less to wait for.
        assert chosen(256, dtype=dtype, n=256) == "registers_last"
        assert [chosen(48, c, dtype, 256) for c in (64, 72)] == ["last_narrow", "registers_last_narrow"]
        # What is not made of whole 16-byte pieces.
        few = [chosen(256, 96, dtype, 1023), chosen(64, 97, dtype, 1023), chosen(256, 97, dtype, 255)]
        assert few == ["last", "last_narrow", "last_narrow"]
        assert [chosen(b, dtype=dtype, hopper=False) for b in (64, 65)] == ["last_narrow", "last"]
    assert [chosen(b, dtype=torch.float32) for b in (48, 256)] == ["registers_last"] * 2


def test_what_is_not_made_of_whole_pieces_has_a_tile_of_its_own():
    def chosen(b: int, c: int, d: int, dtype: torch.dtype = torch.float16, capability: tuple[int, int] = (9, 0)) -> str:
        problem = Problem(Pattern(2, b, c, d), 4096, dtype, "cuda", Layout.BATCH_FIRST, capability=capability)
        return choose_tile(problem).name

    for b, c, d in ((64, 61, 1), (64, 61, 2), (127, 127, 4), (64, 64, 3), (48, 48, 6), (113, 31, 7), (61, 61, 8)):
        assert chosen(b, c, d) == chosen(b, c, d, torch.bfloat16) == "unaligned"
        assert chosen(b, c, d, capability=(8, 0)).startswith("run")
    # y alone.
    assert chosen(61, 64, 4) == chosen(31, 256, 2) == "unaligned"
    # Longer runs have none, and what the copy engine takes keeps its own.
    for b, c, d in ((61, 264, 4), (61, 61, 9), (64, 64, 12), (64, 64, 4), (61, 64, 8), (64, 64, 1)):
        assert chosen(b, c, d) != "unaligned"
    for b, c, d in ((64, 61, 1), (64, 61, 2), (64, 64, 3), (48, 48, 6)):
        assert chosen(b, c, d, torch.float32) == "unaligned"
    for b, c, d in ((64, 61, 4), (61, 60, 1), (61, 61, 8)):
        assert chosen(b, c, d, torch.float32) != "unaligned"


@pytest.mark.parametrize("table", [TILES_16BIT, TILES_32BIT], ids=["16bit", "32bit"])
def test_names_and_numbers_are_distinct_and_those_of_the_kernels(table):
    numbers = {tile.number for tile in table}
    assert len(numbers) == len({tile.name for tile in table}) == len(table)
    compiled = {int(n) for n in re.findall(r"k\w+ = (\d+),", (ROOT / "csrc" / "tiles.h").read_text())}
    assert numbers | {0, 40} <= compiled


# ---- auto on a GPU


def test_auto_takes_the_kernels_only_where_they_are():
    for problem in FAMILY:
        assert choose(problem) in ("dense", "bmm"), problem
        assert choose(problem, compiled=True) in ("cuda", "dense", "bmm"), problem


def test_a_measured_backend_decides_where_it_can_run():
    problem = Problem(Pattern(4, 64, 64, 16), 4096, torch.bfloat16, "cuda", Layout.BATCH_FIRST)
    for name in GPU_CANDIDATES:
        assert choose(problem, True, Entry(name)) == name
    assert choose(problem, False, Entry("cuda", "run4")) == choose(problem, False)
    assert choose(problem, True, Entry("reference")) == choose(problem, True)
