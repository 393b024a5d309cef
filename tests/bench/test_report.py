"""The report from rows of every benchmark: its files, what they say, what they leave out and why."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from structlayers.bench import heuristic, kernel_rows, report, rows
from structlayers.bench.case_rows import CaseRow, append_row
from structlayers.bench.document import Heading, Picture, Table, Text, as_html, as_markdown
from structlayers.bench.kernel_rows import KernelRow
from structlayers.bench.measurements import read_files
from structlayers.bench.report import latency_split, report_blocks
from structlayers.bench.results import Result
from structlayers.bench.rows import Row
from structlayers.patterns import Pattern

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks").glob("kernels_*.jsonl*"))


def result(name, time, energy=None, **more):
    joules = {} if energy is None else {"energy_j": energy, "power_w": 300.0}
    return Result(name, "timed", resolved=name, p20_ms=time * 0.9, p50_ms=time, p80_ms=time * 1.1, **joules, **more)


def factor(pattern, dtype="bfloat16", layout="batch_first", **times):
    results = [result(name, time, time * 0.3) for name, time in times.items()]
    floor = Pattern(*pattern).bytes(25_088, 2) / 4e9
    return KernelRow(
        pattern, 25_088, dtype, layout, False, floor, results, 4000.0, 7e5, "abc", "NVIDIA H100", "580", "2.11",
        idle_power_w=70.0, state={"sm_clock_mhz": 1980.0, "temperature_c": 40.0},
    )  # fmt: skip


def factors():
    shapes = [(a, b, c, d) for a in (1, 4) for b, c in ((48, 48), (64, 256), (256, 64)) for d in (4, 16)]
    found = []
    for place, shape in enumerate(shapes):
        time = Pattern(*shape).bytes(25_088, 2) / 2e9
        found.append(factor(shape, cuda=time, bmm=time * (1 + place % 4), dense=time * (0.5 + place), auto=time))
    return found


def chain(width, n, suite="sweep", planned=1.0, **more):
    results = [
        result("dense", 2.0),
        result("bmm", 3.0),
        result("unfused", 1.5),
        result("planned", planned, plan="fused"),
    ]
    spec = f"(1,{width // 4},{width // 4},4)(4,{width // 4},{width // 4},1)"
    return CaseRow(
        "chain", f"{width} -> {width}, 4 blocks", spec, width, width, n, "bfloat16", "batch_first", "eager", results,
        0.5, suite, "planned", command="python -m structlayers.bench chains", machine={"gpu": "NVIDIA H100"}, **more,
    )  # fmt: skip


def model(variant, time, structure="monarch", baseline="dense", **more):
    return Row(
        "ViT", variant, structure, "auto", "batch_first", "no", "bfloat16", "cuda", 128, "timed",
        p20_ms=time, p50_ms=time, p80_ms=time, baseline=baseline, machine={"gpu": "NVIDIA H100"}, **more,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    kernels, cases, models = (tmp_path / f"{name}.jsonl" for name in ("kernels", "cases", "models"))
    for row in factors():
        kernel_rows.append_row(kernels, row)
    for row in (chain(256, 1), chain(512, 1), chain(256, 64), chain(512, 64, planned=4.0), chain(512, 1, "frozen")):
        append_row(cases, row)
    rows.append_rows(models, [model("dense", 4.0, "dense", speedup=1.0), model("monarch, auto", 2.0, speedup=2.0)])
    rows.append_rows(models, [model("linears free", 1.5, "free", None)])
    return [kernels, cases, models]


def made(files, folder, *more):
    report.main([*map(str, files), "--out", str(folder), *more])
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_one_report_on_everything(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    markdown, html = made(files, tmp_path / "report")
    assert capsys.readouterr().out.split() == [str(tmp_path / "report" / f"report.{kind}") for kind in ("md", "html")]
    titles = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert titles == [
        "Where and how", "Chains", "One factor", "Layers and whole models", "Energy", "What the rules foretell",
        "This report",
    ]  # fmt: skip
    pictures = {
        "chain-times", "chain-speedups", "factor-speedups", "factor-floor", "factor-blocks", "factor-winners",
        "model-speedups", "model-split", "energy", "forecasts",
    }  # fmt: skip
    assert {path.stem for path in (tmp_path / "report" / "figures").iterdir()} == pictures
    assert set(re.findall(r"\(figures/(.*?)\.svg\)", markdown)) == pictures
    assert html.count("data:image/svg+xml;base64,") == len(pictures)
    for text in (
        "NVIDIA H100, driver 580",
        "python -m structlayers.bench chains",
        "Idle, the device took 70 W",
        "fused",
    ):
        assert text in markdown and text in html
    assert "SM clock, MHz: 1980 to 1980" in markdown


class Links(HTMLParser):
    """Whatever a page would fetch, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "srcset", "data", "href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_html_needs_nothing_else(files, tmp_path):
    pytest.importorskip("matplotlib")
    _, html = made(files, tmp_path / "report")
    page = Links()
    page.feed(html)
    assert page.open == []
    assert page.fetched and all(link.startswith("data:image/svg+xml;base64,") for link in page.fetched)
    assert "@import" not in html and "url(" not in html.split("<body>")[0]


