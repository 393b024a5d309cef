"""Parameter groups: the multipliers of each rule, weight decay of products, and every parameter once."""

import pytest
import torch
from torch import nn

from structlayers import Chain, KSLinear
from structlayers.errors import ConfigError
from structlayers.optim import param_groups


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.pos_embed = nn.Parameter(torch.zeros(1, 7, 64))
        self.norm = nn.LayerNorm(64)
        self.dense = nn.Linear(64, 96)
        self.transposed = Conv1D(32, 64)
        self.conv = nn.Conv2d(8, 6, 3, groups=2)
        self.monarch = KSLinear(Chain.monarch(64, 96, blocks=4))
        self.butterfly = KSLinear(Chain.butterfly(64), bias=False)
        self.low_rank = KSLinear(Chain.low_rank(64, 96, 4))
        self.mixing = nn.Parameter(torch.zeros(5, 40))
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight


def by_name(model: nn.Module, groups) -> dict[str, tuple[float, float]]:
    """Parameter name to (lr, weight_decay)."""
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


def rates(rule: str, **options) -> dict[str, float]:
    model = Net()
    return {name: lr for name, (lr, _) in by_name(model, param_groups(model, 1.0, rule, **options)).items()}


VECTORS = ("embed.weight", "pos_embed", "norm.weight", "norm.bias", "dense.bias", "conv.bias", "monarch.bias")


def test_structure_rule():
    found = rates("structure")
    for name in (*VECTORS, "dense.weight", "transposed.weight", "conv.weight", "mixing"):
        assert found[name] == 1.0, name
    # Monarch 64 -> 96 with 4 blocks: c = 16 in both factors. d_in / (c L) = 64 / (16 * 2).
    assert found["monarch.factors.0"] == found["monarch.factors.1"] == 2.0
    assert [found[f"butterfly.factors.{q}"] for q in range(6)] == [64 / (2 * 6)] * 6
    # The left factor reads rank 4, the right one all 64 features.
    assert (found["low_rank.factors.0"], found["low_rank.factors.1"]) == (8.0, 0.5)


def test_mup_rule():
    found = rates("mup", base_width=32)
    assert all(found[name] == 1.0 for name in VECTORS)
    assert found["dense.weight"] == found["transposed.weight"] == 0.5
    assert found["conv.weight"] == 32 / (4 * 9)
    assert found["mixing"] == 32 / 40
    assert found["monarch.factors.0"] == 32 / (16 * 2)
    assert (found["low_rank.factors.0"], found["low_rank.factors.1"]) == (4.0, 0.25)
    named = rates("mup", base_width=32, input_layers=["dense", "mon*"])
    assert named["dense.weight"] == 1.0 and named["transposed.weight"] == 0.5
    assert named["monarch.factors.0"] == 2.0 and named["low_rank.factors.0"] == 4.0


def test_mup_at_the_base_width_is_structure():
    """A model of base width learns alike under both rules, so that a rate found there carries over."""
    model = nn.Sequential(nn.Linear(64, 64), KSLinear(Chain.monarch(64, 64)), KSLinear(Chain.butterfly(64)))
    assert by_name(model, param_groups(model, 0.1, "mup", base_width=64)) == by_name(
        model, param_groups(model, 0.1, "structure")
    )


def test_none_rule_is_one_rate():
    assert set(rates("none").values()) == {1.0}


@pytest.mark.parametrize(("rule", "options"), [("none", {}), ("structure", {}), ("mup", {"base_width": 32})])
def test_every_trainable_parameter_once_in_few_named_groups(rule, options):
    model = Net()
    model.dense.weight.requires_grad_(False)
    groups = param_groups(model, 1e-3, rule, weight_decay=0.1, **options)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names) == len({(g["lr"], g["weight_decay"]) for g in groups})
    torch.optim.AdamW(groups)


