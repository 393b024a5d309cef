"""The kernel benchmark on a CPU: its grid, its rows, resuming, and what it makes of rows."""

import itertools
import json

import pytest
import torch

from structlayers.bench import chains, grid, kernels, overhead, training
from structlayers.bench.kernel_rows import KernelRow, append_row, line, read_rows, summary
from structlayers.bench.machine import Roofline
from structlayers.bench.products import rows_to_check
from structlayers.bench.results import Result
from structlayers.errors import DataError
from structlayers.patterns import Pattern


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
    """Ceilings that take no time; a CPU whatever the machine has."""
    monkeypatch.setattr(kernels, "measure_roofline", lambda device, dtype: Roofline(10.0, 100.0))


def command(out, *more: str) -> None:
    fixed = ["--device", "cpu", "--budget", "0", "--samples", "3", "3", "--out", str(out)]
    kernels.main([*fixed, *more])


TWO = ("--patterns", "(1,4,6,2)(2,6,3,1)", "--batches", "130", "--dtypes", "float32", "bfloat16")


# ---- the grid


def test_the_papers_grid_has_376_patterns():
    patterns = grid.paper_grid()
    assert len(patterns) == len(set(patterns)) == 376
    assert {p.a for p in patterns} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}
    assert {p.d for p in patterns} == {4, 16, 64}
    assert {p.b / p.c for p in patterns} == {0.25, 1.0, 4.0}
    assert max(grid.PAPER_BATCH * max(p.in_features, p.out_features) for p in patterns) < 2**31


def test_the_sample_is_spread_over_the_whole_grid():
    sample, patterns = grid.sample(80), grid.paper_grid()
    assert sample == grid.sample(80)
    assert len(set(sample)) == 80
    assert set(sample) <= set(patterns)
    traffic = sorted(p.bytes(grid.PAPER_BATCH, 2) for p in patterns)
    chosen = [p.bytes(grid.PAPER_BATCH, 2) for p in sample]
    assert (min(chosen), max(chosen)) == (traffic[0], traffic[-1])
    # A quarter of the sample in every quarter of the grid.
    for quarter in range(4):
        low, high = traffic[quarter * 94], traffic[min(quarter * 94 + 94, 375)]
        assert 15 <= sum(low <= size <= high for size in chosen) <= 25
    assert grid.sample(376) == sorted(patterns, key=lambda p: (p.bytes(grid.PAPER_BATCH, 2), p))
    with pytest.raises(ValueError, match="count = 377: expected 2 to 376"):
        grid.sample(377)


def test_patterns_outside_the_grid_are_outside():
    assert len(set(grid.OUTSIDE)) == 20
    assert not set(grid.OUTSIDE) & set(grid.paper_grid())
    assert {1, 2, 8, 32} <= {p.d for p in grid.OUTSIDE}
    assert grid.neighbour(Pattern(5, 37, 48, 7)) == Pattern(5, 48, 48, 8)
    assert grid.neighbour(Pattern(5, 32, 48, 4)) == Pattern(5, 32, 48, 4)
    assert all(grid.neighbour(pattern) != pattern for pattern in grid.ODD)


def test_compared_rows_have_the_first_and_the_tail():
    assert rows_to_check(3) == [0, 1, 2]
    for n in (96, 97, 25_087):
        rows = rows_to_check(n)
        assert rows == sorted(set(rows))
        assert {0, 47, n - 48, n - 1} <= set(rows)
        assert max(rows) == n - 1
    assert max(b - a for a, b in itertools.pairwise(rows)) < 25_087 // 30


# ---- the command


def test_two_patterns_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "folder" / "kernels.jsonl"
    command(out, *TWO)
    rows = read_rows(out)
    assert [row.case for row in rows] == [
        (pattern, 130, dtype, layout, False, "eager call")
        for dtype in ("float32", "bfloat16")
        for layout in ("batch_first", "batch_last")
        for pattern in ((1, 4, 6, 2), (2, 6, 3, 1))
    ]
    for row in rows:
        assert [result.contender for result in row.results] == ["einsum", "bmm", "dense", "dense_built", "auto"]
        for result in row.results:
            assert (result.status, result.samples) == ("timed", 3)
            assert 0 < result.p20_ms <= result.p50_ms <= result.p80_ms
            assert 0 < result.error < 0.01
        assert row.result("auto").resolved in ("einsum", "bmm", "dense")
        assert (row.torch, row.copy_gb_per_s) == (torch.__version__, 10.0)
        assert row.gpu and row.time
    pattern = Pattern(*rows[0].pattern)
    assert rows[0].floor_ms == pytest.approx(pattern.bytes(130, 4) / 10e6, rel=1e-3)
    text = capsys.readouterr().out
    assert "(1,4,6,2)" in text
    assert "bfloat16, batch_last: 2 cases, 0 wrong or failed results" in text
    assert "auto, untuned, n = 130" in text


