"""Training on a GPU: gradients against the float64 oracle, and what whole steps stand on.

Graph capture, mixed precision with loss scaling, the compiler, activation checkpointing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from structlayers import Chain, KSLinear, Pattern, ks_chain
from structlayers._extension import why_missing
from structlayers.bench.products import float32_precision
from structlayers.models import GPT
from structlayers.problem import ACTIVATIONS
from structlayers.reference import reference
from structlayers.surgery import swap_linears
from structlayers.tolerances import tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
LAYOUTS = ("batch_first", "batch_last")
# What auto may choose, and the compiled kernels alone where they are built.
BACKENDS = ("auto", "bmm") if why_missing() else ("auto", "bmm", "cuda")
KINDS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
FUNCTIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
# The batch of the papers' tables.
LONG_BATCH = 25_088
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 32, 33, 48, 61, 64, 65, 96, 127, 128, 130)
BATCHES = (1, 2, 7, 16, 31, 33, 64, 65, 127, 128, 129, 257, 1025)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float32, device=DEVICE, generator=generator).to(dtype)


# ---- gradients


@dataclass(frozen=True)
class Call:
    """One chain product to differentiate, and in which memory its input and the gradient of its output lie."""

    chain: Chain
    n: int
    activation: str
    bias: bool
    recompute: bool
    strides: str


def family(count: int, seed: int) -> Iterator[Call]:
    """Random factors and pairs of factors, most of them with sizes that divide nothing."""
    pick = random.Random(seed)
    while count:
        a, b, c, d = (pick.choice(sizes) for sizes in ((1, 1, 2, 3, 5), SIZES, SIZES, (1, 2, 3, 4, 5, 7, 8, 16, 17)))
        patterns = [Pattern(a, b, c, d)]
        if pick.random() < 0.5:
            # Any factor that writes what the first one reads; chainable or not.
            width = a * c * d
            left = pick.choice([size for size in range(1, min(width, 33) + 1) if width % size == 0])
            patterns.append(Pattern(left, width // left, pick.choice(SIZES), 1))
        padded = Chain(patterns)
        if padded.in_features * padded.out_features > 2**22 or min(padded.in_features, padded.out_features) < 8:
            # Slow for the oracle, or so small that a gradient may cancel.
            continue
        crop = pick.randint(0, 3) if pick.random() < 0.5 else 0
        yield Call(
            Chain(patterns, padded.in_features - crop, padded.out_features - crop),
            pick.choice(BATCHES),
            pick.choice(ACTIVATIONS),
            pick.random() < 0.7,
            pick.random() < 0.3,
            pick.choice(("contiguous", "transposed", "sliced", "expanded")),
        )
        count -= 1


def strided(x: Tensor, kind: str, first: bool) -> Tensor:
    """The same values in other memory, everything around them NaN; "expanded": one entry of the batch for all."""
    if kind == "transposed":
        return x.T.contiguous().T
    if kind == "sliced":
        around = x.new_full((x.shape[0] + 1, 2 * x.shape[1] + 1), float("nan"))
        around[1:, 1::2] = x
        return around[1:, 1::2]
    if kind == "expanded":
        return (x[:1] if first else x[:, :1]).expand(x.shape)
    return x


def oracle(x: Tensor, weights: list[Tensor], bias: Tensor | None, rows: int, layout: str) -> Tensor:
    """The product before the activation, by its definition and under torch's own autograd."""
    y = x if layout == "batch_first" else x.T
    y = F.pad(y, (0, Pattern.of_weight(weights[-1].shape).in_features - y.shape[1]))
    for weight in reversed(weights):
        y = reference(y, weight)
    y = y[:, :rows] if bias is None else y[:, :rows] + bias
    return y if layout == "batch_first" else y.T