def test_parametrized_factors_are_factors():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, weight):
            return self.scale * weight

    model = nn.Sequential(KSLinear(Chain.low_rank(64, 96, 4), bias=False))
    nn.utils.parametrizations.weight_norm(model[0].factors, "0")
    nn.utils.parametrize.register_parametrization(model[0].factors, "1", Scaled())
    found = by_name(model, param_groups(model, 1.0, weight_decay=0.1))
    originals = "0.factors.parametrizations"
    assert {name: lr for name, (lr, _) in found.items()} == {
        f"{originals}.0.original0": 8.0,
        f"{originals}.0.original1": 8.0,
        f"{originals}.1.original": 0.5,
        f"{originals}.1.0.scale": 1.0,
    }
    assert [decay for _, decay in found.values()].count(0) == 1


def test_group_names_say_what_is_in_them():
    model = nn.Sequential(nn.Linear(64, 64), KSLinear(Chain.monarch(64, 64)), KSLinear(Chain.monarch(64, 64)))
    names = [group["name"] for group in param_groups(model, 1e-3, weight_decay=0.1)]
    assert names == ["dense lr*1 wd*1", "vector lr*1", "factor lr*2 wd*0.25"]


@pytest.mark.parametrize(("rule", "options"), [("none", {}), ("structure", {}), ("mup", {"base_width": 16})])
def test_the_product_decays_as_the_dense_weight_does(rule, options):
    """AdamW steps with zero gradients: products and dense weights shrink by 1 - lr * weight_decay a step."""
    torch.manual_seed(0)
    chains = [Chain.monarch(64, 64), Chain.butterfly(64), Chain.low_rank(64, 64, 4)]
    model = nn.Sequential(nn.Linear(64, 64), *(KSLinear(chain) for chain in chains)).double()
    weights = [model[0].weight.detach().clone(), *(layer.to_dense().detach() for layer in model[1:])]
    bias = model[0].bias.detach().clone()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, rule, weight_decay=0.1, **options))
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    shrunk = (1 - 1e-3 * 0.1) ** 10
    for before, after in zip(weights, [model[0].weight, *(layer.to_dense() for layer in model[1:])], strict=True):
        # 1 - x against (1 - x/L)^L, with x = 1e-4 a step: equal to x^2.
        torch.testing.assert_close(after.detach(), shrunk * before, rtol=1e-7, atol=0)
    assert torch.equal(model[0].bias, bias)


def test_what_does_not_decay():
    model = Net()
    found = by_name(model, param_groups(model, 1.0, weight_decay=0.1, no_decay=["mix*", "monarch.*"]))
    decays = {name for name, (_, decay) in found.items() if decay}
    assert decays == {
        "dense.weight",
        "transposed.weight",
        "conv.weight",
        "low_rank.factors.0",
        "low_rank.factors.1",
    } | {f"butterfly.factors.{q}" for q in range(6)}


def test_a_lone_pattern_is_no_list_of_letters():
    def decays(no_decay):
        return {
            name
            for name, (_, decay) in by_name(model, param_groups(model, 1.0, weight_decay=0.1, **no_decay)).items()
            if decay
        }

    model = Net()
    assert decays({"no_decay": "dense.*"}) == decays({"no_decay": ["dense.*"]}) != decays({"no_decay": None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "muP"}, "rule = 'muP': expected one of none, structure, mup"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": "1e-3"}, "lr = '1e-3': expected a positive number"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"weight_decay": "0.1"}, "weight_decay = '0.1': expected a number of at least 0"),
        ({"rule": "mup"}, "base_width = None with rule 'mup'"),
        ({"rule": "mup", "base_width": 0}, "base_width = 0"),
        ({"base_width": 64}, "base_width = 64 with rule 'structure'"),
        ({"rule": "mup", "base_width": "8"}, "base_width = '8': expected an integer"),
        ({"no_decay": [5]}, "no_decay = [5]: expected a pattern or a list of patterns"),
        ({"no_decay": ["*.wieght"]}, "no_decay pattern '*.wieght' matches nothing"),
        ({"rule": "mup", "base_width": 8, "input_layers": ["stem"]}, "input_layers pattern 'stem' matches nothing"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError) as error:
        param_groups(Net(), **{"lr": 1e-3, **arguments})
    assert message in str(error.value)


def test_nothing_to_train():
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        param_groups(Net().requires_grad_(False), 1e-3)
