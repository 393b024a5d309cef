"""Frozen layers: what they derive and hold, and that derived weights are never stale."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import structlayers
from structlayers import Chain, KSLinear, freeze, ks_chain, unfreeze
from structlayers.errors import ConfigError, ShapeError
from structlayers.tolerances import tolerance

CHAIN = Chain.butterfly(16, out_features=14)
# Every plan that a chain may have on a CPU: few rows for the dense weight, more for the factors.
BATCHES = (1, 7, 3000)


def layer_of(chain: Chain = CHAIN, **options) -> KSLinear:
    torch.manual_seed(0)
    return KSLinear(chain, **{"dtype": torch.float64, **options})


def frozen_layer(**options) -> KSLinear:
    layer = layer_of(**options)
    layer.freeze(batches=[1])
    assert layer.factors.report.derived_bytes > 0
    return layer


def state_output(layer: KSLinear, x: torch.Tensor) -> torch.Tensor:
    """What the layer must compute: the product with the factors of its state dict."""
    state = layer.state_dict()
    weights = [state[f"factors.{q}"] for q in range(len(layer.chain))]
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    return ks_chain(x, weights, state["bias"], backend="reference", **sizes)


def check_not_stale(layer: KSLinear) -> None:
    dtype = layer.bias.dtype
    for n in BATCHES:
        x = torch.randn(n, layer.in_features).to(dtype)
        expected = state_output(layer, x).double()
        error = (layer(x).double() - expected).norm() / expected.norm()
        assert error <= tolerance(dtype, layer.in_features, 2 * len(layer.chain))


# ---- what it computes


@pytest.mark.parametrize("layout", ["batch_first", "batch_last"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize(
    "chain", [CHAIN, Chain.dense(4, 5), Chain.monarch(10, 14, 4, rank=2), Chain.parse("(4,2,2,1)(1,2,2,4)")], ids=str
)
def test_values_and_gradients_are_those_of_the_layer(chain, activation, layout):
    layer = layer_of(chain, activation=activation, layout=layout)
    twin = copy.deepcopy(layer)
    for batches in ([1], [4096], None):
        layer.freeze(batches=batches)
        for n in (0, 1, 5):
            x = torch.randn(2, n, chain.in_features, dtype=torch.float64)
            x = (x if layout == "batch_first" else x.movedim(-1, 0)).requires_grad_()
            torch.testing.assert_close(layer(x), twin(x))
            y, expected = (m(x).square().sum() for m in (layer, twin))
            got = torch.autograd.grad(y, (x, layer.bias), create_graph=True)
            want = torch.autograd.grad(expected, (x, twin.bias), create_graph=True)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(
                torch.autograd.grad(got[0].square().sum(), x), torch.autograd.grad(want[0].square().sum(), x)
            )


def test_opcheck_and_gradcheck():
    layer = frozen_layer(activation="gelu")
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    rest = (16, 14, "batch_first", "gelu", "auto")
    frozen, operator = layer.factors, torch.ops.structlayers.ks_frozen
    torch.library.opcheck(operator, (x, list(frozen.tensors), frozen.lengths, layer.bias, *rest))
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    with pytest.raises(ShapeError, match=r"lengths = \[1, 2\] of"):
        operator(x, list(frozen.tensors), [1, 2], layer.bias, *rest)
    with pytest.raises(ShapeError, match="expected 16 features"):
        layer(x[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    layer = layer_of(Chain.butterfly(64), dtype=dtype)
    layer.freeze(batches=[1, 4096])
    check_not_stale(layer)


def test_a_named_backend_computes_the_factors():
    layer = frozen_layer(backend="csr")
    assert layer.plan(1).backends == ["csr"] * len(CHAIN)
    check_not_stale(layer)


def test_autocast_casts_what_is_held():
    layer = frozen_layer(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 16)).dtype == torch.bfloat16


def test_one_dynamic_graph_takes_the_form_of_every_batch():
    torch._dynamo.reset()
    layer = layer_of(Chain.butterfly(256), dtype=torch.float32).eval()
    assert {form for _, form in layer.freeze().form_of_batch} == {0, 1}
    graphs = []
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    for n in (64, 2, 4096):
        x = torch.randn(n, 256)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    layer.unfreeze()
    with torch.no_grad():
        layer.factors[0].zero_()
    x = torch.randn(5, 256)
    torch.testing.assert_close(compiled(x), layer.bias.expand(5, -1), msg="the graph of the frozen layer is not used")
    torch._dynamo.reset()


def test_export():
    layer = frozen_layer(dtype=torch.float32).eval()
    program = torch.export.export(layer, (torch.randn(3, 16),), dynamic_shapes=({0: torch.export.Dim("n")},))
    x = torch.randn(9, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


# ---- what it holds


def test_only_freeze_derives():
    layer = layer_of().eval()
    with torch.inference_mode():
        layer(torch.randn(3, 16, dtype=torch.float64))
    assert not layer.is_frozen
    assert type(layer.factors) is nn.ParameterList


def test_the_report_states_what_is_held():
    layer = layer_of(Chain.butterfly(64), dtype=torch.float32)
    report = layer.freeze(batches=[1])
    assert report.max_bytes == 64 * 64 * 4
    assert report.derived_bytes == 64 * 64 * 4
    assert report.factor_bytes == layer.chain.n_params * 4
    held = {t.data_ptr(): t.nbytes for t in layer.factors.tensors}
    assert sum(held.values()) == report.derived_bytes + report.factor_bytes
    assert str(report).splitlines()[0].endswith("16,384 bytes derived, at most 16,384, beside 3,072 of the factors")
    assert "factors 1-6 multiplied to (1,64,64,1): batches of 1" in str(report)
    assert str(report) in layer.explain(1)
    assert repr(layer).endswith("frozen)")
    assert layer.freeze(max_bytes=0).derived_bytes == 0
    assert 0 < layer.freeze(max_bytes=9000, batches=[1]).derived_bytes <= 9000
    check_not_stale(layer)


def test_limits_that_are_none():
    layer = layer_of()
    for options, message in (
        ({"max_bytes": -1}, "max_bytes = -1: expected an integer >= 0"),
        ({"max_bytes": 1.5}, "max_bytes = 1.5"),
        ({"batches": []}, r"batches = \[\]: expected integers >= 1"),
        ({"batches": [0]}, r"batches = \[0\]"),
        ({"batches": 5}, "batches = 5: expected integers >= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            layer.freeze(**options)
        assert not layer.is_frozen
    with pytest.raises(ConfigError, match="meta tensor"):
        KSLinear(CHAIN, device="meta").freeze()
    nn.utils.parametrize.register_parametrization(layer.factors, "0", nn.Identity())
    with pytest.raises(ConfigError, match="expected plain parameters"):
        layer.freeze()


def test_the_state_dict_stays_and_the_parameters_go():
    layer = layer_of()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.freeze()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert list(layer.buffers()) == []
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(layer.factors) == len(CHAIN)
    torch.testing.assert_close(layer.to_dense(), layer.unfreeze().to_dense())


def test_unfreeze_gives_the_same_parameters_back():
    layer = layer_of()
    layer.factors[0].requires_grad_(False)
    parameters = list(layer.parameters())
    layer.freeze()
    layer.unfreeze()
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert layer.unfreeze() is layer
    # Held by nobody else, their memory is given back while the layer is frozen.
    expected = [p.detach().clone() for p in parameters]
    del parameters
    layer.freeze()
    gc.collect()
    assert all(reference() is None for reference in layer.factors._former)
    layer.unfreeze()
    assert [p.requires_grad for p in layer.factors] == [False, True, True, True]
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), expected, strict=True))


# ---- derived weights are never stale: every way to the factors


def test_what_is_handed_out_cannot_change_them():
    layer = frozen_layer()
    for tensor in (layer.factors[0], layer.factors[:][1], next(iter(layer.factors))):
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            tensor.zero_()
        with pytest.raises(RuntimeError):
            tensor.requires_grad_()
        tensor.data.zero_()
    layer.state_dict()["factors.0"].zero_()
    layer.state_dict(keep_vars=True)["factors.1"].data.zero_()
    check_not_stale(layer)
    assert layer.is_frozen
    assert float(layer.state_dict()["factors.0"].abs().sum()) > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.detach().zero_(),
        lambda p: p.detach()[0].mul_(2),
        lambda p: p.data.copy_(p.data + 1),
        lambda p: p.detach().view(-1)[:1].add_(1),
        lambda p: setattr(p, "data", torch.zeros_like(p)),
        lambda p: p.detach().numpy().fill(3.0),
    ],
    ids=["zero", "part", "data", "view", "set data", "numpy"],
)
def test_tensors_obtained_before(change):
    layer = layer_of()
    former = layer.factors[1]
    layer.freeze(batches=[1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(former)
        check_not_stale(layer)
        layer.unfreeze()
        assert layer.factors[1] is former
        check_not_stale(layer)


def test_a_change_that_is_seen_unfreezes():
    layer = layer_of()
    former = layer.factors[0]
    layer.freeze()
    with torch.no_grad():
        former.mul_(2)
    with pytest.warns(UserWarning, match="is not frozen any more: its former parameters were changed"):
        layer(torch.randn(2, 16, dtype=torch.float64))
    assert not layer.is_frozen
    assert layer.factors[0] is former


@pytest.mark.parametrize("made", ["before", "after"])
def test_optimizers(made):
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1) if made == "before" else None
    layer(torch.randn(4, 16, dtype=torch.float64)).sum().backward()
    layer.freeze(batches=[1])
    optimizer = optimizer or torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_not_stale(layer)
    # The factors moved with the optimizer that knew them, and not with the one that does not.
    assert layer.is_frozen == (made == "after")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_load_state_dict(assign, strict):
    layer, other = frozen_layer(), layer_of()
    nn.init.normal_(other.factors[0])
    model = nn.Sequential(layer)
    state = {f"0.{name}": value for name, value in other.state_dict().items()}
    with pytest.warns(UserWarning, match="new factors were loaded"):
        model.load_state_dict(state, assign=assign, strict=strict)
    assert not layer.is_frozen
    check_not_stale(layer)
    assert torch.equal(layer.factors[0], other.factors[0])


def test_loading_something_else_leaves_it_frozen():
    layer = frozen_layer()
    layer.load_state_dict({"bias": torch.zeros(14, dtype=torch.float64)}, strict=False)
    assert layer.is_frozen
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "factors.0", "factors.1"'):
        layer.load_state_dict({"bias": torch.zeros(14, dtype=torch.float64)})
    check_not_stale(layer)
    with pytest.raises(RuntimeError, match="no values can be loaded: the factors are frozen; call unfreeze"):
        layer.factors.load_state_dict(layer_of().factors.state_dict())


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.float(),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.apply(lambda module: module.half() if isinstance(module, KSLinear) else None),
        lambda m: m._apply(torch.zero_),
    ],
    ids=["half", "bfloat16", "float", "meta", "empty", "apply", "in place"],
)
def test_changes_of_dtype_and_device_unfreeze(move):
    model = nn.Sequential(frozen_layer())
    with pytest.warns(UserWarning, match="its factors were moved or converted"), torch.no_grad():
        move(model)
    assert not model[0].is_frozen
    assert {p.dtype for p in model.parameters()} == {model[0].bias.dtype}
    assert {p.device for p in model.parameters()} == {model[0].bias.device}


def test_moves_that_change_nothing_leave_it_frozen():
    layer = frozen_layer()
    frozen = layer.factors
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.Sequential(layer).to("cpu").double().cpu().to(torch.float64)
    assert layer.factors is frozen
    with pytest.raises(RuntimeError, match="neither dtype nor device can be changed"):
        layer.factors.half()


def test_functional_call_raises():
    layer = frozen_layer()
    x = torch.randn(2, 16, dtype=torch.float64)
    for name in ("factors.0", "factors.1"):
        with pytest.raises(RuntimeError, match="the factors are frozen"):
            torch.func.functional_call(layer, {name: torch.zeros_like(layer.factors[0])}, (x,))
    y = torch.func.functional_call(layer, {"bias": torch.zeros_like(layer.bias)}, (x,))
    torch.testing.assert_close(y, state_output(layer, x) - layer.bias)
    check_not_stale(layer)


def test_other_ways_to_set_them_raise():
    layer = frozen_layer()
    value = nn.Parameter(torch.zeros(1, 8, 2, 2, dtype=torch.float64))
    for attempt in (
        lambda: setattr(layer.factors, "0", value),
        lambda: layer.factors.__setitem__(0, value),
        lambda: layer.factors.register_parameter("0", value),
        lambda: layer.factors.register_buffer("0", value),
        lambda: nn.utils.parametrize.register_parametrization(layer.factors, "0", nn.Identity()),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            attempt()
    check_not_stale(layer)
    assert layer.is_frozen
    layer.factors = nn.ParameterList(torch.zeros(shape, dtype=torch.float64) for shape in CHAIN.weight_shapes)
    check_not_stale(layer)


def test_training_unfreezes():
    model = nn.Sequential(layer_of(), nn.ReLU()).eval()
    freeze(model)
    model.eval()
    assert model[0].is_frozen
    model.train()
    assert not model[0].is_frozen
    layer = frozen_layer()
    assert not layer.requires_grad_(False).factors[0].requires_grad
    assert layer.is_frozen
    assert all(p.requires_grad for p in layer.requires_grad_().parameters())
    layer.freeze()
    layer.reset_parameters()
    assert not layer.is_frozen


def test_copies_are_frozen_and_their_own():
    layer = frozen_layer()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False))
    with torch.no_grad():
        layer.unfreeze()
        for factor in layer.factors:
            factor.mul_(3)
    for twin in copies:
        assert twin.is_frozen
        check_not_stale(twin)
        assert not torch.equal(twin.state_dict()["factors.0"], layer.state_dict()["factors.0"])
        assert [p.requires_grad for p in twin.unfreeze().factors] == [True] * len(CHAIN)
        check_not_stale(twin)


def test_a_shallow_copy_shares_what_it_is():
    layer = frozen_layer()
    twin = copy.copy(layer)
    layer.unfreeze()
    with torch.no_grad():
        layer.factors[0].zero_()
    check_not_stale(twin)


def test_tied_factors():
    first, second = layer_of(), layer_of()
    second.factors = first.factors
    first.freeze(batches=[1])
    check_not_stale(second)
    with torch.no_grad():
        second.factors[0].mul_(2)
    with pytest.warns(UserWarning, match="former parameters were changed"):
        check_not_stale(first)
    assert torch.equal(first.state_dict()["factors.0"], second.state_dict()["factors.0"])


def test_weights_of_inference_mode():
    with torch.inference_mode():
        layer = frozen_layer()
        check_not_stale(layer)
    with torch.no_grad():
        check_not_stale(layer.unfreeze())


# ---- whole models, files, surgery


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = KSLinear(Chain.butterfly(16))
        self.norm = nn.LayerNorm(16)
        self.two = KSLinear(Chain.monarch(16, 8, blocks=2), activation="gelu")
        self.again = self.two

    def forward(self, x):
        return self.two(self.norm(self.one(x)))


def test_a_model():
    model = Model()
    x = torch.randn(5, 16)
    expected = model(x)
    report = freeze(model)
    assert dict(report.layers).keys() == {"one", "two"}
    assert report.derived_bytes == sum(layer.derived_bytes for _, layer in report.layers)
    assert str(report).startswith("one: (1,2,2,8)")
    assert str(report).splitlines()[-1].startswith("2 layers: ")
    torch.testing.assert_close(model(x), expected)
    assert unfreeze(model) is model
    assert not model.one.is_frozen
    assert len(list(model.parameters())) == len(list(Model().parameters()))
    with pytest.raises(ConfigError, match="Linear has no structured layer"):
        freeze(nn.Linear(2, 2))


def test_a_model_is_frozen_whole_or_not_at_all():
    model = Model()
    model.two.to("meta")
    with pytest.raises(ConfigError, match="meta tensor"):
        freeze(model)
    assert not model.one.is_frozen


def test_save_and_load(tmp_path):
    model = Model()
    x = torch.randn(5, 16)
    expected = model(x)
    freeze(model)
    path = structlayers.save(model, tmp_path / "frozen.safetensors")
    fresh = structlayers.load(path, Model)
    torch.testing.assert_close(fresh(x), expected)
    assert not fresh.one.is_frozen
    half = structlayers.save(Model().bfloat16(), tmp_path / "half.safetensors")
    assert {p.dtype for p in structlayers.load(half, model).parameters()} == {torch.bfloat16}
    assert not model.one.is_frozen


def test_densify_of_frozen_layers():
    model = Model()
    x = torch.randn(5, 16)
    expected = model(x)
    freeze(model)
    torch.testing.assert_close(structlayers.densify(model)(x), expected)
