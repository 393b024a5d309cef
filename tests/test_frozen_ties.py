"""Frozen layers that share factors: one in the state dict, and one again when they are unfrozen."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

import structlayers
from structlayers import Chain, KSLinear, freeze, unfreeze


def tied() -> nn.ModuleList:
    torch.manual_seed(0)
    first, second, alone = (KSLinear(Chain.monarch(16, 24, blocks=2)) for _ in range(3))
    second.factors = first.factors
    alone.factors[1] = first.factors[1]
    return nn.ModuleList([first, second, alone])


def check_ties(model: nn.ModuleList) -> None:
    first, second, alone = unfreeze(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tied().named_parameters()]
    assert [a is b for a, b in zip(first.factors, second.factors, strict=True)] == [True, True]
    assert [a is b for a, b in zip(first.factors, alone.factors, strict=True)] == [False, True]


def test_tied_factors_are_tied_again(tmp_path):
    model, x = tied(), torch.randn(3, 16)
    expected = [layer(x) for layer in model]
    freeze(model, batches=[1])
    state = model.state_dict()
    assert state["0.factors.0"] is state["1.factors.0"]
    assert state["0.factors.0"] is not state["2.factors.0"]
    path = structlayers.save(model, tmp_path / "tied.safetensors")
    others = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), structlayers.load(path, tied()))
    for other in (model, *others):
        torch.testing.assert_close([layer(x) for layer in other], expected)
        check_ties(other)


def test_layers_frozen_twice_and_one_by_one():
    model = tied()
    freeze(model)
    freeze(model)
    check_ties(model)
    # Parameters that somebody holds were the same ones before.
    held = list(model.parameters())
    for layer in model:
        layer.freeze()
    check_ties(model)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
