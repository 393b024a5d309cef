"""The compiled kernels on a GPU as parts of a program: gradients, layers, streams, graphs, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from structlayers import Chain, KSLinear, Layout, Pattern, ks_chain, ks_linear
from structlayers._extension import built_for_sm90a, why_missing
from structlayers.backends import cuda
from structlayers.backends.tiles import TILES_16BIT, TILES_32BIT, tiles_for
from structlayers.bench.verify import agreement
from structlayers.errors import BackendError, ShapeError
from structlayers.problem import Problem
from structlayers.tolerances import tolerance

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else why_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]

DEVICE = torch.device("cuda")
CAPABILITY = (8, 0) if NO_GPU else torch.cuda.get_device_capability()
LAYOUTS = ("batch_first", "batch_last")


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float32, device=DEVICE, generator=generator).to(dtype)


# ---- gradients, chains, layers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients(layout, activation):
    pattern, n = Pattern(2, 5, 7, 3), 19
    x = draw(n, pattern.in_features, dtype=torch.float32)
    leaves = [x if layout == "batch_first" else x.T.contiguous(), draw(*pattern.weight_shape, dtype=torch.float32)]
    leaves.append(draw(pattern.out_features, dtype=torch.float32))
    dy = draw(n, pattern.out_features, dtype=torch.float32, seed=9)
    dy = dy if layout == "batch_first" else dy.T

    def grads(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        y = ks_linear(*own, layout=layout, backend=backend, activation=activation)
        return torch.autograd.grad(y, own, dy.to(dtype))

    for found, truth in zip(grads("cuda", torch.float32), grads("reference", torch.float64), strict=True):
        assert agreement(found, truth, tolerance(torch.float32, 64, 4)).agrees


def test_a_padded_chain_as_a_layer():
    chain = Chain.monarch(100, 130, blocks=4, rank=6)
    layer = KSLinear(chain, backend="cuda", device=DEVICE, dtype=torch.bfloat16, activation="silu")
    oracle = KSLinear(chain, backend="reference", device=DEVICE, dtype=torch.float64, activation="silu")
    oracle.load_state_dict(layer.state_dict())
    assert layer.resolved_backends(33) == ["cuda", "cuda"]
    x = draw(3, 11, 100, dtype=torch.bfloat16)
    bound = tolerance(torch.bfloat16, max(p.c for p in chain), 4)
    truth = oracle(x.double())
    assert agreement(layer(x), truth, bound).agrees
    with torch.inference_mode():
        assert agreement(layer(x), truth, bound).agrees


def test_auto_may_take_the_kernels_and_says_so():
    layer = KSLinear("(4,128,128,16)", device=DEVICE, dtype=torch.float16)
    (name,) = layer.resolved_backends(4096)
    assert name in ("cuda", "bmm", "dense", "einsum")
    x = draw(4096, layer.in_features, dtype=torch.float16)
    chosen = KSLinear("(4,128,128,16)", backend=name, device=DEVICE, dtype=torch.float16)
    chosen.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), chosen(x))


def test_autocast_casts():
    x, w = draw(9, 24, dtype=torch.float32), draw(1, 4, 5, 6, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = ks_linear(x, w, backend="cuda")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ks_linear(x.bfloat16(), w.bfloat16(), backend="cuda"))


# ---- what is refused


def test_wrong_inputs_are_errors_and_the_process_goes_on():
    x, w = draw(9, 24, dtype=torch.float16), draw(1, 4, 5, 6, dtype=torch.float16)
    right = ks_linear(x, w, backend="cuda")
    wrong = (
        (ShapeError, "expected 24 features", lambda: ks_linear(x[:, :-1], w, backend="cuda")),
        (ShapeError, "expected one dtype", lambda: ks_linear(x, w.float(), backend="cuda")),
        (ShapeError, "expected one device", lambda: ks_linear(x, w.cpu(), backend="cuda")),
        (ShapeError, "bias of shape", lambda: ks_linear(x, w, x[0], backend="cuda")),
        (ShapeError, "out_features = 21", lambda: ks_linear(x, w, backend="cuda", out_features=21)),
        (BackendError, "no torch.float64", lambda: ks_linear(x.double(), w.double(), backend="cuda")),
        (BackendError, "on cpu: expected cuda", lambda: ks_linear(x.cpu(), w.cpu(), backend="cuda")),
    )
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(ks_linear(x, w, backend="cuda"), right)


def test_the_operator_itself_checks_what_could_crash():
    kernel = torch.ops.structlayers.cuda_product
    x, w = draw(9, 24, dtype=torch.float16), draw(1, 4, 5, 6, dtype=torch.float16)
    right = kernel(x, w, None, 20, False, 0, False, 1)
    for arguments in (
        (x, w, None, 20, False, 0, False, 99),  # no such tile
        (x, w, None, 21, False, 0, False, 1),
        (x[0], w, None, 20, False, 0, False, 1),
        (draw(9, 25, dtype=torch.float16), w, None, 20, False, 0, False, 1),
        (x.T.contiguous().T, w, None, 20, False, 0, False, 1),
        (x, w.mT.contiguous().mT, None, 20, False, 0, False, 1),
        (x.double(), w.double(), None, 20, False, 0, False, 1),
    ):
        with pytest.raises(RuntimeError, match="structlayers: "):
            kernel(*arguments)
        assert torch.equal(kernel(x, w, None, 20, False, 0, False, 1), right)


def test_every_number_of_the_tables_is_compiled():
    w = {dtype: draw(1, 4, 5, 6, dtype=dtype) for dtype in (torch.float16, torch.float32)}
    for dtype, table in ((torch.float16, TILES_16BIT), (torch.float32, TILES_32BIT)):
        for tile in table:
            x = draw(24, 24, dtype=dtype)
            last = tile.layout is Layout.BATCH_LAST
            for split in (False, True) if dtype == torch.float32 else (False,):
                y = torch.ops.structlayers.cuda_product(x, w[dtype], None, 20, last, 0, split, tile.number)
                assert torch.isfinite(y).all()


# ---- how it runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_captured_graph_replays(layout):
    x, w, bias = (draw(*shape, dtype=torch.float16) for shape in ((24, 24), (1, 4, 5, 6), (20,)))
    ks_linear(x, w, bias, layout=layout, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ks_linear(x, w, bias, layout=layout, backend="cuda")
    for seed in (1, 2):
        x.copy_(draw(24, 24, dtype=torch.float16, seed=seed))
        graph.replay()
        assert torch.equal(y, ks_linear(x, w, bias, layout=layout, backend="cuda"))


def test_the_first_call_may_be_a_captured_one():
    """Nothing that a first call does (choosing, looking up, setting attributes) breaks a capture."""
    x, w = draw(77, 3 * 19 * 6, dtype=torch.bfloat16), draw(3, 6, 23, 19, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ks_linear(x, w, backend="cuda")
    graph.replay()
    assert torch.equal(y, ks_linear(x, w, backend="cuda"))


def test_it_runs_on_the_current_stream():
    data, w = draw(64, 24, dtype=torch.float16), draw(1, 4, 5, 6, dtype=torch.float16)
    right, x = ks_linear(data, w, backend="cuda"), torch.zeros_like(data)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The input arrives late on this stream; on any other the kernel would see zeros.
        torch.cuda._sleep(100_000_000)
        x.copy_(data)
        y = ks_linear(x, w, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, right)


def test_it_neither_waits_nor_allocates_more_than_its_output():
    x, w, bias = (draw(*shape, dtype=torch.float16) for shape in ((64, 24), (1, 4, 5, 6), (20,)))
    ks_linear(x, w, bias, backend="cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ks_linear(x, w, bias, backend="cuda", activation="gelu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_it_runs_on_the_device_of_its_input():
    x, w = draw(64, 24, dtype=torch.float16), draw(1, 4, 5, 6, dtype=torch.float16)
    y = ks_linear(x.to("cuda:1"), w.to("cuda:1"), backend="cuda")
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.to(DEVICE), ks_linear(x, w, backend="cuda"))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole_with_a_dynamic_batch(compiler):
    if compiler == "inductor":
        pytest.importorskip("triton")
    weights = [draw(1, 4, 5, 6, dtype=torch.float32), draw(4, 1, 6, 7, dtype=torch.float32)]
    weights = [w.requires_grad_() for w in weights]
    bias = draw(20, dtype=torch.float32).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return ks_chain(x * 2, weights, bias, activation="gelu", backend="cuda") + 1

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for n in (5, 33, 128):
        x = draw(n, 28, dtype=torch.float32, seed=n).requires_grad_()
        y, right = compiled(x), function(x)
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
        for found, truth in zip(
            torch.autograd.grad(y.sum(), [x, *weights]), torch.autograd.grad(right.sum(), [x, *weights]), strict=True
        ):
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 5])
def test_opcheck(n, layout):
    x = draw(n, 24, dtype=torch.float32) if layout == "batch_first" else draw(24, n, dtype=torch.float32)
    w, bias = draw(1, 4, 5, 6, dtype=torch.float32).requires_grad_(), draw(20, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(
        torch.ops.structlayers.ks_linear, (x.requires_grad_(), w, bias, None, None, layout, "gelu", "cuda")
    )


def test_a_tile_of_the_tuning_cache_gives_the_same_numbers():
    problem = Problem(Pattern(2, 40, 24, 6), 300, torch.float16, "cuda", Layout.BATCH_FIRST)
    x, w = draw(300, 288, dtype=torch.float16), draw(*problem.pattern.weight_shape, dtype=torch.float16)
    outputs = [cuda.prepare(problem, "none", 480, tile)(x, w, None) for tile in tiles_for(problem, built_for_sm90a())]
    for y in outputs[1:]:
        assert agreement(y, outputs[0].double(), tolerance(torch.float16, 24, 2)).agrees
    assert cuda.tile_of(problem) == cuda.tile_of(replace(problem))
