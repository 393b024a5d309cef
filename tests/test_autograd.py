"""Gradients: against the float64 oracle's own autograd, of every order, and nothing computed that nobody asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structlayers import Chain, KSLinear, Pattern, ks_chain, ks_linear
from structlayers.backends import bmm
from structlayers.bench.verify import agreement
from structlayers.errors import ShapeError
from structlayers.problem import ACTIVATIONS
from structlayers.reference import reference
from structlayers.tolerances import tolerance

LAYOUTS = ("batch_first", "batch_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "bmm", "einsum", "dense", "reference")
FUNCTIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def oracle(x: Tensor, weights: list[Tensor], bias: Tensor, layout: str) -> Tensor:
    """The chain by its definition, under torch's own autograd: nothing of ours is differentiated by us."""
    y = x if layout == "batch_first" else x.T
    y = F.pad(y, (0, Pattern.of_weight(weights[-1].shape).in_features - y.shape[1]))
    for weight in reversed(weights):
        y = reference(y, weight)
    y = y[:, : len(bias)] + bias
    return y if layout == "batch_first" else y.T


def expected_gradients(leaves: list[Tensor], y: Tensor, dy: Tensor, activation: str, layout: str) -> tuple[Tensor, ...]:
    """Of ``x``, bias and weights, in float64. ReLU switches where the product itself was rounded to more than zero."""
    x, bias, *weights = exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = oracle(x, weights, bias, layout)
    if activation != "relu":
        return torch.autograd.grad(FUNCTIONS[activation](z), exact, dy.double())
    switched = z[(z > 0) != (y > 0)].abs()
    assert not switched.numel() or switched.max() <= 0.05 * z.square().mean().sqrt()
    return torch.autograd.grad(z, exact, torch.where(y > 0, dy.double(), 0.0))


def check_gradients(
    chain: Chain, n: int, dtype: torch.dtype, layout: str, activation: str, *, backend: str = "auto", **options
) -> None:
    """Every gradient of a chain product, within the tolerance of its dtype; also from a strided ``dy``."""
    first = layout == "batch_first"
    x = normal(n, chain.in_features, dtype=dtype) if first else normal(chain.in_features, n, dtype=dtype)
    weights = [normal(*p.weight_shape, dtype=dtype, seed=q + 1) * p.c**-0.5 for q, p in enumerate(chain)]
    bias = normal(chain.out_features, dtype=dtype, seed=9)
    dy = normal(n, chain.out_features, dtype=dtype, seed=10) if first else normal(chain.out_features, n, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, bias, *weights)]
    sizes = {"in_features": chain.in_features, "out_features": chain.out_features}
    run = ks_chain if len(weights) > 1 else lambda x, w, *rest, **how: ks_linear(x, w[0], *rest, **how)
    y = run(x, weights, bias, layout=layout, activation=activation, backend=backend, **sizes, **options)

    expected = expected_gradients(leaves, y.detach(), dy, activation, layout)
    # The longest sum of all: over the batch for weights and bias, over a block elsewhere. Roundings: every factor twice
    # (forward, backward), the activation and its derivative.
    longest = max(n, 1, *(max(p.b, p.c) for p in chain))
    bound = tolerance(dtype, longest, 2 * len(chain) + (0 if activation == "none" else 3))
    strided = dy.T.contiguous().T
    for found in (torch.autograd.grad(y, leaves, dy, retain_graph=True), torch.autograd.grad(y, leaves, strided)):
        for name, leaf, gradient, exactly in zip(
            ("x", "bias", *chain.weight_shapes), leaves, found, expected, strict=True
        ):
            where = f"{name}, {chain.spec}, n={n}, {dtype}, {layout}, {activation}"
            assert (gradient.shape, gradient.dtype) == (leaf.shape, dtype), where
            if not exactly.any():
                assert not gradient.any(), where
                continue
            # Single elements of a gradient cancel: what counts is the error beside the whole gradient.
            error = (gradient.double() - exactly).norm() / exactly.norm()
            assert error <= bound, f"{where}: {error:.1e} > {bound:.1e}"


# ---- values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_every_activation_dtype_and_layout(recompute, dtype, activation, layout):
    for spec, n in (("(1,5,6,4)(4,6,7,1)[:19,:27]", 37), ("(3,7,5,2)(6,5,3,1)", 1)):
        check_gradients(Chain.parse(spec), n, dtype, layout, activation, recompute=recompute)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(backend, dtype, layout):
    for activation in ("none", "relu"):
        check_gradients(Chain.parse("(2,3,5,7)[:41,:69]"), 33, dtype, layout, activation, backend=backend)