@pytest.mark.skipif(not COMMITTED, reason="no committed rows")
def test_the_committed_rows_make_a_report_by_one_command(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "structlayers.bench", "report", *map(str, COMMITTED), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "## What the rules foretell" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_unreadable_lines_and_failed_rows_are_told(files, tmp_path):
    pytest.importorskip("matplotlib")
    failed = chain(1024, 1)
    failed.results[3] = Result("planned", "failed", "OutOfMemoryError: CUDA out of memory")
    failed.results[1].energy_reason = "no counter"
    append_row(files[1], failed)
    with files[1].open("ab") as file:
        file.write(b'not json\n{"kind": "soup"}\n\xff\xfe\n{"kind": "chain", "ca')
    markdown, _ = made(files, tmp_path / "report")
    assert "## What was not timed, and why" in markdown
    assert "OutOfMemoryError: CUDA out of memory" in markdown
    assert "line 7: not a benchmark row" in markdown and "line 9: not a benchmark row" in markdown
    assert "Where no energy stands: no counter." in markdown


def test_mistakes_end_in_one_line(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{}\n")
    for path, message in ((tmp_path / "absent.jsonl", "no such file"), (empty, "no benchmark row")):
        with pytest.raises(SystemExit, match=message) as exit:
            made([path], tmp_path / "report")
        assert "\n" not in exit.value.code
    assert not (tmp_path / "report").exists()


def test_a_file_of_another_kind_is_one_short_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("In the beginning was the word.\n" * 1000)
    with pytest.raises(SystemExit, match=r"book\.txt, line 1: not a benchmark row.* \(and 999 more lines\)") as exit:
        made([path], tmp_path / "report")
    assert len(exit.value.code) < 400


def test_a_case_measured_again_counts_once(tmp_path):
    path = tmp_path / "cases.jsonl"
    first, second, partial = chain(256, 1, planned=4.0), chain(256, 1, planned=1.0), chain(256, 1)
    partial.results = partial.results[:1]
    for row in (first, second, partial):
        append_row(path, row)
    [found] = read_files([path]).cases
    assert found.ratio("planned") == 2.0


def test_latency_is_split_by_the_model_with_free_linears():
    found = latency_split([model("dense", 4.0, "dense"), model("linears free", 1.5, "free"), model("monarch", 1.2)])
    assert found == [("dense, bfloat16, batch 128", 2.5, 1.5), ("monarch, bfloat16, batch 128", 0.0, 1.2)]
    assert latency_split([model("dense", 4.0, "dense")]) == []


def test_parts_that_rows_say_nothing_about_are_left_out(tmp_path):
    path = tmp_path / "models.jsonl"
    rows.append_rows(path, [model("dense", 4.0, "dense")])
    blocks = report_blocks(read_files([path]))
    assert [block.text for block in blocks if isinstance(block, Heading)] == [
        "Where and how",
        "Layers and whole models",
    ]
    assert not any(isinstance(block, Picture) for block in blocks)


def test_text_is_escaped_and_long_tables_are_whole_in_the_html():
    lines = [["name", "a|b"], *([f"<{q}>", str(q)] for q in range(100))]
    blocks = [Text("1 < 2 & so on"), Table(lines, "a <caption>")]
    html, markdown = as_html("<title>", blocks), as_markdown("title", blocks)
    assert "1 &lt; 2 &amp; so on" in html and "&lt;99&gt;" in html and "<99>" not in html
    assert "a\\|b" in markdown and "40 more lines are in report.html" in markdown and "<99>" not in markdown


# ---- the rules


def test_a_rule_that_holds_is_found_to_hold():
    found = []
    for place, a in enumerate((1, 2, 3, 4, 6, 8, 12, 16)):
        for b in (48, 96, 384):
            pattern = Pattern(a, b, b, 4)
            ratio = 40 * (2 / b) ** 0.5 * pattern.density**0.1
            found.append(factor(tuple(pattern), cuda=1.0 + place, bmm=(1.0 + place) * ratio))
    score = heuristic.score("rule", heuristic.paper_forecasts(found))
    assert score.median_error < 1e-6 and score.winner_right == 1.0
    assert score.rank_correlation == pytest.approx(1.0)
    assert heuristic.paper_forecasts(found[:5]) == []


def test_every_row_is_foretold_without_itself():
    found = [factor((a, 64, 64, 4), cuda=1.0, bmm=2.0) for a in (1, 2, 3, 4, 6, 8, 12)]
    found.append(factor((16, 64, 64, 4), cuda=1.0, bmm=50.0))
    last = heuristic.paper_forecasts(found)[-1]
    # From the others, that all have 2, nothing else can be foretold.
    assert (last.measured, last.foretold) == (50.0, pytest.approx(2.0))


def test_the_cost_model_is_taken_as_it_stands():
    found = factors()
    choices = heuristic.model_choices(found)
    assert len(choices) == len(found)
    assert all(choice.chosen in ("cuda", "bmm") and choice.regret >= 0 for choice in choices)
    assert all(forecast.foretold > 0 for forecast in heuristic.model_forecasts(found))
    # On a CPU there is no kernel: bmm against the rest.
    results = [result("bmm", 1.0), result("einsum", 2.0)]
    cpu = [KernelRow((1, 8, 8, 4), 64, "float32", "batch_first", False, 0.1, results, 10.0, 100.0, gpu="AMD EPYC")]
    assert [choice.best for choice in heuristic.model_choices(cpu)] == ["bmm"]
    assert [forecast.own for forecast in heuristic.model_forecasts(cpu)] == ["bmm"]


def test_rank_correlation():
    assert heuristic.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert heuristic.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert heuristic.rank_correlation([1, 1, 1], [3, 2, 1]) == 0.0
    assert heuristic.rank_correlation([1, 1, 2, 2], [1, 1, 5, 5]) == pytest.approx(1.0)
