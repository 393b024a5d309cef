"""Mixed precision: autocast, float32 master weights, loss scaling, and activation checkpointing beneath them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from structlayers import Chain, KSLinear
from structlayers.bench.verify import agreement
from structlayers.models import GPT
from structlayers.surgery import swap_linears
from structlayers.tolerances import tolerance

HALF = [torch.float16, torch.bfloat16]


def network(recompute: bool = False, activation: str = "gelu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        KSLinear(Chain.monarch(12, 32, blocks=4, rank=1), activation=activation, recompute=recompute),
        nn.LayerNorm(32),
        KSLinear(Chain.butterfly(32), recompute=recompute),
        nn.Linear(32, 3),
    )


def batch(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 12, generator=generator), torch.randint(3, (n,), generator=generator)


# ---- autocast


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_layer_computes_in_the_type_of_autocast_and_its_gradients_are_float32(dtype, recompute):
    torch.manual_seed(0)
    chain = Chain.monarch(24, 30, blocks=3, rank=2)
    layer = KSLinear(chain, activation="silu", recompute=recompute)
    exact = KSLinear(chain, activation="silu").double()
    exact.load_state_dict(layer.state_dict())
    x, dy = torch.randn(7, 5, 24), torch.randn(7, 5, 30)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert torch.get_autocast_dtype("cpu") == dtype
    assert y.dtype == dtype
    y.backward(dy.to(dtype))
    exact(x.double()).backward(dy.double())
    # Inputs, weights and dy are rounded before they are multiplied.
    bound = tolerance(dtype, 35, n_factors=10)
    for (name, found), truth in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert found.dtype == found.grad.dtype == torch.float32, name
        assert agreement(found.grad, truth.grad, bound).agrees, name


@pytest.mark.parametrize("recompute", [False, True])
def test_regions_of_autocast(recompute):
    layer, x = KSLinear("(1,3,2,4)(4,2,3,1)", recompute=recompute), torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert layer(x).dtype == torch.float16
        # What came out of a layer before goes into the next one as it is.
        assert layer(layer(x)).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        assert layer(x).dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_backward_outside_of_autocast_is_as_inside():
    gradients = []
    for inside in (False, True):
        model, (x, y) = network(), batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(outside, inside) for outside, inside in zip(*gradients, strict=True))


# ---- loss scaling


def scaled_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, x, y) -> float:
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return float(loss.detach())


@pytest.mark.parametrize("recompute", [False, True])
def test_an_overflow_skips_the_step_and_halves_the_scale(recompute):
    model, (x, y) = network(recompute), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # The gradient of the loss times this is beyond float16, whose largest number is 65,504.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaled_step(model, optimizer, scaler, x, y)
    assert any(not torch.isfinite(layer.grad).all() for layer in model[0].factors)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**23
    while scaler.get_scale() > 2.0**12:
        scaled_step(model, optimizer, scaler, x, y)
        scaler.update(min(scaler.get_scale(), 2.0**12))
    losses = [scaled_step(model, optimizer, scaler, x, y) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.dtype == torch.float32
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)


def test_scaled_gradients_are_those_of_the_loss():
    plain, scaled = network(), network()
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.float16):
        F.cross_entropy(plain(x), y).backward()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(F.cross_entropy(scaled(x), y)).backward()
    optimizer = torch.optim.SGD(scaled.parameters(), lr=1.0)
    scaler.unscale_(optimizer)
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 0.01 * one.grad.norm(), name


# ---- activation checkpointing


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients(use_reentrant, dtype, recompute):
    x, y = batch()
    gradients = []
    for checkpointed in (False, True):
        model = network(recompute)
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            z = checkpoint(model, own, use_reentrant=use_reentrant) if checkpointed else model(own)
        F.cross_entropy(z.float(), y).backward()
        gradients.append([own.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, found in zip(*gradients, strict=True):
        assert torch.equal(plain, found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_keeps_less(use_reentrant):
    """Of the blocks of a GPT only their inputs."""

    def kept(checkpointed: bool) -> int:
        torch.manual_seed(0)
        model = GPT(256, 16, dim=32, depth=2, heads=2)
        swap_linears(model, {"structure": "monarch", "options": {"blocks": 4}, "include": ["blocks.*"]})
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        elements = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                elements[tensor.data_ptr()] = max(elements.get(tensor.data_ptr(), 0), tensor.numel())
            return tensor

        x = model.embed(torch.zeros(2, 16, dtype=torch.long))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
        x.sum().backward()
        assert all(parameter.grad is not None for parameter in model.blocks.parameters())
        return sum(elements.values())

    assert kept(True) < 0.2 * kept(False)