def expected_gradients(leaves: list[Tensor], has_bias: bool, y: Tensor, dy: Tensor, call: Call, layout: str):
    """Of input, weights and bias, in float64. ReLU switches where the product was itself rounded to more than zero."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weights, bias = (exact[1:-1], exact[-1]) if has_bias else (exact[1:], None)
    z = oracle(exact[0], weights, bias, call.chain.out_features, layout)
    if call.activation != "relu":
        return torch.autograd.grad(FUNCTIONS[call.activation](z), exact, dy.double())
    switched = z[(z > 0) != (y > 0)].abs()
    assert not switched.numel() or switched.max() <= 0.05 * z.square().mean().sqrt(), str(call)
    return torch.autograd.grad(z, exact, torch.where(y > 0, dy.double(), 0.0))


def check_gradients(call: Call, kind: str, layout: str, backend: str) -> None:
    (dtype, tf32), chain, first = KINDS[kind], call.chain, layout == "batch_first"
    shapes = [(call.n, chain.in_features), (call.n, chain.out_features)]
    x, dy = (normal(*(shape if first else shape[::-1]), dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    x, dy = strided(x, call.strides, first), strided(dy, call.strides, first)
    weights = [normal(*p.weight_shape, dtype=dtype, seed=5 + q) * p.c**-0.5 for q, p in enumerate(chain)]
    bias = normal(chain.out_features, dtype=dtype, seed=9) if call.bias else None
    # Detached: a slice or an expanded row is a leaf of its own here.
    leaves = [leaf.detach().requires_grad_() for leaf in (x, *weights, *([bias] if call.bias else []))]
    sizes = {"in_features": chain.in_features, "out_features": chain.out_features}
    how = {"layout": layout, "backend": backend, "activation": call.activation, "recompute": call.recompute}
    y = ks_chain(leaves[0], leaves[1 : 1 + len(weights)], leaves[-1] if call.bias else None, **sizes, **how)
    found = torch.autograd.grad(y, leaves, dy)
    expected = expected_gradients(leaves, call.bias, y.detach(), dy, call, layout)
    # Roundings: every factor forward and backward, the activation and its derivative; the longest sum of all.
    bound = tolerance(
        dtype,
        max(call.n, *(max(p.b, p.c) for p in chain)),
        2 * len(chain) + (0 if call.activation == "none" else 3),
        float32_precision="high" if tf32 else "highest",
    )
    names = ("x", *(f"factor {q + 1}" for q in range(len(chain))), "bias")
    for name, leaf, gradient, exactly in zip(names, leaves, found, expected, strict=False):
        where = f"{name} of {call}, {kind}, {layout}, {backend}"
        assert (gradient.shape, gradient.dtype) == (leaf.shape, dtype), where
        assert torch.isfinite(gradient).all(), where
        if not exactly.any():
            assert not gradient.any(), where
            continue
        # Single elements of a gradient cancel: what counts is the error beside the whole gradient.
        error = float((gradient.double() - exactly).norm() / exactly.norm())
        assert error <= bound, f"{where}: {error:.1e} > {bound:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_over_a_broad_family(backend, kind, layout):
    with float32_precision(KINDS[kind][1]):
        for call in family(25, seed=list(KINDS).index(kind)):
            check_gradients(call, kind, layout, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(kind, layout):
    chain = Chain.parse("(1,40,24,4)(4,24,56,1)[:157,:221]")
    with float32_precision(KINDS[kind][1]):
        for activation in ACTIVATIONS:
            for recompute in (False, True):
                check_gradients(Call(chain, 300, activation, True, recompute, "contiguous"), kind, layout, "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind, backend):
    dtype, _ = KINDS[kind]
    layer = KSLinear("(1,5,6,4)(4,6,7,1)", activation="gelu", backend=backend, device=DEVICE, dtype=dtype)
    x = torch.empty(0, 28, device=DEVICE, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert parameter.grad.dtype == dtype
        assert not parameter.grad.any()


@pytest.mark.parametrize("entries", [(1, 1024, 256, 4), (4, 256, 256, 1), (1, 64, 64, 64), (16, 64, 256, 1)], ids=str)
def test_weight_gradients_of_long_batches_are_as_accurate_as_those_of_cublas(entries):
    """float32 at N = 25,088: at most twice the error of cuBLAS float32 on the same blocks."""
    a, b, c, d = pattern = Pattern(*entries)
    n = LONG_BATCH
    dy, x = normal(n, pattern.out_features), normal(n, pattern.in_features, seed=1)
    lefts = dy.view(n, a, b, d).permute(1, 3, 2, 0).reshape(a * d, b, n)
    rights = x.view(n, a, c, d).permute(1, 3, 0, 2).reshape(a * d, n, c)
    with float32_precision(False):
        cublas = torch.bmm(lefts, rights).view(pattern.weight_shape)
        found = torch.ops.structlayers.ks_weight_grad(dy, x, list(pattern.weight_shape), "batch_first", "auto")
        last = torch.ops.structlayers.ks_weight_grad(
            dy.T.contiguous(), x.T.contiguous(), list(pattern.weight_shape), "batch_last", "auto"
        )
    exact = torch.cat([torch.bmm(lefts[i : i + 1].double(), rights[i : i + 1].double()) for i in range(a * d)])
    exact = exact.view(pattern.weight_shape)
    bound = 2 * (cublas - exact).norm()
    assert (found - exact).norm() <= bound
    assert (last - exact).norm() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_weight_gradients_are_the_same_every_time(kind):
    """Split over the batch, and yet summed in one order."""
    dtype, tf32 = KINDS[kind]
    pattern = Pattern(2, 96, 48, 4)
    dy = normal(LONG_BATCH, pattern.out_features, dtype=dtype)
    x = normal(LONG_BATCH, pattern.in_features, dtype=dtype, seed=1)
    with float32_precision(tf32):
        first, *others = (
            torch.ops.structlayers.ks_weight_grad(dy, x, list(pattern.weight_shape), "batch_first", "auto")
            for _ in range(5)
        )
    assert all(torch.equal(first, other) for other in others)


def test_double_backward():
    layer = KSLinear("(1,3,2,4)(4,2,3,1)", activation="silu", device=DEVICE, dtype=torch.float64)
    x = torch.randn(3, 12, device=DEVICE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


# ---- whole steps


def network(recompute: bool = False, backend: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        KSLinear(Chain.monarch(120, 256, blocks=4), activation="gelu", recompute=recompute, backend=backend),
        KSLinear(Chain.butterfly(256, radix=16), recompute=recompute, backend=backend),
        nn.Linear(256, 10),
    ).to(DEVICE)


def batch(seed: int = 0, n: int = 64) -> tuple[Tensor, Tensor]:
    x = normal(n, 120, seed=seed)
    return x, x[:, :10].argmax(1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_its_type_and_the_weights_theirs(dtype, recompute):
    model, (x, y) = network(recompute), batch()
    with torch.autocast("cuda", dtype=dtype):
        hidden = model[0](x)
        assert torch.get_autocast_dtype("cuda") == dtype
        loss = F.cross_entropy(model[2](model[1](hidden)), y)
    assert hidden.dtype == dtype
    loss.backward()
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_under_gradscaler_skips_the_step(fused):
    model, (x, y) = network(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return float(loss.detach())

    step()
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    losses = [step() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.dtype == torch.float32
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)


def training_step(model: nn.Module, dtype: torch.dtype | None) -> tuple[Callable[[Tensor, Tensor], None], list[Tensor]]:
    """A step of AdamW that a graph can hold, and what it changes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step, list(model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_whole_step_in_a_graph(dtype, recompute, backend):
    """Forward, backward and optimizer, captured once and replayed on other batches: as eager steps."""
    eager, eager_weights = training_step(network(recompute, backend), dtype)
    captured, weights = training_step(network(recompute, backend), dtype)
    x, y = (tensor.clone() for tensor in batch())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(x, y)
    for _ in range(3):
        eager(x, y)
    for seed in (1, 2, 3):
        new_x, new_y = batch(seed)
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        eager(new_x, new_y)
    for start, found, expected in zip(network().parameters(), weights, eager_weights, strict=True):
        # Adam makes as large a step of a gradient near zero, whose sign is rounding, as of any other.
        assert (found - expected).norm() <= 0.02 * (expected - start).norm()


def test_a_step_never_waits_for_the_device():
    step, _ = training_step(network(), torch.bfloat16)
    x, y = batch()
    step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x, y = batch()
    gradients = []
    for checkpointed in (False, True):
        model, own = network(), x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = checkpoint(model, own, use_reentrant=use_reentrant) if checkpointed else model(own)
        F.cross_entropy(z.float(), y).backward()
        gradients.append([own.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, found in zip(*gradients, strict=True):
        # Without gradients, as in the first of two passes, a chain may run by another plan, which rounds elsewhere.
        assert (found - plain).norm() <= tolerance(torch.bfloat16, 1024, 4) * plain.norm()


def test_recomputing_keeps_less_memory():
    """A chain through a wide middle: what lies between its factors is most of what is kept."""

    def kept(recompute: bool) -> int:
        layer = KSLinear("(1,64,2048,1)(1,2048,64,1)", recompute=recompute, device=DEVICE)
        x = normal(4096, 64)
        before = torch.cuda.memory_allocated()
        y = layer(x)
        found = torch.cuda.memory_allocated() - before
        y.sum().backward()
        return found

    assert kept(True) < 0.2 * kept(False)


# ---- the compiler


def structured_gpt() -> nn.Module:
    torch.manual_seed(0)
    model = GPT(256, 32, dim=64, depth=1, heads=2)
    report = swap_linears(model, {"structure": "monarch", "options": {"blocks": 4}, "include": ["blocks.*"]})
    assert len(report.swapped) == 6
    return model.to(DEVICE)


def test_a_compiled_model_is_one_graph_for_every_batch():
    pytest.importorskip("triton")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = structured_gpt()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (3, 4, 9):
        tokens = torch.randint(256, (n, 33), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(n))
        gradients = []
        for run in (compiled, model):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = run(tokens[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        # The gradient of a bias that the softmax of the attention takes out again is nothing but rounding.
        floor = 1e-3 * max(float(expected.norm()) for expected in gradients[1])
        for found, expected in zip(*gradients, strict=True):
            assert (found - expected).norm() <= 0.05 * expected.norm() + floor
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_compilers_own_graphs():
    """``mode="reduce-overhead"`` captures forward and backward; the weights change between replays."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(12):
        x, y = batch()
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(compiled(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_training_loop_in_mixed_precision(precision):
    pl = pytest.importorskip("lightning.pytorch")
    from torch.utils.data import DataLoader, TensorDataset

    from structlayers.lit import LitModule
    from structlayers.lit.callbacks import StepTimer

    x, y = (tensor.cpu() for tensor in batch(n=2048))
    timer = StepTimer()
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_epochs=3,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer],
    )
    module = LitModule(network(), "classification", lr=3e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    trainer.fit(module, loader)
    [metrics] = trainer.test(module, loader, verbose=False)
    # A tenth by chance.
    assert metrics["test/accuracy"] > 0.5
    assert 0 < timer.step_ms < 1000
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
