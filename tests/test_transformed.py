"""Layers under torch.func, forward-mode differentiation and batched gradients: as the dense layer, or an error."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from structlayers import Chain, KSLinear
from structlayers.errors import BackendError, ShapeError

CHAIN = Chain.monarch(11, 14, blocks=2)
KINDS = ("training", "recompute", "inference", "frozen", "one factor")


def layer_of(kind: str, layout: str = "batch_first", activation: str = "gelu", backend: str = "auto") -> KSLinear:
    torch.manual_seed(0)
    chain = Chain.block_diagonal(11, 14, blocks=2) if kind == "one factor" else CHAIN
    layer = KSLinear(
        chain, layout=layout, activation=activation, backend=backend, recompute=kind == "recompute", dtype=torch.float64
    )
    if kind in ("inference", "frozen"):
        layer.eval().requires_grad_(False)
    if kind == "frozen":
        layer.freeze()
    return layer


def dense(layer: KSLinear, x: torch.Tensor) -> torch.Tensor:
    z = F.linear(x.movedim(0, -1) if layer.layout == "batch_last" else x, layer.to_dense(), layer.bias)
    y = F.gelu(z) if layer.activation == "gelu" else z
    return y.movedim(-1, 0) if layer.layout == "batch_last" else y


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("layout", ["batch_first", "batch_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_for_the_input(kind, layout):
    layer = layer_of(kind, layout)
    x = inputs(3, 11) if layout == "batch_first" else inputs(11, 3)
    transforms = {
        "jvp": lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
        "jacfwd": lambda f: torch.func.jacfwd(f)(x),
        "jacrev": lambda f: torch.func.jacrev(f)(x),
        "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(x),
        "forward mode": lambda f: torch.autograd.functional.jacobian(f, x, strategy="forward-mode", vectorize=True),
        "batched": lambda f: torch.autograd.functional.jacobian(f, x, vectorize=True),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(layer), transform(lambda x: dense(layer, x)), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind):
    layer, x = layer_of(kind), inputs(4, 2, 11)
    torch.testing.assert_close(torch.vmap(layer)(x), dense(layer, x))
    torch.testing.assert_close(torch.vmap(layer, in_dims=1)(x), dense(layer, x.transpose(0, 1)))


@pytest.mark.parametrize("kind", ["training", "recompute", "one factor"])
def test_gradients_of_every_sample(kind):
    layer, x = layer_of(kind), inputs(4, 11)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n, row in enumerate(x):
        expected = torch.autograd.grad(layer(row).square().sum(), list(layer.parameters()))
        torch.testing.assert_close([found[name][n] for name in parameters], list(expected))


def test_an_ensemble_of_layers():
    layers = [KSLinear(CHAIN, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = inputs(5, 11)
    y = torch.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, lambda: torch.device("cpu")])
@pytest.mark.parametrize("kind", KINDS)
def test_tangents_ride_on_plain_tensors_too(kind, context):
    # A device as a context takes calls to the dispatcher.
    layer, x = layer_of(kind), inputs(3, 11)
    with context(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent
    expected = torch.func.jvp(lambda x: dense(layer, x), (x,), (x.cos(),))[1]
    torch.testing.assert_close(found, expected)


def test_compiled():
    layer, x = layer_of("training"), inputs(3, 11)
    run = torch.compile(lambda x: torch.func.jvp(layer, (x,), (x.cos(),))[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), torch.func.jvp(lambda x: dense(layer, x), (x,), (x.cos(),))[1])
    torch._dynamo.reset()


def test_what_has_no_tangents_is_refused():
    layer, x = layer_of("inference", backend="bmm"), inputs(3, 11)
    with pytest.raises(BackendError, match="backend = 'bmm' has no tangents: expected 'auto' or 'einsum'"):
        torch.func.jvp(layer, (x,), (x,))
    einsum = layer_of("inference", backend="einsum")
    torch.testing.assert_close(
        torch.func.jvp(einsum, (x,), (x,))[1], torch.func.jvp(lambda x: dense(einsum, x), (x,), (x,))[1]
    )
    with pytest.raises(ShapeError, match="expected 11 features"):
        torch.vmap(layer_of("training"))(inputs(2, 3, 12))
