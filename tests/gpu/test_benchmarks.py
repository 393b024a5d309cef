"""What the benchmarks do on a GPU only: captured graphs, weights in turn, training steps, the energy counter."""

import pytest
import torch

from structlayers import Chain, KSLinear
from structlayers.bench import chain_training
from structlayers.bench.chain_cases import ChainCase
from structlayers.bench.chains import ChainConditions, time_chain
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.models import Graphed, ModelSweep, random_input, time_model
from structlayers.bench.nvml import device_state
from structlayers.bench.results import Result
from structlayers.bench.timing import EAGER, GRAPH, TimingPlan, in_turn
from structlayers.bench.training_step import CONTENDERS, StepCase, time_step
from structlayers.surgery import swap_linears

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLAN = TimingPlan(warmup=1, budget_s=0.0, min_samples=2, max_samples=2)
DEVICE = torch.device("cuda")
MONARCH = Chain.monarch(256, 256, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("n", [1, 64, 300])
def test_every_way_to_compute_a_chain_is_timed(n, dtype):
    names = ["dense", "bmm", "einsum", "unfused", "planned", "frozen", "dense factor"]
    results = time_chain(ChainCase(MONARCH, "", n, dtype), names, ChainConditions(DEVICE, PLAN))
    assert [(r.contender, r.status, r.reason) for r in results] == [(name, "timed", "") for name in names]
    assert all((r.copies or 0) >= 2 for r in results) == (n <= 64)
    assert results[4].plan and results[5].plan


def test_large_batches_are_replayed_too_and_eager_calls_on_demand():
    for timing, expected in (("graph", GRAPH), ("eager", EAGER)):
        conditions = ChainConditions(DEVICE, PLAN, timing)
        results = time_chain(ChainCase(MONARCH, "", 1024, "bfloat16"), ["dense", "frozen"], conditions)
        assert conditions.how(1024) == expected
        assert [(r.status, r.reason, r.copies) for r in results] == [("timed", "", None)] * 2


def test_a_graph_makes_every_call_again():
    total = torch.zeros((), device=DEVICE)
    run = in_turn([lambda q=q: total.add_(q) for q in (1, 2, 3)], DEVICE)
    assert total.item() == 6
    run()
    run()
    assert total.item() == 18


def test_a_call_that_cannot_be_captured_fails_and_the_next_works():
    with pytest.raises(RuntimeError):
        in_turn([lambda: torch.ones(1, device=DEVICE).item()], DEVICE)
    torch.cuda.synchronize()
    in_turn([lambda: torch.ones(1, device=DEVICE)], DEVICE)()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_steps_are_captured(dtype):
    names = [name for name in chain_training.CONTENDERS if name != chain_training.EINSUM_COMPILED]
    results = chain_training.time_training(ChainCase(MONARCH, "", 300, dtype), names, DEVICE, PLAN)
    assert [(r.contender, r.status, r.reason) for r in results] == [(name, "timed", "") for name in names]
    assert all(r.wall_ms > 0 and r.peak_memory_bytes > 0 for r in results)


def test_a_whole_step():
    case = StepCase(64, 2, 4, 128, 100, 32, 2, 4, "bf16", compiled=False)
    results = time_step(case, list(CONTENDERS), DEVICE, PLAN)
    assert [(r.status, r.reason) for r in results] == [("timed", "")] * 3
    assert results[1].weight_bytes < results[1].peak_memory_bytes


def test_a_captured_call_has_the_outputs_of_its_input():
    layer = torch.nn.Linear(8, 8, device=DEVICE).requires_grad_(False)
    graphed = Graphed(layer)
    x, other = torch.randn(4, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    torch.testing.assert_close(graphed(x), layer(x))
    x.mul_(2)
    torch.testing.assert_close(graphed(x), layer(x))
    torch.testing.assert_close(graphed(other), layer(other))


def test_a_model_compiled_and_graphed():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    swap_linears(model, [{"structure": "monarch", "options": {"blocks": 4}}])
    sweep = ModelSweep(
        batch_sizes=(4,), compiled=("no", "graphed"), device="cuda", epilogue=True, free=True, roofline=False, plan=PLAN
    )
    [rows] = time_model(model, "m", "monarch", lambda n: random_input({"input_shape": (64,)}, n), sweep)
    # cuBLAS's GELU is the tanh approximation, which float32 tells from the exact one.
    others = [row for row in rows if "epilogue" not in row.variant]
    assert [(row.status, row.reason) for row in others] == [("timed", "")] * 6


def test_energy_is_measured_or_the_reason_said():
    column = EnergyColumn(DEVICE, window_s=0.3)
    layer = KSLinear(MONARCH, device=DEVICE).requires_grad_(False)
    x = torch.randn(4096, 256, device=DEVICE)
    result = Result("planned", "timed", p50_ms=0.05)
    column.fill(result, lambda: layer(x), 4096)
    if column.meter is None:
        assert column.reason and result.energy_reason == column.reason and result.energy_j is None
    else:
        assert 0 < column.idle_power_w < result.power_w * 1.5
        assert result.energy_j > 0 and result.energy_per_sample_j == pytest.approx(result.energy_j / 4096)
    assert device_state(DEVICE).get("power_w", 1.0) > 0
