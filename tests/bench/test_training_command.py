"""The training benchmark on a CPU: gradients are checked, rows come out, wrong gradients are not timed."""

import pytest
import torch

from structlayers import Chain
from structlayers.bench import chain_training, training
from structlayers.bench.case_rows import CHAIN_TRAINING, TRAINING_STEP, read_rows
from structlayers.bench.chain_cases import ChainCase
from structlayers.bench.chain_training import oracle_gradients, time_training
from structlayers.bench.machine import Roofline
from structlayers.bench.timing import TimingPlan
from structlayers.bench.training_step import StepCase, check, make_step, time_step
from structlayers.errors import ConfigError
from structlayers.ops import ks_chain

PLAN = TimingPlan(warmup=1, budget_s=0.0, min_samples=2, max_samples=2)
CPU = torch.device("cpu")
MONARCH, PADDED = "(1,12,8,4)(4,8,6,1)", "(1,7,5,3)(3,5,7,1)[:20,:19]"
TINY = ["--dim", "16", "--depth", "2", "--heads", "2", "--feed-forward", "32", "--vocabulary", "11"]
TINY += ["--context", "6", "--batch", "2", "--blocks", "2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(training, "measure_roofline", lambda device, dtype: Roofline(10.0, 100.0))


def command(out, *more: str) -> None:
    fixed = ["--device", "cpu", "--budget", "0", "--samples", "2", "2", "--out", str(out)]
    training.main([*fixed, *more])


@pytest.mark.parametrize("spec", [MONARCH, PADDED, "(2,3,5,7)"])
def test_the_oracles_gradients_are_those_of_autograd(spec):
    chain = Chain.parse(spec)
    torch.manual_seed(0)
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in chain.weight_shapes]
    x = torch.randn(7, chain.in_features, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, chain.out_features, dtype=torch.float64)
    sizes = {"in_features": chain.in_features, "out_features": chain.out_features}
    y = ks_chain(x, weights, backend="einsum", **sizes)
    dx, *dweights = torch.autograd.grad(y, [x, *weights], dy)
    found = oracle_gradients(chain, [w.detach() for w in weights], x.detach(), dy)
    torch.testing.assert_close(found.y, y.detach())
    torch.testing.assert_close(found.dx, dx)
    for own, expected in zip(found.dweights, dweights, strict=True):
        torch.testing.assert_close(own, expected)
    torch.testing.assert_close(found.ddense, dy.T @ x.detach())


@pytest.mark.parametrize("layout", ["batch_first", "batch_last"])
@pytest.mark.parametrize("spec", [MONARCH, PADDED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_has_right_gradients(spec, layout, dtype):
    case = ChainCase(Chain.parse(spec), spec, 33, dtype, layout)
    names = [name for name in chain_training.CONTENDERS if name != chain_training.EINSUM_COMPILED]
    results = time_training(case, names, CPU, PLAN)
    assert [(r.contender, r.status, r.reason) for r in results] == [(name, "timed", "") for name in names]
    assert all(r.p50_ms > 0 and r.wall_ms > 0 and r.peak_memory_bytes > 0 and r.error > 0 for r in results)


@pytest.mark.parametrize("which", ["output", "input gradient", "gradient of factor 1", "gradient of factor 2"])
def test_a_wrong_gradient_is_named_and_not_timed(monkeypatch, which):
    place = ["output", "input gradient", "gradient of factor 1", "gradient of factor 2"].index(which)
    right = chain_training._step

    def step(*arguments):
        made = right(*arguments)

        def run():
            found = list(made.run())
            found[place] = found[place] * 1.01
            return tuple(found)

        return chain_training.Step(run, made.weight_bytes, made.resolved)

    monkeypatch.setattr(chain_training, "_step", step)
    [result] = time_training(ChainCase(Chain.parse(MONARCH), "", 33, "float32"), ["structured"], CPU, PLAN)
    assert (result.status, result.p50_ms) == ("disagrees", None)
    assert result.reason.startswith(f"{which}: relative error")


def test_the_command_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "training.jsonl"
    arguments = ["--chains", MONARCH, PADDED, "--batches", "9", "--dtypes", "float32"]
    arguments += ["--contenders", "dense", "bmm", "structured"]
    command(out, *arguments, "--minutes", "0")
    assert len(read_rows(out)) == 1
    command(out, *arguments)
    command(out, *arguments)
    rows = read_rows(out)
    assert [(row.kind, row.n) for row in rows] == [(CHAIN_TRAINING, 9)] * 2
    assert rows[0].floor_ms > 0
    text = capsys.readouterr().out
    assert "x structured" in text and "structured wall us" in text and "structured peak MB" in text


def test_a_whole_step(tmp_path, capsys):
    out = tmp_path / "training.jsonl"
    command(out, "--step", *TINY, "--eager")
    command(out, "--step", *TINY, "--eager")
    [row] = read_rows(out)
    assert (row.kind, row.n, row.dtype, row.target) == (TRAINING_STEP, 12, "bf16", None)
    assert [(r.contender, r.status, r.reason) for r in row.results] == [
        (name, "timed", "") for name in ("dense", "structured", "recomputed")
    ]
    dense, structured, _ = row.results
    assert structured.weight_bytes < dense.weight_bytes
    assert structured.peak_memory_bytes > 3 * structured.weight_bytes
    assert "2 layers, d_model 16" in row.spec
    assert "x structured" in capsys.readouterr().out


def test_a_step_trains():
    case = StepCase(16, 1, 2, 32, 11, 6, 4, 2, "bf16", compiled=False)
    model, tokens = case.model(True), torch.randint(11, (4, 7))
    step = make_step(case, model, tokens)
    losses = [float(step().detach()) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert case.model(True).state_dict().keys() != case.model(False).state_dict().keys()


def test_a_wrong_model_is_not_timed(monkeypatch):
    case = StepCase(16, 1, 2, 32, 11, 6, 2, 2, "float32", compiled=False)
    model = case.model(True)
    assert check(case, model, torch.randint(11, (1, 6)))[1] == ""
    # The hook is copied into the oracle's model too, so that only the layer alone can tell.
    model.blocks[0].feed_forward.up.register_forward_hook(lambda layer, inputs, out: out * 1.01)
    assert check(case, model, torch.randint(11, (1, 6)))[1].startswith("layer blocks.0.feed_forward.up")
    monkeypatch.setattr(StepCase, "model", lambda self, structured, recompute: model)
    [result] = time_step(case, ["structured"], CPU, PLAN)
    assert (result.status, result.p50_ms) == ("disagrees", None)


def test_sizes_that_do_not_exist_are_rows_that_say_so(tmp_path):
    out = tmp_path / "training.jsonl"
    command(out, "--step", *TINY, "--eager", "--heads", "3")
    [row] = read_rows(out)
    assert {r.status for r in row.results} == {"failed"}
    assert "heads" in row.results[0].reason
    with pytest.raises(ConfigError, match="precision = 'int8'"):
        StepCase(precision="int8")
