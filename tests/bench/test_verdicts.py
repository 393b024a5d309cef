"""Two result files, case by case."""

import pytest

from structlayers.bench import case_rows, kernel_rows, rows, verdicts
from structlayers.bench.case_rows import CaseRow
from structlayers.bench.kernel_rows import KernelRow
from structlayers.bench.measurements import read_files
from structlayers.bench.results import Result
from structlayers.bench.rows import Row
from structlayers.bench.timing import EAGER, GRAPH


def result(name, time, spread=0.02):
    low, high = (None, None) if spread is None else (time * (1 - spread), time * (1 + spread))
    return Result(name, "timed", p20_ms=low, p50_ms=time, p80_ms=high)


def case(name, *results):
    return CaseRow("chain", name, "(1,2,2,1)", 2, 2, 8, "bfloat16", "batch_first", "eager", list(results))


@pytest.fixture
def compared(tmp_path):
    def compare(before, after, *more, **options):
        found = []
        for name, cases in (("before", before), ("after", after)):
            path = tmp_path / f"{name}.jsonl"
            path.unlink(missing_ok=True)
            for row in cases:
                case_rows.append_row(path, row)
            found.append(read_files([path]))
        return {
            f"{v.measurement.case.split(':')[0]} {v.measurement.contender}": v.verdict
            for v in verdicts.compare_files(*found, **options)
        }

    return compare


def test_a_verdict_for_every_case(compared):
    failed = Result("planned", "failed", "out of memory")
    before = [
        case("a", result("dense", 1.0), result("planned", 1.0)),
        case("b", result("planned", 1.0, 0.3)),
        case("c", result("planned", 1.0)),
        case("d", failed),
        case("e", result("planned", 1.0)),
        case("g", result("planned", 1.0, None)),
        case("h", failed),
    ]
    after = [
        case("a", result("dense", 1.02, 0.001), result("planned", 0.8)),
        case("b", result("planned", 1.2, 0.3)),
        case("c", result("planned", 1.1)),
        case("d", result("planned", 1.0)),
        case("f", result("planned", 1.0)),
        case("g", failed),
        case("h", failed),
    ]
    assert compared(before, after) == {
        "a dense": "same",  # 2 %, below the threshold
        "a planned": "faster",
        "b planned": "same",  # 20 %, within the spread
        "c planned": "slower",
        "d planned": "timed now",
        "e planned": "only before",
        "f planned": "only after",
        "g planned": "no longer timed",
    }
    assert compared(before[:1], after[:1], threshold=0.3) == {"a dense": "same", "a planned": "same"}


def test_two_machines_are_compared_by_dense(compared):
    before = [case("a", result("dense", 1.0), result("planned", 0.5)), case("b", result("planned", 1.0))]
    after = [case("a", result("dense", 4.0), result("planned", 1.0)), case("b", result("planned", 1.0))]
    assert compared(before, after, relative=True) == {"a dense": "same", "a planned": "faster"}
    assert compared(before, after)["a planned"] == "slower"


def test_rows_of_every_benchmark_are_compared(tmp_path, capsys):
    def kernel(time):
        return KernelRow((1, 2, 2, 1), 8, "float16", "batch_first", False, 0.1, [result("cuda", time)], 1.0, 1.0)

    def model(time):
        return Row("ViT", "dense", "dense", "torch", "batch_first", "no", "float32", "cpu", 4, "timed",
                   p20_ms=time, p50_ms=time, p80_ms=time, machine={"cpu": "one", "threads": 1})  # fmt: skip

    paths = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    for path, time in zip(paths, (1.0, 2.0), strict=True):
        kernel_rows.append_row(path, kernel(time))
        rows.append_rows(path, [model(time / 4)])
    with paths[1].open("a") as file:
        file.write("no json\n")
    verdicts.main([*map(str, paths)])
    out = capsys.readouterr().out
    assert "left out: " in out and "line 3: not a benchmark row" in out
    assert "before: one, 1 thread(s)" in out
    listed = [line.split() for line in out.splitlines() if line.startswith("slower")]
    assert [(line[1], line[-3:]) for line in listed] == [
        ("factor", ["1", "2", "0.500"]),
        ("model", ["0.25", "0.5", "0.500"]),
    ]
    with pytest.raises(SystemExit, match="1"):
        verdicts.main([*map(str, paths), "--fail-on-slower"])
    verdicts.main([str(paths[1]), str(paths[0]), "--fail-on-slower"])
    with pytest.raises(SystemExit, match="no such file"):
        verdicts.main([str(paths[0]), str(tmp_path / "absent.jsonl")])


def test_one_factor_timed_in_two_ways_is_two_cases(tmp_path):
    def of(time: float, timing: str) -> KernelRow:
        results = [result("cuda", time)]
        return KernelRow((1, 2, 2, 1), 8, "float16", "batch_first", False, 0.1, results, 1.0, 1.0, timing=timing)

    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    kernel_rows.append_row(before, of(1.0, GRAPH))
    kernel_rows.append_row(after, of(1.0, GRAPH))
    kernel_rows.append_row(after, of(2.0, EAGER))
    found = verdicts.compare_files(read_files([before]), read_files([after]))
    assert sorted(entry.verdict for entry in found) == [verdicts.NEW, verdicts.SAME]
