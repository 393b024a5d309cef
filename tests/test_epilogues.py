"""A structured layer and the activation behind it as one op."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import structlayers
from structlayers import Chain, KSLinear, StructuredMLP, SwapRule, swap_linears
from structlayers.epilogues import FusedSequential, epilogue_of, fuse_sequentials, linear_activation
from structlayers.errors import ConfigError, ShapeError
from structlayers.models import GPT
from structlayers.models.transformer import FeedForward

UP, DOWN = Chain.monarch(16, 24, blocks=2), Chain.monarch(24, 16, blocks=2)
MODULES = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}
ATEN = {"relu", "silu", "gelu", "threshold", "clamp_min"}


class Seen(TorchDispatchMode):
    """Our operators with their activations, and activations that are operations of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "structlayers":
            self.names.append(next(a for a in args if a in (*MODULES, "none")))
        elif function._schema.name.removeprefix("aten::").rstrip("_") in ATEN:
            self.names.append(f"aten {function._schema.name}")
        return function(*args, **(kwargs or {}))


def activations_of(model: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.no_grad(), Seen() as seen:
        model(x)
    return seen.names


def check_same(model: nn.Module, twin: nn.Module, x: torch.Tensor) -> None:
    """Values and gradients, eager and compiled."""
    torch._dynamo.reset()
    for run in (model, torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")):
        y, expected = run(x), twin(x)
        torch.testing.assert_close(y, expected)
        parameters, twins = list(model.parameters()), list(twin.parameters())
        got = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        want = torch.autograd.grad(expected.square().sum(), twins, allow_unused=True)
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


class Plain(nn.Module):
    """A feed-forward that knows nothing of epilogues."""

    def __init__(self, up: nn.Module, activation: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = up, activation, down

    def forward(self, x):
        x = self.c_fc(x)
        x = self.act(x)
        return self.c_proj(x)


class Nested(Plain):
    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Gated(Plain):
    def forward(self, x):
        return self.c_proj(self.act(x[..., :24]) * self.c_fc(x))


def model_of(kind: type[nn.Module] = Plain, activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), kind(nn.Linear(16, 24), activation or nn.GELU(), nn.Linear(24, 16)))


RULE = SwapRule("monarch", {"blocks": 2})


# ---- modules and their names


def test_modules_that_are_epilogues():
    for name, module in MODULES.items():
        assert epilogue_of(module) == name
        assert epilogue_of(type("Other", (type(module),), {})()) is None
    assert epilogue_of(nn.Tanh()) is None
    watched = nn.GELU()
    handle = watched.register_forward_hook(lambda *arguments: None)
    assert epilogue_of(watched) is None
    handle.remove()
    assert epilogue_of(watched) == "gelu"


@pytest.mark.parametrize("name", MODULES)
def test_linear_and_activation(name):
    linear, x = KSLinear(UP), torch.randn(3, 16)
    expected = MODULES[name](linear(x))
    with Seen() as seen, torch.no_grad():
        torch.testing.assert_close(linear_activation(linear, MODULES[name], x), expected)
    assert seen.names == [name]


def test_two_calls_where_one_would_change_what_is_seen():
    x = torch.randn(3, 16)
    linear = KSLinear(UP)
    outputs = []
    linear.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    y = linear_activation(linear, nn.ReLU(), x)
    assert bool((outputs[0] < 0).any())
    torch.testing.assert_close(y, outputs[0].relu())
    own = KSLinear(UP, activation="silu")
    torch.testing.assert_close(linear_activation(own, nn.ReLU(), x), own(x).relu())
    dense = nn.Linear(16, 24)
    torch.testing.assert_close(linear_activation(dense, nn.ReLU(), x), dense(x).relu())
    torch.testing.assert_close(linear_activation(KSLinear(UP), nn.Tanh(), x).abs().max() <= 1, torch.tensor(True))


# ---- the project's own modules


def test_structured_mlp():
    mlp, x = StructuredMLP(UP, DOWN.spec, "gelu_tanh", bias=False, dtype=torch.float64), torch.randn(3, 16).double()
    expected = mlp.down(F.gelu(x @ mlp.up.to_dense().T, approximate="tanh"))
    torch.testing.assert_close(mlp(x), expected)
    assert activations_of(mlp, x) == ["gelu_tanh", "none"]
    assert set(mlp.state_dict()) == {f"{part}.factors.{q}" for part in ("up", "down") for q in (0, 1)}
    with pytest.raises(ShapeError, match=r"writes 24 features but down = .* reads 16: expected as many"):
        StructuredMLP(UP, UP)


def test_feed_forward():
    torch.manual_seed(0)
    model = FeedForward(16, 24)
    names = list(model.state_dict())
    x = torch.randn(3, 16)
    assert activations_of(model, x) == ["aten aten::gelu"]
    holder = nn.ModuleDict({"mlp": model})
    swap_linears(holder, RULE)
    assert activations_of(model, x) == ["gelu", "none"]
    assert [name for name in model.state_dict() if "bias" in name] == [name for name in names if "bias" in name]
    twin = copy.deepcopy(model)
    twin.forward = lambda x: twin.down(F.gelu(twin.up(x)))
    check_same(model, twin, x)
    structlayers.freeze(holder)
    assert activations_of(model, x) == ["gelu", "none"]
    torch.testing.assert_close(model(x), twin(x))


def test_gpt_after_swapping():
    torch.manual_seed(0)
    model = GPT(11, 8, dim=16, depth=2, heads=2)
    swap_linears(model, SwapRule("monarch", {"blocks": 2}, include="*.feed_forward.*"))
    tokens = torch.randint(11, (2, 8))
    assert activations_of(model, tokens) == ["gelu", "none"] * 2


# ---- nn.Sequential


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 24),
        nn.GELU(),
        nn.Linear(24, 24),
        nn.Linear(24, 16),
        nn.SiLU(),
    ]
    return nn.Sequential(nn.Sequential(*layers), nn.Tanh())


