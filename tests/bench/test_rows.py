import gzip
import json
import subprocess
import sys

import pytest

from structlayers.bench.rows import DISAGREES, TIMED, Row, append_rows, read_rows, table
from structlayers.errors import DataError


def row(**changes) -> Row:
    values = {
        "case": "model",
        "variant": "monarch, auto",
        "structure": "monarch",
        "backend": "auto",
        "layout": "batch_first",
        "compiled": "no",
        "dtype": "float32",
        "device": "cpu",
        "batch": 4,
        "status": TIMED,
        "p20_ms": 1.0,
        "p50_ms": 2.0,
        "p80_ms": 3.0,
        "throughput_per_s": 2000.0,
        "machine": {"torch": "2.11"},
    }
    return Row(**(values | changes))


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    first, second = row(), row(status=DISAGREES, reason="off by 3", p50_ms=None)
    append_rows(path, [first])
    append_rows(path, [second])
    assert read_rows(path) == [first, second]


def test_a_line_cut_short_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row(batch=1), row(batch=2)])
    path.write_bytes(path.read_bytes()[:-20])
    assert [found.batch for found in read_rows(path)] == [1]
    append_rows(path, [row(batch=3)])
    assert [found.batch for found in read_rows(path)] == [1, 3]


WRITER = """
import sys
from pathlib import Path
from structlayers.bench.jsonl import append_lines
for q in range(60):
    append_lines(Path(sys.argv[1]), [{"who": sys.argv[2], "q": q, "long": "x" * 200_000}])
"""


def test_two_processes_appending_lose_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("one", "two")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [(name, q) for name in ("one", "two") for q in range(60)]
    assert sorted((line["who"], line["q"]) for line in found) == expected


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/rows.jsonl: cannot be written: .*File exists"):
        append_rows(tmp_path / "file" / "rows.jsonl", [row()])


def test_rows_of_a_later_version_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row()])
    values = json.loads(path.read_text()) | {"energy_j": 1.0}
    path.write_text(json.dumps(values) + "\n")
    assert len(read_rows(path)) == 1


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"case": "only"}'])
def test_a_file_of_something_else_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row()])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        read_rows(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent"):
        read_rows(tmp_path / "absent.jsonl")


def test_numbers_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError):
        append_rows(tmp_path / "rows.jsonl", [row(error=float("nan"))])
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_table_shows_times_and_reasons():
    text = table([row(speedup=1.5, resolved_backend="bmm"), row(batch=8, status=DISAGREES, reason="off", p50_ms=None)])
    lines = text.splitlines()
    assert "auto -> bmm" in lines[2] and "[1, 3]" in lines[2] and "1.50" in lines[2] and "2,000" in lines[2]
    assert "disagrees" in lines[3] and "[1, 3]" not in lines[3]
    assert lines[4] == "not timed: monarch, auto, float32, batch 8: off"


def test_compressed_rows_are_read_and_not_added_to(tmp_path):
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    append_rows(plain, [row(), row(variant="dense")])
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_rows(packed) == read_rows(plain)
    before = packed.read_bytes()
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: rows are not added to a compressed file"):
        append_rows(packed, [row()])
    assert packed.read_bytes() == before
    for content in (before[:-20], b"no gzip at all"):
        packed.write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read"):
            read_rows(packed)
