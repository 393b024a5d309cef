"""The chain benchmark on a CPU: its cases, its rows, resuming, its verdicts, and what a wrong or failing way leaves."""

from dataclasses import replace

import pytest
import torch

from structlayers import Chain
from structlayers.backends import BACKENDS
from structlayers.bench import chain_calls, chains
from structlayers.bench.case_rows import CaseRow, append_row, read_rows, table, verdict
from structlayers.bench.chain_cases import BLOCKS, SUITES, WIDTHS, ChainCase, chain_cases
from structlayers.bench.chains import ChainConditions, never_slower, time_chain
from structlayers.bench.machine import Roofline
from structlayers.bench.results import Result
from structlayers.bench.timing import TimingPlan
from structlayers.errors import BackendError, ChainError, ConfigError, DataError
from structlayers.problem import Layout

PLAN = TimingPlan(warmup=1, budget_s=0.0, min_samples=2, max_samples=2)
CPU = torch.device("cpu")
MONARCH, PADDED = "(1,12,8,4)(4,8,6,1)", "(1,7,5,3)(3,5,7,1)[:20,:19]"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings that take no time."""
    monkeypatch.setattr(chains, "measure_roofline", lambda device, dtype: Roofline(10.0, 100.0))


def command(out, *more: str) -> None:
    fixed = ["--device", "cpu", "--budget", "0", "--samples", "2", "2", "--out", str(out)]
    chains.main([*fixed, *more])


# ---- cases


def test_the_table_has_every_case_that_is_asked_for():
    cases = chain_cases("table")
    assert len(set(cases)) == len(cases)
    targets = {(case.name, case.n, case.dtype): case.target for case in cases}
    assert targets["4096 -> 4096, 64 blocks", 25_088, "bfloat16"] == 5.0
    assert targets["4096 -> 4096, 64 blocks", 4096, "bfloat16"] == pytest.approx(4.0)
    assert targets["4096 -> 4096, BTT rank 4", 25_088, "bfloat16"] == 2.5
    assert targets["4096 -> 4096, 64 blocks", 25_088, "float32"] == 20.0
    assert targets["8192 -> 8192, 64 blocks", 1, "bfloat16"] == 12.0
    likes = {(case.name, case.n): case.like for case in cases if case.like}
    assert likes["1024 -> 1024, radix-2 butterfly", 25_088] == "1024 -> 1024, 32 blocks"
    assert all((like, n, "bfloat16") in targets for (_, n), like in likes.items())


def test_the_frozen_grid_is_all_shapes_that_exist():
    cases = chain_cases("frozen")
    shapes = {(case.chain.in_features, case.chain.out_features, case.label) for case in cases}
    assert len(cases) == 4 * len(shapes)
    for d_in in WIDTHS:
        for d_out in WIDTHS:
            # A middle of fewer features per block than blocks leaves parts of the weight zero.
            allowed = [k for k in BLOCKS if min(d_in, d_out) // k >= k]
            assert {label for i, o, label in shapes if (i, o) == (d_in, d_out)} == {f"{k} blocks" for k in allowed}
    assert all(case.chain.in_features in WIDTHS for case in cases)


def test_overrides_keep_the_targets_of_what_they_leave():
    cases = chain_cases("training", batches=[25_088, 64], dtypes=["bfloat16"])
    assert {case.n for case in cases} == {25_088, 64}
    assert {case.dtype for case in cases} == {"bfloat16"}
    assert all((case.target is None) == (case.n == 64) for case in cases if case.label == "64 blocks")
    assert [case.layout for case in chain_cases("", [MONARCH], layouts=["batch_last"])] == ["batch_last"]
    with pytest.raises(ConfigError, match="suite = 'tabel': expected one of"):
        chain_cases("tabel")
    with pytest.raises(ChainError, match="expected"):
        chain_cases("", ["(1,2,3)"])
    assert all(SUITES[name]() for name in SUITES)


# ---- contenders


@pytest.mark.parametrize("layout", ["batch_first", "batch_last"])
@pytest.mark.parametrize("spec", [MONARCH, PADDED, "(2,3,5,7)"])
def test_every_contender_agrees_with_the_oracle(spec, layout):
    case = ChainCase(Chain.parse(spec), spec, 5, "float32", layout)
    names = [name for name in chain_calls.CONTENDERS if name != chain_calls.EINSUM_COMPILED]
    results = time_chain(case, names, ChainConditions(CPU, PLAN))
    assert [(r.contender, r.status, r.reason) for r in results] == [(name, "timed", "") for name in names]
    assert all(0 < r.error < 1e-5 and r.p50_ms > 0 and r.weight_bytes > 0 for r in results)


@pytest.mark.parametrize("name", ["dense", "bmm", "einsum", "unfused", "planned", "frozen", "dense factor"])
def test_a_copy_has_weights_of_its_own(name):
    chain = Chain.parse(MONARCH)
    weights = [torch.randn(shape) for shape in chain.weight_shapes]
    x = torch.randn(3, chain.in_features)
    made = chain_calls.build(name, chain, weights, Layout.BATCH_FIRST, 3)
    twin, before = made.copy(), made.call(x)
    torch.testing.assert_close(twin.call(x), before)
    for weight in weights:
        weight.zero_()
    assert torch.equal(twin.call(x), before)


def test_rows_say_which_plan_ran():
    case = ChainCase(Chain.parse(MONARCH), "", 70, "float32")
    dense, planned, frozen = time_chain(case, ["dense", "planned", "frozen"], ChainConditions(CPU, PLAN))
    assert dense.plan is None
    assert planned.plan and frozen.plan and planned.resolved in planned.plan
    assert frozen.weight_bytes >= planned.weight_bytes


def test_einsum_as_a_user_writes_it_compiles_and_pads():
    chain = Chain.parse(PADDED)
    weights = [torch.randn(shape) for shape in chain.weight_shapes]
    x = torch.randn(4, 19)
    expected = chain_calls.oracle(chain, weights, x)
    first = chain_calls.einsum_chain(x, weights, True, 19, 20)
    last = chain_calls.einsum_chain(x.T.contiguous(), weights, False, 19, 20)
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.T.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_disagrees_or_fails_is_not_timed_and_stops_nothing(monkeypatch):
    bmm = BACKENDS["bmm"]
    monkeypatch.setitem(BACKENDS, "bmm", replace(bmm, multiply=lambda x, w, layout: bmm.multiply(x, w, layout) * 1.02))
    right = chain_calls.build

    def build(name, *rest):
        if name == "einsum":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines")
        return right(name, *rest)

    monkeypatch.setattr(chains, "build", build)
    # A batch of which no product was prepared before the backend was spoilt.
    case = ChainCase(Chain.parse(MONARCH), "", 11, "float32")
    results = time_chain(case, ["dense", "bmm", "einsum", "unknown"], ChainConditions(CPU, PLAN))
    assert [r.status for r in results] == ["timed", "disagrees", "failed", "failed"]
    assert [r.p50_ms is None for r in results] == [False, True, True, True]
    assert "relative error" in results[1].reason
    assert results[2].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert "expected one of" in results[3].reason


def test_small_batches_use_copies_of_the_weights_in_turn():
    conditions = ChainConditions(CPU, PLAN)
    case = ChainCase(Chain.parse(MONARCH), "", 64, "float32")
    assert [r.copies for r in time_chain(case, ["dense"], conditions)] == [2]
    assert [r.copies for r in time_chain(replace(case, n=65), ["dense"], conditions)] == [None]
    assert conditions.how(64) != conditions.how(65)
    assert {ChainConditions(CPU, PLAN, "eager").how(n) for n in (1, 25_088)} == {conditions.how(65)}


# ---- the command


def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "folder" / "chains.jsonl"
    arguments = ["--chains", MONARCH, PADDED, "--batches", "3", "70", "--dtypes", "float32", "bfloat16"]
    arguments += ["--contenders", "dense", "planned"]
    command(out, *arguments, "--minutes", "0")
    assert len(read_rows(out)) == 1
    assert "run again to go on" in capsys.readouterr().out
    first = out.read_text()
    # A killed run leaves half a line.
    out.write_text(first + first[: len(first) // 2])
    command(out, *arguments, "--minutes", "9")
    rows = read_rows(out)
    assert out.read_text().startswith(first)
    assert len({row.key for row in rows}) == len(rows) == 8
    whole = out.read_text()
    command(out, *arguments)
    command(out, "--summary")
    assert out.read_text() == whole
    command(out, *arguments, "--contenders", "bmm")
    assert [row.results[0].contender for row in read_rows(out)[8:]] == ["bmm"] * 8
    row = rows[0]
    assert row.machine["torch"] == torch.__version__
    assert row.floor_ms == pytest.approx(row_floor(row), rel=1e-3)
    assert row.ratio("planned") == pytest.approx(row.p50_ms("dense") / row.p50_ms("planned"))


def row_floor(row):
    chain = Chain.parse(row.spec)
    return max(chain.bytes(row.n, 4, fused=True) / 10e6, chain.flops(row.n) / 100e6)


def test_energy_that_cannot_be_read_is_said_and_not_made_up(tmp_path):
    out = tmp_path / "chains.jsonl"
    command(out, "--chains", MONARCH, "--batches", "3", "--contenders", "dense", "--energy")
    [row] = read_rows(out)
    assert row.results[0].energy_reason == "NVML reads NVIDIA GPUs; this device is cpu"
    assert row.results[0].energy_j is None and row.idle_power_w is None
    # Asked for and answered: nothing is left to be done.
    command(out, "--chains", MONARCH, "--batches", "3", "--contenders", "dense", "--energy")
    assert len(read_rows(out)) == 1


def test_arguments_that_name_nothing_known(tmp_path):
    out = tmp_path / "chains.jsonl"
    for arguments, message in (
        (["--chains", "(1,2,3)"], "expected"),
        (["--chains", MONARCH, "--device", "tpu"], "device = 'tpu'"),
        (["--chains", MONARCH, "--device", "xpu"], "device = 'xpu': expected cpu, cuda"),
        (["--chains", MONARCH, "--samples", "5", "2"], "expected warmup"),
    ):
        with pytest.raises(SystemExit, match=message):
            command(out, *arguments)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees no CUDA device"):
            command(out, "--chains", MONARCH, "--device", "cuda")
    assert not out.exists()


def test_a_lost_cuda_context_ends_the_run_after_its_row(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(chains, "build", fail)
    out = tmp_path / "chains.jsonl"
    with pytest.raises(SystemExit, match="took the CUDA context"):
        command(out, "--chains", MONARCH, "--batches", "3", "4", "--contenders", "dense")
    assert len(read_rows(out)) == 1


def test_a_picture_over_width_and_batch(tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "chains.jsonl", tmp_path / "chains.png"
    specs = ["(1,8,8,2)(2,8,8,1)", "(1,8,8,4)(4,8,8,1)"]
    command(out, "--chains", *specs, "--batches", "2", "70", "--contenders", "dense", "planned", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Without a name, beside the rows.
    plot.unlink()
    chains.main(["--summary", "--out", str(out), "--plot"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="nothing to plot"):
        chains.main(["--summary", "--out", str(tmp_path / "none.jsonl"), "--plot", str(plot)])


# ---- what rows amount to


def row(case="a", dense=2.0, own=1.0, n=8, suite="", **more):
    results = [Result("dense", "timed", p50_ms=dense), Result("planned", "timed", p50_ms=own)]
    base = CaseRow(
        "chain", case, "(1,2,2,1)", 2, 2, n, "bfloat16", "batch_first", "eager", results, 0.5, suite, "planned"
    )
    return replace(base, **more)


def test_verdicts_on_targets():
    rows = [row(target=2.0), row("b", own=1.01, target=2.0), row("c", like="a", own=1.04), row("d", like="a", own=1.06)]
    assert [verdict(r, rows).split()[0] for r in rows] == ["met", "missed", "met", "missed"]
    # No other N stands in for the case that is named.
    assert verdict(row("e", like="a", n=9), rows) == ""
    failed = row("f", target=2.0)
    failed.results[1] = Result("planned", "failed", "no kernels")
    assert verdict(failed, [failed]) == ""
    text = table([*rows, failed])
    assert "1.06 of a" in text and "50%" in text
    assert "planned failed in 1 case(s), f, N = 8, bfloat16: no kernels" in text


def test_frozen_layers_that_are_slower_are_named():
    def frozen(case, dense, own):
        return row(case, dense, own, suite="frozen")

    # 0.5 us are allowed where 5 % are less.
    rows = [frozen("a", 1.0, 1.04), frozen("b", 1.0, 1.06), frozen("c", 0.004, 0.0044), frozen("d", 0.004, 0.0046)]
    text = never_slower(rows)
    assert text.startswith("frozen against dense: 2 of 4 cases slower")
    assert [line.split(",")[0].strip() for line in text.splitlines()[1:]] == ["d", "b"]
    assert never_slower([]) == "frozen against dense: no case was timed"


def test_rows_come_back_and_broken_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = row(machine={"torch": "2"}, state={"sm_clock_mhz": 1.0}, time="now")
    append_row(path, first)
    assert read_rows(path) == [first]
    path.write_text(path.read_text() + '{"kind": "soup"}\n[]\nno json\n')
    with pytest.raises(DataError, match="line 2: not a row of the chain or training benchmark"):
        read_rows(path)
    broken = []
    assert read_rows(path, broken) == [first]
    assert [message.split(":")[0].split()[-1] for message in broken] == ["2", "3", "4"]


def test_backends_that_are_asked_for_by_name_raise():
    with pytest.raises((BackendError, ConfigError)):
        chain_calls.build("cublas", Chain.parse(MONARCH), [], Layout.BATCH_FIRST, 1)
