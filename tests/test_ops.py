"""The operators under autograd, torch.compile, export, autocast and FLOP counting."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from structlayers import Chain, Pattern, ks_chain, ks_linear, ops
from structlayers.backends.cuda import check_memory
from structlayers.errors import BackendError, ChainError, ShapeError
from structlayers.factorize import to_dense
from structlayers.problem import ACTIVATIONS
from structlayers.tolerances import tolerance

LAYOUTS = ("batch_first", "batch_last")
CHAIN = Chain.parse("(1,4,3,2)(2,3,4,1)[:7,:6]")
BACKENDS = ("auto", "bmm", "einsum", "dense", "reference")


def draw(chain: Chain, n: tuple[int, ...] = (5,), layout: str = "batch_first", dtype=torch.float64, grad: bool = True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(grad)

    x = normal(*n, chain.in_features) if layout == "batch_first" else normal(chain.in_features, *n)
    return x, [normal(*shape) for shape in chain.weight_shapes], normal(chain.out_features)


def sizes(chain: Chain) -> dict[str, int]:
    return {"in_features": chain.in_features, "out_features": chain.out_features}


# ---- the registration


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [(5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, n, layout):
    x, weights, bias = draw(CHAIN, n, layout, torch.float32)
    ops = torch.ops.structlayers
    rest = (CHAIN.in_features, CHAIN.out_features, layout, "gelu", backend)
    torch.library.opcheck(ops.ks_chain, (x, weights, bias, *rest))
    padded = Chain([CHAIN[1]], in_features=6)
    torch.library.opcheck(ops.ks_linear, (x, weights[1], None, 6, None, layout, "none", backend))
    dy = torch.randn(*n, padded.out_features) if layout == "batch_first" else torch.randn(padded.out_features, *n)
    torch.library.opcheck(ops.ks_weight_grad, (dy.requires_grad_(), x, list(weights[1].shape), layout, backend))


@pytest.mark.parametrize("x_strides", ["transposed", "expanded"])
def test_opcheck_of_strided_arguments(x_strides):
    x, weights, bias = draw(CHAIN, (4,), dtype=torch.float32, grad=False)
    x = x.T.contiguous().T if x_strides == "transposed" else x[:1].expand(4, -1)
    for layout, value in (("batch_first", x), ("batch_last", x.T)):
        rest = (CHAIN.in_features, CHAIN.out_features, layout, "relu", "auto")
        torch.library.opcheck(torch.ops.structlayers.ks_chain, (value, weights, bias, *rest))


# ---- gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute, activation, layout):
    x, weights, bias = draw(CHAIN, (3,), layout)

    def f(x, bias, *weights):
        return ks_chain(x, weights, bias, layout=layout, activation=activation, recompute=recompute, **sizes(CHAIN))

    assert torch.autograd.gradcheck(f, (x, bias, *weights))
    assert torch.autograd.gradgradcheck(f, (x, bias, *weights))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["einsum", "bmm", "dense", "csr", "bsr"])
def test_gradcheck_of_one_factor(backend, layout):
    chain = Chain.parse("(2,3,2,2)[:11,:7]")
    x, (weight,), bias = draw(chain, (2, 2), layout)

    def f(x, weight, bias):
        return ks_linear(x, weight, bias, layout=layout, backend=backend, **sizes(chain))

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


@pytest.mark.parametrize("recompute", [False, True])
def test_chain_of_one_and_of_many(recompute):
    for chain in (Chain.dense(5, 4), Chain.butterfly(16), Chain.parse("(4,2,2,1)(1,2,2,4)")):
        x, weights, bias = draw(chain, (6,))
        y = ks_chain(x, weights, bias, recompute=recompute)
        expected = x @ to_dense(weights).T + bias
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        for got, want in zip(
            torch.autograd.grad(y, (x, bias, *weights), dy),
            torch.autograd.grad(expected, (x, bias, *weights), dy),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of our operators in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "structlayers":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_factors_cost_no_gradient(recompute):
    chain = Chain.butterfly(8)

    def backward_calls(x_needs: bool, needs: tuple[bool, ...], bias_needs: bool = False) -> list[str]:
        x, weights, bias = draw(chain, grad=False)
        x.requires_grad_(x_needs)
        bias.requires_grad_(bias_needs)
        for weight, need in zip(weights, needs, strict=True):
            weight.requires_grad_(need)
        y = ks_chain(x, weights, bias, recompute=recompute)
        with Calls() as calls:
            y.sum().backward()
        assert [w.grad is not None for w in weights] == list(needs)
        assert (x.grad is not None) == x_needs
        return calls.names

    forward_again = 2 if recompute else 0
    calls = backward_calls(True, (True, True, True))
    assert calls.count("ks_weight_grad") == 3
    assert calls.count("ks_linear") == 3 + forward_again
    calls = backward_calls(True, (False, False, False))
    assert calls.count("ks_weight_grad") == 0
    assert calls.count("ks_linear") == 3
    # The gradient does not travel past the last factor that wants it.
    calls = backward_calls(False, (True, False, False))
    assert calls.count("ks_weight_grad") == 1
    assert calls.count("ks_linear") == forward_again
    assert backward_calls(False, (False, False, False), bias_needs=True) == []


def test_recompute_keeps_only_the_input():
    def saved(recompute: bool) -> int:
        x, weights, _ = draw(Chain.butterfly(64), (256,))
        kept = set()

        def pack(tensor):
            if tensor.numel() >= x.numel():
                kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ks_chain(x, weights, recompute=recompute).sum()
        return len(kept)

    assert saved(True) == 1
    assert saved(False) == 6


# ---- torch.compile and export


class Layer(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        _, weights, bias = draw(CHAIN, dtype=torch.float32)
        self.weights = nn.ParameterList(w.detach() for w in weights)
        self.bias = nn.Parameter(bias.detach())
        self.recompute = recompute

    def forward(self, x):
        options = {"activation": "silu", "recompute": self.recompute, **sizes(CHAIN)}
        return ks_chain(x, list(self.weights), self.bias, **options)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "bmm"])
def test_compile_fullgraph_with_dynamic_batch_compiles_once(backend, layout, fresh_compiler):
    _, weights, bias = draw(CHAIN, dtype=torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def f(x):
        return ks_chain(x, weights, bias, layout=layout, activation="gelu", backend=backend, **sizes(CHAIN))

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=count)
    for n in (5, 9, 33):
        x = draw(CHAIN, (n,), layout, torch.float32)[0]
        torch.testing.assert_close(compiled(x), f(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_compile_forward_and_backward(recompute, fresh_compiler):
    """Through AOTAutograd, which traces the backward pass too; a new batch size does not trace again."""
    layer = Layer(recompute)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    # 4 is also a size of a weight.
    for n in (4, 7, 32):
        x = draw(CHAIN, (n,), dtype=torch.float32)[0]
        wanted = (x, *layer.parameters())
        grads, expected = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (compiled, layer))
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_refuses_bad_shapes_with_our_message(fresh_compiler):
    _, weights, bias = draw(CHAIN, dtype=torch.float32)
    compiled = torch.compile(lambda x: ks_chain(x, weights, bias, **sizes(CHAIN)), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"expected 6 features in dimension -1"):
        compiled(torch.randn(4, 5))


def test_export_with_dynamic_batch():
    layer = Layer()
    x = draw(CHAIN, (5,), dtype=torch.float32, grad=False)[0]
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("structlayers" in target for target in targets)
    for n in (1, 5, 40):
        x = draw(CHAIN, (n,), dtype=torch.float32, grad=False)[0]
        torch.testing.assert_close(program.module()(x), layer(x))


# ---- autocast


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_its_dtype(dtype, compiled, fresh_compiler):
    x, weights, bias = draw(CHAIN, (5,), dtype=torch.float32)

    def f(x, weights, bias):
        with torch.autocast("cpu", dtype=dtype):
            y = ks_chain(x, weights, bias, **sizes(CHAIN))
            assert torch.get_autocast_dtype("cpu") == dtype
        return y

    run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    y = run(x, weights, bias)
    assert y.dtype == dtype
    expected = (x.double() @ to_dense([w.double() for w in weights], **sizes(CHAIN)).T + bias.double()).detach()
    # Inputs and weights are rounded before they are multiplied: two more roundings a factor.
    bound = tolerance(dtype, 4, n_factors=6)
    assert (y.detach().double() - expected).norm() <= bound * expected.norm()
    grads = torch.autograd.grad(y.float().square().sum(), (x, bias, *weights))
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_autocast_leaves_float64_and_other_devices_alone():
    x, weights, bias = draw(CHAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ks_chain(x, weights, bias, **sizes(CHAIN)).dtype == torch.float64
    x, weights, bias = draw(CHAIN, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        assert ks_chain(x, weights, bias, **sizes(CHAIN)).dtype == torch.float32


def test_autocast_mixes_dtypes_as_linear_does():
    x, weights, bias = draw(CHAIN, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ks_chain(x.bfloat16(), weights, bias, **sizes(CHAIN)).dtype == torch.bfloat16


# ---- FLOPs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_flop_counter(recompute, layout):
    x, weights, bias = draw(CHAIN, (3, 5), layout, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ks_chain(x, weights, bias, layout=layout, **sizes(CHAIN))
    assert counter.get_total_flops() == CHAIN.flops(15)
    with FlopCounterMode(display=False) as counter:
        ks_chain(x, weights, bias, layout=layout, recompute=recompute, **sizes(CHAIN)).sum().backward()
    again = CHAIN[1].flops(15) if recompute else 0
    assert counter.get_total_flops() == 3 * CHAIN.flops(15) + again


# ---- what is refused


def test_shape_errors_name_sizes_and_pattern():
    x, weights, bias = draw(CHAIN, dtype=torch.float32, grad=False)
    spec = r"\(1,4,3,2\)\(2,3,4,1\)"
    with pytest.raises(ShapeError, match=rf"x of shape \(5, 6\): expected 8 features in dimension -1.*{spec}"):
        ks_chain(x, weights)
    with pytest.raises(ShapeError, match=r"x of shape \(5, 6\): expected 6 features in dimension 0 \(batch_last\)"):
        ks_chain(x, weights, layout="batch_last", in_features=6)
    with pytest.raises(ShapeError, match=r"x of shape \(\): expected 8"):
        ks_chain(torch.tensor(1.0), weights)
    with pytest.raises(ShapeError, match=r"in_features = 9: expected 1 to 8"):
        ks_chain(torch.randn(2, 9), weights, in_features=9)
    with pytest.raises(ShapeError, match=r"out_features = 9: expected 1 to 8"):
        ks_chain(x, weights, in_features=6, out_features=9)
    with pytest.raises(ShapeError, match=r"bias of shape \(7,\): expected \(8,\)"):
        ks_chain(x, weights, bias, in_features=6)
    with pytest.raises(ChainError, match="four dimensions"):
        ks_linear(x, torch.randn(3, 6))
    with pytest.raises(ChainError, match="0 weights"):
        ks_chain(x, [])
    with pytest.raises(ChainError, match=r"factors 1 and 2 do not compose: \(2, 3, 4, 1\) reads 8"):
        ks_chain(x, [weights[1], weights[1]], in_features=6)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_chain_is_checked_as_a_whole_when_gradients_are_recorded(recompute):
    x, weights, bias = draw(CHAIN, dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"out_features = 9: expected 1 to 8, the rows of \(1,4,3,2\)\(2,3,4,1\)"):
        ks_chain(x, weights, bias, in_features=6, out_features=9, recompute=recompute)


def test_dtype_and_device_errors():
    x, weights, bias = draw(CHAIN, dtype=torch.float32, grad=False)
    with pytest.raises(ShapeError, match=r"weight 2 has dtype torch\.float64 but x has torch\.float32"):
        ks_chain(x, [weights[0], weights[1].double()], in_features=6)
    with pytest.raises(ShapeError, match=r"bias has dtype torch\.bfloat16"):
        ks_chain(x, weights, bias.bfloat16(), **sizes(CHAIN))
    with pytest.raises(ShapeError, match="weight 1 is on meta but x is on cpu"):
        ks_chain(x, [weights[0].to("meta"), weights[1]], in_features=6)
    with pytest.raises(ShapeError, match=r"torch\.int64: expected a floating-point dtype"):
        ks_chain(x.long(), [w.long() for w in weights], in_features=6)


def test_option_errors():
    x, weights, _ = draw(CHAIN, dtype=torch.float32, grad=False)
    for options, message, error in (
        ({"layout": "first"}, r"layout = 'first': expected one of \['batch_first', 'batch_last'\]", ValueError),
        ({"activation": "tanh"}, r"activation = 'tanh': expected one of \['none', 'relu'", ValueError),
        ({"backend": "cublas"}, r"backend = 'cublas': expected one of \['auto'", BackendError),
    ):
        with pytest.raises(error, match=message):
            ks_chain(x, weights, in_features=6, **options)
        with pytest.raises(error, match=message):
            ks_linear(x, weights[1], in_features=6, **options)


def test_weight_grad_checks_its_sizes():
    dy, x = torch.randn(5, 6), torch.randn(5, 8)
    weight_grad = torch.ops.structlayers.ks_weight_grad
    assert weight_grad(dy, x, [2, 1, 3, 4], "batch_first", "auto").shape == (2, 1, 3, 4)
    with pytest.raises(ShapeError, match=r"dy of shape \(5, 6\).*at most 4 features"):
        weight_grad(dy, x, [2, 1, 2, 4], "batch_first", "auto")
    with pytest.raises(ShapeError, match=r"x of shape \(5, 8\).*at most 6 features"):
        weight_grad(dy, x, [2, 1, 3, 3], "batch_first", "auto")
    with pytest.raises(ShapeError, match=r"dy of shape \(4, 6\) and x of shape \(5, 8\): expected one batch"):
        weight_grad(dy[:4], x, [2, 1, 3, 4], "batch_first", "auto")


def test_inference_and_meta_tensors():
    x, weights, bias = draw(CHAIN, dtype=torch.float32)
    expected = ks_chain(x, weights, bias, **sizes(CHAIN))
    with torch.inference_mode():
        torch.testing.assert_close(ks_chain(x, weights, bias, **sizes(CHAIN)), expected.detach())
    meta = ks_chain(x.to("meta"), [w.to("meta") for w in weights], bias.to("meta"), **sizes(CHAIN))
    assert meta.shape == expected.shape
    assert meta.device.type == "meta"


def test_any_leading_dimensions():
    for n, layout in itertools.product([(), (0,), (1,), (2, 0, 3), (2, 3, 4)], LAYOUTS):
        x, weights, bias = draw(CHAIN, n, layout)
        y = ks_chain(x, weights, bias, layout=layout, **sizes(CHAIN))
        assert tuple(y.shape) == ((*n, 7) if layout == "batch_first" else (7, *n))
        rows = x.reshape(-1, 6) if layout == "batch_first" else x.reshape(6, -1).T
        flat = ks_chain(rows, weights, bias, **sizes(CHAIN))
        torch.testing.assert_close(y.reshape(-1, 7) if layout == "batch_first" else y.reshape(7, -1).T, flat)
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_weight_gradient_of_a_pattern_is_its_definition():
    a, b, c, d = pattern = Pattern(2, 3, 4, 5)
    dy, x = torch.randn(6, pattern.out_features).double(), torch.randn(6, pattern.in_features).double()
    dw = torch.ops.structlayers.ks_weight_grad(dy, x, list(pattern.weight_shape), "batch_first", "auto")
    for i, l, j, k in itertools.product(range(a), range(d), range(b), range(c)):
        expected = dy[:, (i * b + j) * d + l] @ x[:, (i * c + k) * d + l]
        torch.testing.assert_close(dw[i, l, j, k], expected)


@pytest.mark.parametrize("elements", [2**50, 16])
def test_want_of_memory_is_said_as_pytorch_says_it(elements, monkeypatch):
    """Loops that look for ``torch.OutOfMemoryError`` find it on a GPU; other failures stay what they are."""
    said = f"could not allocate an output of {elements} elements"

    def fails(*arguments):
        raise RuntimeError(said)

    x, weights, _ = draw(CHAIN, (2, 3), grad=False)
    y = ks_chain(x, weights, **sizes(CHAIN))
    # The CPU's allocator refuses in words of its own.
    expected = r"(?i)alloc.*memory" if elements > 16 else said
    monkeypatch.setattr(ops.prepared, "plan", lambda *arguments: fails)
    for flat in (x, x[0]):
        with pytest.raises(RuntimeError, match=expected) as caught:
            ks_chain(flat, weights, **sizes(CHAIN))
        assert (said in str(caught.value)) == (elements == 16)
    kernel = SimpleNamespace(weight_grad=fails, weight_grad_of_logical_sizes=True)
    monkeypatch.setattr(ops, "resolve", lambda *arguments: kernel)
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.structlayers.ks_weight_grad(y, y, [1, 1, y.shape[-1], y.shape[-1]], "batch_first", "bmm")


def test_the_kernels_say_it_in_the_words_that_are_looked_for():
    source = (Path(__file__).parents[1] / "csrc" / "register.cpp").read_text()
    (said,) = re.findall(r'require\(done, "(.*?)", .*?, "(.*?)"\)', source)
    with pytest.raises(RuntimeError, match=r"(?i)alloc.*memory"):
        check_memory(RuntimeError("structlayers: " + str(2**50).join(said)), torch.empty(0))
    check_memory(RuntimeError("structlayers: no current stream"), torch.empty(0))
