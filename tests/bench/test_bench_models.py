from dataclasses import replace

import pytest
import torch
from torch import nn

from structlayers import Chain, KSLinear
from structlayers.backends import BACKENDS
from structlayers.bench import models as bench
from structlayers.bench.timing import TimingPlan
from structlayers.errors import BackendError, ConfigError
from structlayers.problem import ACTIVATIONS

PLAN = TimingPlan(warmup=1, budget_s=0.0, min_samples=2, max_samples=2)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        KSLinear(Chain.monarch(24, 36, blocks=2), activation="gelu"),
        nn.LayerNorm(36),
        KSLinear(Chain.low_rank(36, 36, rank=9), bias=False),
        nn.ReLU(),
        nn.Linear(36, 5),
    )


def make_input(batch: int) -> torch.Tensor:
    return bench.random_input({"input_shape": (3, 24)}, batch)


def sweep(**changes) -> bench.ModelSweep:
    return bench.ModelSweep(**({"batch_sizes": (4,), "roofline": False, "plan": PLAN} | changes))


def rows_of(model: nn.Module, **changes):
    groups = list(bench.time_model(model, "model", "monarch", make_input, sweep(**changes), {"accuracy": 0.5}))
    return [row for group in groups for row in group]


def test_the_dense_twin_computes_the_same_and_is_dense(model):
    twin = bench.dense_twin(model)
    x = make_input(4)
    torch.testing.assert_close(twin(x), model(x))
    assert not bench.structured_layers(twin)
    assert len(bench.structured_layers(model)) == 2
    assert sum(p.numel() for p in twin.parameters()) == 24 * 36 + 36 + 2 * 36 + 36 * 36 + 36 * 5 + 5


@pytest.mark.parametrize("layout", ["batch_first", "batch_last"])
@pytest.mark.parametrize("backend", ["einsum", "bmm"])
def test_variants_compute_the_same_and_leave_the_model_alone(model, backend, layout):
    x = make_input(4)
    variant = bench.with_backend(model, backend, layout)
    torch.testing.assert_close(variant(x), model(x))
    assert {layer.backend for layer in bench.structured_layers(variant).values()} == {backend}
    assert {layer.layout for layer in bench.structured_layers(variant).values()} == {layout}
    assert {layer.backend for layer in bench.structured_layers(model).values()} == {"auto"}
    assert bench.resolved_backends(variant, x) == backend


def test_a_layer_with_two_names_stays_one():
    layer = KSLinear(Chain.monarch(16, 16, blocks=2))
    twin = bench.dense_twin(nn.Sequential(layer, nn.ReLU(), layer))
    assert isinstance(twin[0], nn.Linear)
    assert twin[0] is twin[2]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_dense_twin_has_the_activation(activation):
    layer = KSLinear(Chain.monarch(16, 16, blocks=2), activation=activation)
    x = torch.randn(3, 16)
    torch.testing.assert_close(bench.dense_twin(nn.Sequential(layer))(x), layer(x))


def test_a_model_that_is_one_layer():
    layer = KSLinear(Chain.monarch(16, 16, blocks=2))
    x = torch.randn(3, 16)
    torch.testing.assert_close(bench.dense_twin(layer)(x), layer(x))
    assert bench.check_layers(bench.with_backend(layer, "bmm", "batch_last"), x) == ""


def test_rows_of_a_sweep(model):
    rows = rows_of(
        model,
        batch_sizes=(1, 9),
        dtypes=("float32", "bfloat16"),
        backends=("auto", "einsum"),
        layouts=("batch_first", "batch_last"),
    )
    assert [row.status for row in rows] == ["timed"] * (2 * 2 * (1 + 2 * 2)), [row.reason for row in rows]
    assert {row.variant for row in rows} == {
        "dense",
        "monarch, auto",
        "monarch, auto, batch_last",
        "monarch, einsum",
        "monarch, einsum, batch_last",
    }
    first = rows[0]
    assert (first.variant, first.batch, first.dtype, first.baseline) == ("dense", 1, "float32", "dense")
    assert all(row.error <= row.tolerance and row.metrics == {"accuracy": 0.5} for row in rows)
    structured, dense = rows[1], rows[0]
    assert structured.flops < dense.flops and structured.parameters < dense.parameters
    # Five layers' worth of rounding, in 8 bits and in 24.
    assert rows[0].tolerance < 1e-4 < rows[-1].tolerance < 0.1


