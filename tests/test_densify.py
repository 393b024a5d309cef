"""A structured model back to a dense one: the same function, and what is kept of every layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from structlayers import Chain, KSLinear, densify, load, save, swap_linears
from structlayers.errors import ConfigError
from structlayers.formats import PermutedLinear, from_btt
from structlayers.models import GPT, MLP
from structlayers.problem import ACTIVATIONS
from structlayers.surgery import BatchLastLinear
from structlayers.tolerances import model_tolerance, tolerance

MONARCH = {"structure": "monarch", "options": {"blocks": 4}}


def structured(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, KSLinear | PermutedLinear)]


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).detach().norm() / expected.detach().norm())


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    tokens = torch.randint(0, 50, (3, 12))
    return {
        "mlp": (MLP((1, 7, 9), 10, width=40, depth=3), torch.randn(5, 1, 7, 9)),
        "gpt": (GPT(50, 12, dim=32, depth=2, heads=4), tokens),
        "gpt_tied": (GPT(50, 12, dim=32, depth=2, heads=4, positions="learned", tie_weights=True), tokens),
    }


@pytest.mark.parametrize("rule", [MONARCH, {"structure": "btt", "max_kept": 9.0}, {"structure": "butterfly"}])
@pytest.mark.parametrize("name", models())
def test_a_dense_model_computes_the_same(name, rule):
    torch.manual_seed(0)
    model, x = models()[name]
    keys = {key: value.shape for key, value in model.state_dict().items()}
    report = swap_linears(model, {**rule, "exclude": "head"}, init="random")
    assert len(report.swapped) >= 3 and len(structured(model)) == len(report.swapped)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype).eval()
        inputs = x.to(dtype) if x.is_floating_point() else x
        expected = model(inputs)
        dense = copy.deepcopy(model)
        assert densify(dense) is dense
        assert not structured(dense)
        assert {key: value.shape for key, value in dense.state_dict().items()} == keys
        most = model_tolerance(tolerance(dtype, 64, 7), len(report.swapped))
        assert relative_error(dense(inputs), expected) <= most
    for layer in report.swapped:
        linear = dense.get_submodule(layer.name)
        assert type(linear) is nn.Linear
        torch.testing.assert_close(linear.weight, model.get_submodule(layer.name).to_dense())


def test_there_and_back_again():
    """A projection, a dense model, and the same projection: the second one loses nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 36), nn.GELU(), nn.Linear(36, 24)).double()
    swap_linears(model, MONARCH, init="project")
    x = torch.randn(4, 24, dtype=torch.float64)
    expected = model(x)
    swap_linears(densify(model), MONARCH, init="project")
    assert len(structured(model)) == 2
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("layout", ["batch_first", "batch_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_layout_are_part_of_the_function(activation, layout):
    torch.manual_seed(0)
    layer = KSLinear(Chain.monarch(10, 14, blocks=3, rank=1), activation=activation, layout=layout, dtype=torch.float64)
    x = torch.randn(5, 3, 10, dtype=torch.float64)
    x = x if layout == "batch_first" else x.movedim(-1, 0)
    dense = densify(nn.Sequential(layer))
    torch.testing.assert_close(dense(x), layer(x))
    assert dense(x).shape == layer(x).shape
    assert len(dense.state_dict()) == 2
    linears = [module for module in dense.modules() if isinstance(module, nn.Linear)]
    assert [type(linear) for linear in linears] == [nn.Linear if layout == "batch_first" else BatchLastLinear]
    assert isinstance(dense[0], nn.Linear) == (activation == "none")


def test_a_permuted_layer_becomes_one_linear():
    torch.manual_seed(0)
    matrix = from_btt(torch.randn(3, 5, 4), torch.randn(2, 6, 7), torch.randperm(15))
    for layout in ("batch_first", "batch_last"):
        layer = matrix.layer(torch.randn(14), activation="relu", layout=layout)
        for factor in layer.linear.factors:
            factor.requires_grad_(False)
        x = torch.randn(15, 15)
        with torch.no_grad():
            dense = densify(layer)
        torch.testing.assert_close(dense(x), layer(x))
        assert isinstance(dense, nn.Sequential) and [type(part).__name__ for part in dense[1:]] == ["ReLU"]
        assert (dense[0].weight.requires_grad, dense[0].bias.requires_grad) == (False, True)
    # A layer that is also in use without its permutation.
    model = nn.ModuleDict({"permuted": layer, "plain": layer.linear})
    model = densify(copy.deepcopy(model))
    assert not structured(model)
    torch.testing.assert_close(model["plain"](x), layer.linear(x))
    torch.testing.assert_close(model["permuted"](x), layer(x))


def test_the_model_itself():
    layer = KSLinear("(1,6,4,2)(2,4,3,1)", bias=False).eval()
    dense = densify(layer)
    assert type(dense) is nn.Linear and dense.bias is None and not dense.training
    assert torch.equal(dense.weight, layer.to_dense())
    linear = nn.Linear(3, 4)
    assert densify(linear) is linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_mode_bias_and_requires_grad(dtype):
    model = nn.ModuleList(KSLinear("(1,6,4,2)(2,4,3,1)", dtype=dtype) for _ in range(3))
    model[0].eval()
    for factor in model[0].factors:
        factor.requires_grad_(False)
    model[1].factors[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    biases = [layer.bias for layer in model]
    products = [layer.to_dense() for layer in model]
    densify(model)
    assert all(linear.bias is bias for linear, bias in zip(model, biases, strict=True))
    assert all(torch.equal(linear.weight, product) for linear, product in zip(model, products, strict=True))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [linear.training for linear in model] == [False, True, True]
    assert [linear.weight.requires_grad for linear in model] == [False, True, True]
    assert [linear.bias.requires_grad for linear in model] == [True, False, True]
    assert all(linear.weight.is_contiguous() and linear.weight.is_leaf for linear in model)


def test_shared_layers_stay_shared():
    layer, twin, other = (KSLinear("(1,6,4,2)(2,4,3,1)") for _ in range(3))
    # The twin has the same weights and another bias; the third shares one of its two factors.
    twin.factors = layer.factors
    other.factors[0] = layer.factors[0]
    block = nn.Sequential(layer)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block, nn.ReLU()), "c": layer, "twin": twin, "other": other})
    expected = {"twin": twin.to_dense(), "other": other.to_dense()}
    densify(model)
    assert model["c"] is model["a"][0] is model["b"][0][0]
    assert model["twin"].weight is model["c"].weight and model["twin"].bias is not model["c"].bias
    assert model["other"].weight is not model["c"].weight
    assert all(torch.equal(model[name].weight, weight) for name, weight in expected.items())
    assert len(list(model.parameters())) == 5


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(KSLinear("(1,6,4,2)(2,4,3,1)"), nn.ReLU())
    densify(model)
    assert model[0].weight.is_meta and model[0].weight.shape == (12, 6) and type(model[0]) is nn.Linear