def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "kernels.jsonl"
    command(out, *TWO, "--seconds", "0")
    assert len(read_rows(out)) == 1
    assert "run again to go on" in capsys.readouterr().out
    first = out.read_text()
    # A killed run leaves half a line.
    out.write_text(first + first[: len(first) // 2])
    command(out, *TWO)
    assert out.read_text().startswith(first)
    assert len({row.case for row in read_rows(out)}) == len(read_rows(out)) == 8
    whole = out.read_text()
    command(out, *TWO)
    command(out, *TWO, "--backends", "bmm", "auto")
    command(out, "--summary")
    assert out.read_text() == whole
    command(out, *TWO, "--layouts", "batch_first", "--dtypes", "float32", "--backends", "reference")
    assert [row.results[0].contender for row in read_rows(out)[8:]] == ["reference"] * 2


def test_arguments_that_name_nothing_known(tmp_path):
    for arguments, message in (
        (["--backends", "cublas"], "contender 'cublas': expected one of"),
        (["--patterns", "(1,2,3)"], r"expected \(a,b,c,d\)"),
        (["--count", "1000"], "count = 1000: expected 2 to 376"),
        ([*TWO, "--tune"], "cannot tune .*CUDA device"),
    ):
        with pytest.raises(SystemExit, match=message):
            command(tmp_path / "kernels.jsonl", *arguments)
    assert not (tmp_path / "kernels.jsonl").exists()
    with pytest.raises(SystemExit, match=r"^2$"):
        command(tmp_path / "kernels.jsonl", "--dtypes", "int8")


def test_precision_is_set_back(tmp_path):
    torch.set_float32_matmul_precision("highest")
    command(tmp_path / "kernels.jsonl", "--patterns", "(1,4,4,1)", "--batches", "5", "--dtypes", "tf32")
    assert torch.get_float32_matmul_precision() == "highest"
    assert read_rows(tmp_path / "kernels.jsonl")[0].dtype == "tf32"


def test_odd_shapes_come_with_their_neighbours():
    options = kernels.parser().parse_args(["--suite", "odd", "--device", "cpu", "--dtypes", "float16"])
    problems = kernels.cases(options)
    assert len(problems) == 4 * len(grid.ODD)
    found = {(problem.pattern, problem.n) for problem in problems}
    assert all((grid.neighbour(p), grid.PAPER_BATCH) in found and (p, 25_087) in found for p in grid.ODD)


def test_the_default_is_a_hundred_patterns():
    options = kernels.parser().parse_args(["--device", "cpu", "--dtypes", "float16", "--layouts", "batch_first"])
    problems = kernels.cases(options)
    assert len(problems) == 100
    assert {problem.n for problem in problems} == {25_088}


def test_overhead_table(monkeypatch):
    monkeypatch.setattr(overhead, "_CALLS", 2)
    monkeypatch.setattr(overhead, "_ROUNDS", 2)
    text = overhead.overhead_table(torch.device("cpu"))
    assert text.splitlines()[0].split() == ["us", "per", "eager", "call", "inference", "no_grad", "recording"]
    assert [row.split()[0] for row in text.splitlines()[1:]] == [
        "ks_linear,",
        "KSLinear,",
        "operator,",
        "F.linear",
        "(targets)",
    ]


# ---- what rows amount to


def row(pattern=(1, 48, 48, 4), n=25_088, dtype="float16", layout="batch_first", tuned=False, floor=0.1, **times):
    """A row whose times are factors of its floor; ``cuda=2`` took twice the floor."""
    results = [
        Result(name, "timed", resolved=name, tile="run4" if name == "cuda" else None, p50_ms=factor * floor, error=1e-3)
        for name, factor in times.items()
    ]
    for result in results:
        result.resolved = {"auto": "bmm", "dense_built": "dense"}.get(result.contender, result.contender)
    return KernelRow(pattern, n, dtype, layout, tuned, floor, results, 3000.0, 7e5)


def test_summary_of_speed():
    rows = [
        row(cuda=1.25, bmm=5.0, einsum=6.0, dense=4.0),
        row((2, 48, 48, 4), cuda=2.0, bmm=3.0),
        row((1, 48, 48, 16), floor=0.01, cuda=10.0, bmm=30.0),
        row((1, 768, 768, 4), cuda=2.5, bmm=2.0),
    ]
    text = summary(rows)
    assert "float16, batch_first: 4 cases, 0 wrong" in text
    assert "floor >= 20 us (3 cases): median 50%, worst 40% at (1, 768, 768, 4)" in text
    assert "median 2.25, worst 0.80 at (1, 768, 768, 4)" in text
    assert "b = c >= 768: 0.80 times the speed of cuBLAS at worst" in text


def test_summary_of_auto_accuracy_and_odd_shapes():
    rows = [
        row(auto=2.1, bmm=2.0, cuda=1.0, dense_built=5.0),
        row((2, 48, 48, 4), auto=1.0, bmm=1.0, cuda=4.0),
        row((1, 61, 64, 3), n=25_087, cuda=2.0, floor=1.0),
        row((1, 64, 64, 4), n=25_088, cuda=1.0, floor=1.0),
    ]
    rows[3].dtype = rows[2].dtype = "float32"
    rows[3].results.append(Result("bmm", "timed", p50_ms=4.0, error=4e-4))
    text = summary(rows)
    assert "50.0% median, 100% = 100.0 us worst at (1, 48, 48, 4)" in text
    assert "55.0% median, 110% = 110.0 us worst" in text
    assert "c = 64: 2.50 at (1, 64, 64, 4)" in text
    moved = Pattern(1, 64, 64, 4).bytes(25_088, 1) / Pattern(1, 61, 64, 3).bytes(25_087, 1)
    assert f"odd rows {2 * moved:.2f} at (1, 61, 64, 3)" in text


def test_a_wrong_result_is_told():
    wrong = row(bmm=2.0)
    wrong.results.append(Result("cuda", "disagrees", "relative error 1.0e+00 against the oracle", resolved="cuda"))
    assert "cuda: disagrees: relative error 1.0e+00" in line(wrong)
    assert "1 wrong or failed results" in summary([wrong])
    assert "share of floor" not in summary([wrong])


def test_rows_come_back_and_broken_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    first = row(floor=0.125, cuda=1.5, bmm=2.0)
    append_row(path, first)
    assert read_rows(path) == [first]
    assert "null" not in path.read_text()
    path.write_text(path.read_text() + json.dumps({"pattern": [1, 2, 3]}) + "\n")
    with pytest.raises(DataError, match="line 2: not a row"):
        read_rows(path)


def test_a_compressed_file_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=r"rows\.jsonl\.gz: rows are not added to a compressed file"):
        command(tmp_path / "rows.jsonl.gz", *TWO)


@pytest.mark.parametrize(
    ("run", "fixed"),
    [
        (kernels.main, ("--patterns", "(1,4,4,2)", "--layouts", "batch_first", "--backends", "bmm")),
        (chains.main, ("--chains", "(1,4,4,2)", "--contenders", "dense")),
        (training.main, ("--chains", "(1,4,4,2)", "--contenders", "dense")),
    ],
    ids=["kernels", "chains", "training"],
)
def test_a_case_without_memory_for_its_data_is_a_row_and_the_next_is_timed(run, fixed, tmp_path, monkeypatch):
    monkeypatch.setattr(chains, "measure_roofline", lambda device, dtype: Roofline(10.0, 100.0))
    monkeypatch.setattr(training, "measure_roofline", lambda device, dtype: Roofline(10.0, 100.0))
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--budget", "0", "--samples", "1", "1", "--out", str(out), "--dtypes", "float32"]
    # More bytes than an address has.
    run([*options, *fixed, "--batches", str(2**58), "4"])
    (first,), (second,) = (json.loads(text)["results"] for text in out.read_text().splitlines())
    assert first["status"] == "failed"
    assert first["reason"].startswith("no oracle to check against: RuntimeError: ")
    assert second["status"] == "timed"