@given(
    a=st.integers(1, 3),
    b=st.integers(1, 19),
    c=st.integers(1, 19),
    d=st.integers(1, 7),
    n=st.sampled_from([0, 1, 2, 31, 65]),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(ACTIVATIONS),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
@settings(max_examples=80)
def test_random_factors(a, b, c, d, n, dtype, layout, activation, cut):
    pattern = Pattern(a, b, c, d)
    columns, rows = pattern.in_features - cut[0], pattern.out_features - cut[1]
    # A gradient of a few numbers may cancel to much less than the sums that it comes from.
    assume(min(columns, rows, pattern.nnz) >= 8)
    check_gradients(Chain([pattern], columns, rows), n, dtype, layout, activation)


def test_a_long_batch_is_summed_as_accurately_as_by_a_matrix_product():
    """Weight gradients at the batch of the papers: partial sums do not lose digits."""
    pattern, n = Pattern(1, 8, 8, 4), 25_088
    dy, x = normal(n, 32, dtype=torch.float32), normal(n, 32, dtype=torch.float32, seed=1)
    exact = torch.einsum("njl,nkl->ljk", dy.double().view(n, 8, 4), x.double().view(n, 8, 4))[None]
    found = torch.ops.structlayers.ks_weight_grad(dy, x, list(pattern.weight_shape), "batch_first", "auto")
    product = torch.einsum("njl,nkl->ljk", dy.view(n, 8, 4), x.view(n, 8, 4))[None]
    assert (found - exact).norm() <= 2 * (product - exact).norm()
    for dtype in (torch.float16, torch.bfloat16):
        rounded = torch.ops.structlayers.ks_weight_grad(
            dy.to(dtype), x.to(dtype), list(pattern.weight_shape), "batch_first", "auto"
        )
        exact_of_rounded = torch.einsum(
            "njl,nkl->ljk", dy.to(dtype).double().view(n, 8, 4), x.to(dtype).double().view(n, 8, 4)
        )[None]
        assert agreement(rounded, exact_of_rounded, tolerance(dtype, n, 2)).agrees


# ---- of every order


@pytest.mark.parametrize(
    "chain",
    [
        Chain.butterfly(8),
        Chain.low_rank(5, 7, 2),
        Chain.btt(6, 6, rank=2),
        # Composable, not chainable.
        Chain.parse("(2,3,2,1)(1,2,2,2)(2,2,3,1)"),
        Chain.monarch(7, 5, blocks=3, rank=1),
    ],
    ids=lambda chain: chain.spec,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_can_be_differentiated_twice(chain, recompute):
    torch.manual_seed(0)
    layer = KSLinear(chain, activation="silu", recompute=recompute, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = normal(2, 1, chain.in_features, dtype=torch.float64).requires_grad_()

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(value.detach().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_a_gradient_penalty_trains():
    """The loss holds a gradient, so that the update needs second derivatives of every factor."""
    torch.manual_seed(0)
    layer = KSLinear(Chain.monarch(6, 8, blocks=2, rank=2), activation="gelu", dtype=torch.float64)
    x = normal(5, 6, dtype=torch.float64).requires_grad_()

    def penalty() -> Tensor:
        (d_x,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        return d_x.square().sum()

    before = penalty()
    gradients = torch.autograd.grad(before, list(layer.factors))
    with torch.no_grad():
        for factor, gradient in zip(layer.factors, gradients, strict=True):
            assert gradient.any()
            factor -= 1e-3 * gradient
    assert penalty() < before


# ---- what is not computed, and what is not copied


class Calls(TorchDispatchMode):
    """How often each of our operators runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "structlayers":
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def backward_calls(layer: nn.Module, x: Tensor) -> Counter[str]:
    y = layer(x)
    with Calls() as calls:
        y.backward(torch.ones_like(y))
    return calls.counts


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_factors_of_a_layer(recompute):
    layer = KSLinear("(1,3,2,4)(4,2,3,1)", recompute=recompute)
    x = torch.randn(5, 12)
    again = 1 if recompute else 0
    # Both weight gradients, and the gradient from the left factor to the right one.
    assert backward_calls(layer, x) == {"ks_weight_grad": 2, "ks_linear": 1 + again}
    layer.factors[0].requires_grad_(False)
    layer.factors[0].grad = None
    # The right one's: its input is x, so nothing is computed again.
    assert backward_calls(layer, x) == {"ks_weight_grad": 1, "ks_linear": 1}
    assert layer.factors[0].grad is None
    layer.requires_grad_(False)
    assert backward_calls(layer, x.clone().requires_grad_()) == {"ks_linear": 2}
    layer.bias.requires_grad_(True)
    assert backward_calls(layer, x) == {}
    assert torch.equal(layer.bias.grad, torch.full((12,), 15.0))


@pytest.mark.parametrize("spec", ["(4,2,3,1)", "(1,3,2,4)(4,2,3,1)"])
def test_what_an_activation_costs_in_the_backward_pass(spec):
    """Nothing is computed again, or with ``recompute`` the product before it, but for ReLU, whose output is enough."""
    x = torch.randn(5, 12)
    plain = {again: backward_calls(KSLinear(spec, recompute=again), x)["ks_linear"] for again in (False, True)}
    for activation in ACTIVATIONS:
        for again in (False, True):
            calls = backward_calls(KSLinear(spec, activation=activation, recompute=again), x)
            product = 1 if again and activation not in ("none", "relu") else 0
            assert calls["ks_linear"] == plain[again] + product, (activation, again)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputing_keeps_the_input_and_what_is_given_on(activation):
    layer = KSLinear("(1,30,20,4)(4,20,30,1)", activation=activation, recompute=True, bias=False)
    x, weights = torch.randn(50, 120), {factor.data_ptr() for factor in layer.factors}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert kept.keys() - weights == {x.data_ptr()} | ({y.data_ptr()} if activation == "relu" else set())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_input_gradient_reads_the_weight_where_it_is(layout, monkeypatch):
    weight = torch.randn(2, 1, 24, 16)
    x = torch.randn(40, 32, requires_grad=True)
    y = ks_linear(x if layout == "batch_first" else x.T, weight, layout=layout, backend="bmm")
    read, multiply = [], torch.bmm

    def spy(left: Tensor, right: Tensor, **options):
        read.append({left.untyped_storage().data_ptr(), right.untyped_storage().data_ptr()})
        return multiply(left, right, **options)

    monkeypatch.setattr(bmm.torch, "bmm", spy)
    torch.autograd.grad(y.sum(), x)
    assert len(read) == 1
    assert weight.untyped_storage().data_ptr() in read[0]


# ---- edges


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_an_empty_batch_gives_zero_gradients(dtype, recompute, layout):
    layer = KSLinear("(1,3,2,4)(4,2,3,1)", layout=layout, recompute=recompute, activation="gelu", dtype=dtype)
    for shape in ((0,), (2, 0, 3)):
        layer.zero_grad()
        x = torch.randn(*shape, 12, dtype=dtype) if layout == "batch_first" else torch.randn(12, *shape, dtype=dtype)
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad.shape == x.shape
        for parameter in layer.parameters():
            assert parameter.grad.dtype == dtype
            assert not parameter.grad.any()


@pytest.mark.parametrize("recompute", [False, True])
def test_mixed_dtypes_are_an_error_before_any_work(recompute):
    layer = KSLinear("(1,3,2,4)(4,2,3,1)", recompute=recompute)
    for x, message in (
        (torch.randn(5, 12, dtype=torch.float64), "torch.float32 but x has torch.float64"),
        (torch.randn(5, 12, dtype=torch.bfloat16), "torch.float32 but x has torch.bfloat16"),
    ):
        with Calls() as calls, pytest.raises(ShapeError, match=message):
            layer(x)
        # The operator of the whole chain refuses itself; its factors are not begun.
        assert calls.counts in ({}, {"ks_chain": 1})
    layer.factors[0].data = layer.factors[0].data.half()
    with pytest.raises(ShapeError, match=r"weight 1 has dtype torch.float16"):
        layer(torch.randn(5, 12))


def test_a_graph_may_be_used_twice_and_its_tensors_not_be_overwritten():
    layer = KSLinear("(1,3,2,4)(4,2,3,1)", activation="relu")
    y = layer(torch.randn(5, 12))
    first = torch.autograd.grad(y.sum(), layer.factors[0], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), layer.factors[0], retain_graph=True)[0], first)
    with torch.no_grad():
        layer.factors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients(backend):
    """``sum().backward()`` hands over a gradient of stride 0."""
    layer = KSLinear("(1,3,2,4)(4,2,3,1)", backend=backend, dtype=torch.float64)
    x = normal(5, 12, dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    (expected,) = torch.autograd.grad(F.linear(x, layer.to_dense()).sum(), x)
    torch.testing.assert_close(found, expected)