def test_transformer_encoder_layers():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)
    swap_linears(model, MONARCH)
    x = torch.randn(2, 5, 32)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            torch.testing.assert_close(densify(copy.deepcopy(model))(x), model(x))


def test_a_converted_model_saved_loaded_and_made_dense(tmp_path):
    torch.manual_seed(0)
    model, x = models()["gpt"]
    swap_linears(model, MONARCH, init="project")
    loaded = load(save(model, tmp_path / "model.safetensors"), models()["gpt"][0])
    assert torch.equal(loaded(x), model(x))
    assert relative_error(densify(loaded)(x), model(x)) <= model_tolerance(tolerance(torch.float32, 32, 2), 12)
    plain = models()["gpt"][0]
    plain.load_state_dict(loaded.state_dict())
    assert torch.equal(plain(x), loaded(x))


def test_what_would_be_lost_is_refused_and_nothing_changes():
    class Special(KSLinear):
        pass

    def hooked() -> KSLinear:
        layer = KSLinear("(1,6,4,1)")
        layer.register_forward_pre_hook(lambda *_: None)
        return layer

    def patched() -> KSLinear:
        layer = KSLinear("(1,6,4,1)")
        layer.forward = layer.forward
        return layer

    def parametrized() -> KSLinear:
        layer = KSLinear("(1,6,4,1)")
        nn.utils.parametrize.register_parametrization(layer.factors, "0", nn.Identity())
        return layer

    def hooked_inside() -> PermutedLinear:
        return PermutedLinear(hooked(), None, torch.tensor([1, 0, 2, 3, 4, 5]))

    for make, reason in (
        (lambda: Special("(1,6,4,1)"), "'last.0' is a Special with behaviour of its own"),
        (hooked, "'last.0' has hooks"),
        (patched, "'last.0' is a KSLinear with behaviour of its own"),
        (parametrized, "'last.0' has parametrized factors"),
        (hooked_inside, "'last.0' has hooks"),
    ):
        model = nn.ModuleDict({"first": KSLinear("(1,6,4,1)"), "last": nn.ModuleList([make()])})
        modules = dict(model.named_modules())
        with pytest.raises(ConfigError, match=reason):
            densify(model)
        assert dict(model.named_modules()) == modules