def test_a_backend_that_is_wrong_by_two_percent_is_not_timed(model, monkeypatch):
    einsum = BACKENDS["einsum"]
    wrong = replace(einsum, multiply=lambda x, w, layout: einsum.multiply(x, w, layout) * 1.02)
    monkeypatch.setitem(BACKENDS, "einsum", wrong)
    # A batch of which no product was prepared before; the next test has another, for what this one spoils.
    rows = rows_of(model, dtypes=("float32", "bfloat16"), backends=("einsum", "bmm"), batch_sizes=(6,))
    assert [row.status for row in rows] == ["timed", "disagrees", "timed"] * 2
    assert all(row.p50_ms is None for row in rows if row.status == "disagrees")


def test_a_wrong_layer_that_the_output_hides_is_named(model):
    # The hook is copied into the oracle's model too, so that only the layer alone can tell.
    model[0].register_forward_hook(lambda layer, inputs, out: out * 1.5)
    assert bench.check_layers(model, make_input(4)).startswith("layer 0 ((")
    row = rows_of(model)[1]
    assert row.error < row.tolerance
    assert row.status == "disagrees" and row.reason.startswith("layer 0 ((")


def test_a_backend_that_cannot_is_a_row_with_the_reason(model, monkeypatch):
    unable = replace(BACKENDS["einsum"], reason_against=lambda problem: "not on Sundays")
    monkeypatch.setitem(BACKENDS, "einsum", unable)
    rows = rows_of(model, backends=("einsum", "bmm"), batch_sizes=(7,))
    assert [row.status for row in rows] == ["timed", "failed", "timed"]
    assert "not on Sundays" in rows[1].reason


def test_a_dense_model_is_timed_alone():
    rows = rows_of(nn.Sequential(nn.Linear(24, 8)), backends=("auto", "bmm"))
    assert [(row.variant, row.status) for row in rows] == [("dense", "timed")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_sizes": (0,)}, "batch size = 0"),
        ({"batch_sizes": ("4",)}, "batch size = '4'"),
        ({"dtypes": ("float8",)}, "'float8'"),
        ({"dtypes": ()}, "dtypes"),
        ({"layouts": ("last",)}, "'last'"),
        ({"compiled": ("fast",)}, "'fast'"),
        ({"backends": ("bmm", "bmm")}, "twice"),
        ({"oracle_rows": 0}, "oracle_rows = 0"),
        ({"frozen": ("no",)}, "freeze = 'no'"),
        ({"epilogue": "no"}, "epilogue = 'no'"),
        ({"energy_window_s": "abc"}, "energy_window_s = 'abc'"),
    ],
)
def test_unknown_values_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        sweep(**changes)


def test_an_unknown_backend_is_named():
    with pytest.raises(BackendError, match="'tpu'"):
        sweep(backends=("tpu",))


def test_random_input_is_random_and_repeatable():
    tokens = bench.random_input({"vocab_size": 50, "context_length": 7}, 3)
    assert tokens.shape == (3, 7) and tokens.min() >= 0 and 0 < tokens.max() < 50
    images = bench.random_input({"input_shape": [1, 4, 4], "num_classes": 2}, 3)
    assert images.shape == (3, 1, 4, 4)
    assert images.std() > 0.5
    assert torch.equal(images, bench.random_input({"input_shape": [1, 4, 4]}, 3))


@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 50}, {"input_shape": 3}])
def test_model_args_without_sizes_are_named(sizes):
    with pytest.raises(ConfigError, match="expected input_shape"):
        bench.random_input(sizes, 3)


@pytest.mark.slow
def test_compiled_variants_have_a_baseline_of_their_own(model):
    rows = rows_of(model, compiled=("no", "default"))
    assert [(row.variant, row.baseline, row.compiled, row.status) for row in rows] == [
        ("dense", "dense", "no", "timed"),
        ("monarch, auto", "dense", "no", "timed"),
        ("dense, compiled", "dense, compiled", "default", "timed"),
        ("monarch, auto, compiled", "dense, compiled", "default", "timed"),
    ], [row.reason for row in rows]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_cuda(model):
    rows = rows_of(model, device="cuda", dtypes=("float32", "float16", "bfloat16"), compiled=("no", "default"))
    assert [row.status for row in rows] == ["timed"] * len(rows), [row.reason for row in rows]
    assert all(row.machine["gpu"] for row in rows)
