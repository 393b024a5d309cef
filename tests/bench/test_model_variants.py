"""A model with an epilogue, with its dense weights as one factor, with free linears; and what a sweep makes of them."""

import pytest
import torch
from torch import nn

from structlayers import Chain, KSLinear, swap_linears
from structlayers.bench import models as bench
from structlayers.bench import parts
from structlayers.bench.model_variants import (
    as_one_factor,
    dense_with_epilogue,
    has_epilogue,
    structured_layers,
    with_free_linears,
)
from structlayers.bench.models import Graphed, ModelSweep, layer_tolerance, random_input, time_model
from structlayers.bench.timing import TimingPlan
from structlayers.errors import ConfigError

PLAN = TimingPlan(warmup=1, budget_s=0.0, min_samples=2, max_samples=2)
ARGS = {"input_shape": (3, 16)}


def block() -> nn.Module:
    torch.manual_seed(0)
    model = parts.block((3, 16), heads=2)
    swap_linears(model, [{"structure": "monarch", "options": {"blocks": 2}}])
    return model.eval().requires_grad_(False)


def test_dense_with_the_epilogue_computes_the_same():
    model, x = block(), random_input(ARGS, 4)
    dense = dense_with_epilogue(model)
    # Its GELU is the tanh approximation on a GPU and exact on a CPU.
    torch.testing.assert_close(dense(x), model(x), rtol=1e-2, atol=2e-3)
    assert not structured_layers(dense)
    assert isinstance(dense[0].feed_forward.activation, nn.Identity)
    assert isinstance(model[0].feed_forward.activation, nn.GELU)
    assert has_epilogue(model) and not has_epilogue(dense)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.Tanh(), "none"),
    ],
)
def test_an_activation_that_follows_in_a_sequence(module, name):
    model, x = nn.Sequential(nn.Linear(16, 16), module, nn.Linear(16, 2)), torch.randn(5, 16)
    swap_linears(model, [{"structure": "monarch", "options": {"blocks": 4}, "include": ["0"]}])
    assert has_epilogue(model) == (name != "none")
    dense = dense_with_epilogue(model)
    loose = {"rtol": 1e-2, "atol": 2e-3} if name.startswith("gelu") else {}
    torch.testing.assert_close(dense(x), model(x), **loose)
    assert not structured_layers(dense)
    # cuBLAS has no SiLU.
    assert isinstance(dense[1], nn.Identity) == (name not in ("none", "silu"))


def test_dense_weights_as_one_factor():
    model, x = block(), random_input(ARGS, 4)
    one = as_one_factor(model, "einsum")
    torch.testing.assert_close(one(x), model(x))
    layers = structured_layers(one)
    assert {len(layer.chain) for layer in layers.values()} == {1}
    assert layers["0.feed_forward.up"].chain.spec == "(1,64,16,1)"


@pytest.mark.parametrize(("d_in", "d_out"), [(16, 24), (24, 16), (16, 16)])
def test_free_linears_keep_the_sizes_and_do_nothing(d_in, d_out):
    model = nn.Sequential(KSLinear(Chain.monarch(d_in, d_out, 2)))
    x = torch.randn(2, 3, d_in)
    y = with_free_linears(model)(x)
    assert y.shape == (2, 3, d_out)
    # A view: no memory of its own.
    assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def rows_of(**changes):
    sweep = ModelSweep(**({"batch_sizes": (2,), "roofline": False, "plan": PLAN} | changes))
    return [r for rows in time_model(block(), "block", "monarch", lambda n: random_input(ARGS, n), sweep) for r in rows]


def test_rows_of_all_variants():
    rows = rows_of(dtypes=("float32", "bfloat16"), epilogue=True, one_factor=True, free=True, energy=True)
    assert [(row.variant, row.dtype, row.status, row.reason) for row in rows] == [
        (variant, dtype, "timed", "")
        for dtype, own in (("float32", ["dense as one factor, auto"]), ("bfloat16", []))
        for variant in ["dense", "dense, epilogue", *own, "monarch, auto", "linears free"]
    ]
    assert {row.energy_reason for row in rows} == {"NVML reads NVIDIA GPUs; this device is cpu"}
    assert rows[-1].structure == "free" and rows[-1].speedup is None
    assert rows[0].flops == rows[1].flops == rows[2].flops > rows[3].flops