def test_sequential():
    model = sequential()
    inner = model[0]
    x = torch.randn(3, 16)
    swap_linears(model, SwapRule("monarch", {"blocks": 4}))
    assert model[0] is inner
    assert type(inner) is FusedSequential
    assert type(model) is nn.Sequential
    assert activations_of(model, x) == ["relu", "gelu", "none", "silu"]
    twin = nn.Sequential(*copy.deepcopy(inner), nn.Tanh())
    check_same(model, twin, x)
    assert type(twin) is nn.Sequential
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(inner[:1](x), inner[0](x), msg="a slice is what it holds")


def test_sequential_to_a_file_and_back(tmp_path):
    model = sequential()
    swap_linears(model, SwapRule("monarch", {"blocks": 4}))
    x = torch.randn(3, 16)
    path = structlayers.save(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(structlayers.load(path, sequential())(x), model(x))
    expected = model(x)
    torch.testing.assert_close(structlayers.densify(model)(x), expected)


def test_only_plain_sequentials_change():
    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + x

    own = Own(KSLinear(DOWN.T), nn.ReLU())
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), KSLinear(DOWN), nn.Tanh())
    fuse_sequentials(nn.ModuleList([own, plain]))
    assert (type(own), type(plain)) == (Own, nn.Sequential)


# ---- elsewhere, where it is said


@pytest.mark.parametrize("kind", [Plain, Nested])
@pytest.mark.parametrize("name", MODULES)
def test_an_activation_that_is_named(kind, name):
    model = model_of(kind, copy.deepcopy(MODULES[name]))
    twin = copy.deepcopy(model)
    x = torch.randn(3, 16)
    swap_linears(twin, RULE)
    assert activations_of(twin, x)[0] == "none"
    swap_linears(model, RULE, activations={"1.c_fc": "act"})
    model.load_state_dict(twin.state_dict())
    assert activations_of(model, x) == [name, "none"]
    assert list(model.state_dict()) == list(twin.state_dict())
    check_same(model, twin, x)


def test_an_absorbed_activation_comes_back_when_it_must(tmp_path):
    model = model_of()
    x = torch.randn(3, 16)
    swap_linears(model, RULE, activations={"*.c_fc": "act"})
    expected = model(x)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(other(x), expected)
        assert activations_of(other, x) == ["gelu", "none"]
    path = structlayers.save(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(structlayers.load(path, model_of())(x), expected)
    outputs = []
    handle = model[1].c_fc.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(F.gelu(outputs[0]), model[1].act.activation(outputs[0]))
    assert activations_of(model, x) == ["none", "aten aten::gelu", "none"]
    handle.remove()
    torch.testing.assert_close(structlayers.densify(model)(x), expected)


class Added(nn.Module):
    """What an adapter does: the layer that it wraps, plus something."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1


@pytest.mark.parametrize("part", ["c_fc", "act"])
@pytest.mark.parametrize("wrap", [Added, lambda module: torch.compile(module, backend="eager"), nn.Sequential])
def test_an_absorbed_activation_comes_back_where_something_is_put_between(part, wrap):
    plain, model = model_of(), model_of()
    x = torch.randn(3, 16)
    swap_linears(plain, RULE)
    swap_linears(model, RULE, activations={"*.c_fc": "act"})
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x))
    for each in (plain, model):
        setattr(each[1], part, wrap(getattr(each[1], part)))
    torch.testing.assert_close(model(x), plain(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("act", [nn.Tanh, nn.Identity, nn.GELU])
def test_an_absorbed_activation_may_be_replaced(act):
    plain, model = model_of(), model_of()
    x = torch.randn(3, 16)
    swap_linears(plain, RULE)
    swap_linears(model, RULE, activations={"*.c_fc": "act"})
    model.load_state_dict(plain.state_dict())
    plain[1].act, model[1].act = act(), act()
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    ("make", "activations", "message"),
    [
        (model_of, {"*.fc1": "act"}, r"activations pattern '\*.fc1' matches no layer"),
        (model_of, {"*.c_fc": "activation"}, "activation 'activation' beside '1.c_fc' is nothing"),
        (lambda: model_of(activation=nn.Tanh()), {"*.c_fc": "act"}, "is a Tanh: expected GELU, ReLU or SiLU"),
        (model_of, {"*.c_proj": "act"}, "the forward of Plain does not plainly apply act to the output of c_proj"),
        (lambda: model_of(Gated), {"*.c_fc": "act"}, "the forward of Gated does not plainly apply act"),
    ],
)
def test_what_is_not_safe_is_refused(make, activations, message):
    model = make()
    before = repr(model)
    with pytest.raises(ConfigError, match=message):
        swap_linears(model, RULE, activations=activations)
    assert repr(model) == before


@pytest.mark.slow
def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    rule = SwapRule("monarch", {"blocks": 2}, include="*.mlp.*")
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    swap_linears(twin, rule)
    torch.manual_seed(1)
    swap_linears(model, rule, activations={"*.mlp.c_fc": "act"})
    tokens = torch.randint(11, (2, 8))
    with torch.no_grad(), Seen() as seen:
        y = model(tokens).logits
    assert seen.names == ["gelu_tanh", "none"] * 2
    torch.testing.assert_close(y, twin(tokens).logits)
