import struct
import sys
from pathlib import Path

import pytest

from structlayers.bench.plot import plot_rows
from structlayers.bench.rows import FAILED, TIMED, Row
from structlayers.errors import ConfigError, DataError


def row(variant: str, batch: int, p50_ms: float | None, dtype: str = "float32") -> Row:
    return Row(
        case="model",
        variant=variant,
        structure="monarch",
        backend="auto",
        layout="batch_first",
        compiled="no",
        dtype=dtype,
        device="cpu",
        batch=batch,
        status=FAILED if p50_ms is None else TIMED,
        p20_ms=p50_ms,
        p50_ms=p50_ms,
        p80_ms=p50_ms,
        baseline="dense",
        speedup=p50_ms and 1.0 / p50_ms,
    )


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_one_line_of_panels_for_each_dtype(tmp_path):
    rows = [row("dense", n, 1.0) for n in (1, 64)] + [row("monarch, auto", n, 0.5) for n in (1, 64)]
    plot_rows(rows, tmp_path / "new" / "one.png")
    plot_rows([*rows, row("dense", 1, 2.0, "bfloat16")], tmp_path / "two.png")
    one, two = png_size(tmp_path / "new" / "one.png"), png_size(tmp_path / "two.png")
    assert one[0] == two[0] >= 1000
    assert two[1] > one[1] >= 400


def test_failed_rows_and_single_points_are_no_hindrance(tmp_path):
    plot_rows([row("dense", 8, 1.0), row("monarch, auto", 8, None)], tmp_path / "plot.png")
    assert png_size(tmp_path / "plot.png")


def test_nothing_timed_is_an_error_and_no_file(tmp_path):
    with pytest.raises(DataError, match="no row was timed"):
        plot_rows([row("dense", 1, None)], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="matplotlib"):
        plot_rows([row("dense", 1, 1.0)], tmp_path / "plot.png")