def test_a_frozen_model_beside_the_other():
    rows = rows_of(frozen=(False, True), batch_sizes=(2, 40))
    assert [(row.variant, row.batch, row.status, row.reason) for row in rows] == [
        (variant, batch, "timed", "")
        for batch in (2, 40)
        for variant in ("dense", "monarch, auto", "monarch, auto, frozen")
    ]
    # What is derived counts as weights, not as parameters.
    assert rows[1].parameters == rows[2].parameters < rows[0].parameters
    assert rows[2].weight_bytes >= rows[1].weight_bytes


def test_a_model_without_parameters_of_its_own_has_free_linears_too():
    layer = nn.Sequential(KSLinear(Chain.monarch(16, 16, 2)), nn.ReLU())
    sweep = ModelSweep(batch_sizes=(2,), roofline=False, free=True, plan=PLAN)
    [rows] = time_model(layer, "layer", "monarch", lambda n: random_input(ARGS, n), sweep)
    assert [row.status for row in rows] == ["timed"] * 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), KSLinear(Chain.monarch(16, 16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.gelu(self.linear(self.norm(x)))


def test_a_deep_model_rounds_between_its_free_linears():
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(60))).eval().requires_grad_(False)
    sweep = ModelSweep(batch_sizes=(64,), dtypes=("bfloat16",), roofline=False, free=True, plan=PLAN)
    [rows] = time_model(model, "deep", "monarch", lambda n: random_input(ARGS, n), sweep)
    assert [(row.variant, row.reason) for row in rows] == [
        ("dense", ""),
        ("monarch, auto", ""),
        ("linears free", ""),
    ]
    # More than one layer alone may be off.
    assert rows[-1].error > layer_tolerance(with_free_linears(model.bfloat16()), torch.bfloat16)


def test_an_input_that_does_not_fit_leaves_rows_and_the_next_is_timed():
    def make_input(batch):
        if batch == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return random_input(ARGS, batch)

    sweep = ModelSweep(batch_sizes=(3, 2), roofline=False, free=True, plan=PLAN)
    first, second = time_model(block(), "block", "monarch", make_input, sweep)
    assert [(row.batch, row.status) for row in first] == [(3, "failed")] * 2
    assert "out of memory" in first[0].reason
    assert [row.status for row in second] == ["timed"] * 3


def test_what_is_done_is_not_timed_again():
    sweep = ModelSweep(batch_sizes=(2, 3), dtypes=("float32", "bfloat16"), roofline=False, plan=PLAN)
    done = {("float32", 2), ("bfloat16", 2), ("bfloat16", 3)}
    found = time_model(
        block(), "b", "monarch", lambda n: random_input(ARGS, n), sweep, done=lambda dtype, n: (dtype, n) in done
    )
    assert [(row.dtype, row.batch) for rows in found for row in rows] == [("float32", 3)] * 2


def test_graphs_need_a_gpu():
    rows = rows_of(compiled=("graphed",))
    assert {row.status for row in rows} == {"failed"}
    assert "captures CUDA graphs; the input is on cpu" in rows[0].reason
    with pytest.raises(ConfigError, match="graphed"):
        Graphed(lambda x: x)(torch.randn(2))
    with pytest.raises(ConfigError, match="frozen"):
        ModelSweep(frozen=())


def test_parts_say_what_they_take():
    assert parts.layer((16,), 24, "relu")(torch.randn(2, 16)).shape == (2, 24)
    assert parts.feed_forward((3, 16), 32)(torch.randn(2, 3, 16)).shape == (2, 3, 16)
    assert parts.block((3, 16), 2, causal=True, rotary=True)(torch.randn(2, 3, 16)).shape == (2, 3, 16)
    with pytest.raises(ConfigError, match="activation = 'tanh'"):
        parts.layer((16,), 24, "tanh")
    with pytest.raises(ConfigError, match=r"expected \(tokens, dim\)"):
        parts.block((16,), 2)
    assert bench.GRAPHED in bench.COMPILE_MODES
