"""The fused kernel of a chainable pair on a GPU: values over a broad family of pairs, and what it does at the edges."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers import Layout, Pattern, ks_chain
from structlayers._extension import built_for_sm90a, why_missing
from structlayers.backends import fused
from structlayers.backends.fused import PairProblem, choose_pair_tile, pair_tiles
from structlayers.problem import ACTIVATIONS, Problem
from structlayers.reference import reference
from structlayers.tolerances import tolerance


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the fused kernel needs compute capability 9.0"
    return why_missing() or (None if built_for_sm90a() else "built without code for sm_90a")


NO_KERNEL = why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_KERNEL is not None, reason=str(NO_KERNEL))]

DEVICE = torch.device("cuda")
EPILOGUES = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def pair_of(groups: int, alpha: int, delta: int, rank: int, b: int, c: int) -> tuple[Pattern, Pattern]:
    return Pattern(groups, b, alpha * rank, delta), Pattern(groups * alpha, delta * rank, c, 1)


# Every link rank class (1, 2, even, multiples of 8, odd), every way of writing y (delta), clusters of 1 to 8.
FIXED = [
    (1, 4, 4, 48, 192, 192),
    (1, 4, 4, 64, 256, 256),
    (1, 16, 16, 4, 64, 256),
    (1, 32, 32, 1, 32, 32),
    (1, 64, 64, 1, 64, 64),
    (1, 64, 64, 2, 128, 128),
    (1, 16, 16, 8, 128, 128),
    (3, 8, 8, 1, 40, 24),
    (2, 8, 2, 3, 17, 40),
    (1, 8, 1, 5, 100, 8),
    (1, 1, 1, 40, 512, 1024),
    (2, 3, 4, 8, 33, 72),
    (1, 8, 24, 1, 50, 64),
    (1, 16, 32, 3, 20, 104),
    (1, 2, 2, 200, 300, 264),
    # Those whose intermediate stays in registers.
    (1, 4, 4, 16, 64, 64),
    (1, 4, 4, 24, 96, 384),
    (2, 4, 4, 24, 34, 72),
    (1, 4, 4, 32, 130, 40),
    (3, 4, 4, 48, 50, 96),
    (2, 4, 4, 64, 66, 320),
]


def random_pairs(count: int, seed: int) -> list[tuple[int, int, int, int, int, int]]:
    """Pairs that the kernel takes, drawn over everything it tells apart."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        alpha, delta = draw.choice([1, 2, 3, 4, 7, 8, 16, 24, 32, 64]), draw.choice([1, 2, 4, 8, 16, 24, 32, 40, 64])
        rank = draw.choice([1, 2, 3, 4, 6, 8, 16, 24, 56, 130])
        entries = (draw.choice([1, 1, 2, 5]), alpha, delta, rank, draw.randint(1, 150), 8 * draw.randint(1, 40))
        left, right = pair_of(*entries)
        if max(left.out_features, left.in_features, right.in_features) > 20_000 or left.c % 8:
            continue
        single = Problem(right, 64, torch.bfloat16, "cuda", Layout.BATCH_FIRST, False, 0, (9, 0))
        if pair_tiles(PairProblem.of(left.link(right), single)):
            found.append(entries)
    return found


def tensors(left: Pattern, right: Pattern, n: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, ...]:
    """x among NaN, weights that keep the variance, a bias or None."""
    around = torch.full((n + 1, right.in_features + 8), float("nan"), device=DEVICE, dtype=dtype)
    x = around[:n, : right.in_features]
    x.copy_(torch.randn(n, right.in_features, device=DEVICE))
    weights = [(torch.randn(p.weight_shape, device=DEVICE) / p.c**0.5).to(dtype) for p in (left, right)]
    return x, *weights, torch.randn(left.out_features, device=DEVICE).to(dtype) if bias else None


def oracle(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    z = reference(reference(x.double(), right.double()), left.double())
    return EPILOGUES[activation](z if bias is None else z + bias.double())


def check(entries: tuple[int, ...], n: int, dtype: torch.dtype, activation: str, bias: bool, every_tile: bool) -> int:
    left, right = pair_of(*entries)
    link = left.link(right)
    assert link is not None
    problem = PairProblem.of(link, Problem.on(DEVICE, right, n, dtype, Layout.BATCH_FIRST))
    assert fused.reason_against(problem) is None
    x, w_left, w_right, b = tensors(left, right, n, dtype, bias)
    expected = oracle(x, w_left, w_right, b, activation)
    tiles = pair_tiles(problem) if every_tile else [choose_pair_tile(problem)]
    for tile in tiles:
        # The allocator hands this memory out next: what nobody writes is seen.
        torch.full((n, left.out_features), float("nan"), device=DEVICE, dtype=dtype)
        product = torch.ops.structlayers.cuda_pair
        number = ACTIVATIONS.index(activation)
        y = product(x, w_left, w_right, b, left.out_features, False, number, False, tile.number)
        error = (y.double() - expected).norm() / expected.norm()
        bound = tolerance(dtype, max(left.c, right.c), 2)
        assert float(error) <= bound, (
            f"{entries}, n={n}, {dtype}, {activation}, {tile}: {float(error):.2e} > {bound:.2e}"
        )
    return len(tiles)


@pytest.mark.parametrize("n", [1, 63, 65, 1000])
@pytest.mark.parametrize("entries", FIXED, ids=str)
def test_values(entries, n):
    ran = 0
    for k, dtype in enumerate((torch.float16, torch.bfloat16)):
        choice = FIXED.index(entries) + n + k
        ran += check(entries, n, dtype, ACTIVATIONS[choice % len(ACTIVATIONS)], choice % 2 == 0, n in (65, 1000))
    assert ran >= 2


def test_random_pairs():
    torch.manual_seed(0)
    for k, entries in enumerate(random_pairs(60, seed=7)):
        dtype = (torch.float16, torch.bfloat16)[k % 2]
        check(entries, 1 + 97 * k % 700, dtype, ACTIVATIONS[k % len(ACTIVATIONS)], k % 3 == 0, True)


def test_many_tiles_of_the_batch():
    """More tiles than CTAs, so that a CTA takes several in a row."""
    pairs = [(1, 4, 4, 48, 192, 192), (1, 64, 64, 1, 64, 64), (1, 32, 32, 1, 32, 32), (2, 2, 2, 24, 40, 64)]
    for entries in [*pairs, (2, 4, 4, 24, 96, 96), (1, 4, 4, 64, 256, 256)]:
        check(entries, 20_000, torch.bfloat16, "none", True, True)


@pytest.mark.parametrize(
    ("in_features", "out_features"), [(760, 768), (768, 761), (768, 760), (448, 3), (448, 8), (8, 768)]
)
def test_logical_sizes(in_features, out_features):
    left, right = pair_of(1, 4, 4, 48, 192, 192)
    x, w_left, w_right, b = tensors(left, right, 300, torch.bfloat16, True)
    cut, bias = x[:, :in_features], b[:out_features].contiguous()
    padded = F.pad(cut, (0, right.in_features - in_features))
    expected = oracle(padded, w_left, w_right, None, "none")[:, :out_features] + bias.double()
    problem = Problem.on(DEVICE, right, 300, torch.bfloat16, Layout.BATCH_FIRST)
    link = left.link(right)
    pair = PairProblem.of(link, problem, in_features, out_features)
    assert fused.reason_against(pair) is None
    y = fused.prepare(pair, "none")(cut, w_left, w_right, bias)
    assert y.shape == (300, out_features)
    assert float((y.double() - expected).norm() / expected.norm()) <= tolerance(torch.bfloat16, 192, 2)


def test_as_close_as_two_kernels():
    left, right = pair_of(1, 16, 16, 4, 64, 256)
    x, w_left, w_right, _ = tensors(left, right, 2000, torch.bfloat16, False)
    expected = oracle(x, w_left, w_right, None, "none")
    pair = PairProblem.of(left.link(right), Problem.on(DEVICE, right, 2000, torch.bfloat16, Layout.BATCH_FIRST))
    one = fused.prepare(pair, "none")(x, w_left, w_right, None)
    two = ks_chain(ks_chain(x, [w_right], backend="cuda"), [w_left], backend="cuda")
    errors = [float((y.double() - expected).norm() / expected.norm()) for y in (one, two)]
    assert errors[0] <= 1.1 * errors[1]


def test_empty_batch_and_unaligned_input():
    left, right = pair_of(1, 4, 4, 8, 32, 64)
    x, w_left, w_right, _ = tensors(left, right, 100, torch.float16, False)
    pair = PairProblem.of(left.link(right), Problem.on(DEVICE, right, 100, torch.float16, Layout.BATCH_FIRST))
    product = fused.prepare(pair, "none")
    assert product(x[:0], w_left, w_right, None).shape == (0, left.out_features)
    around = torch.full((100, right.in_features + 3), float("nan"), device=DEVICE, dtype=torch.float16)
    around[:, 3:] = x
    assert torch.equal(product(around[:, 3:], w_left, w_right, None), product(x, w_left, w_right, None))


def test_in_a_graph():
    left, right = pair_of(1, 64, 64, 1, 64, 64)
    x, w_left, w_right, _ = tensors(left, right, 500, torch.bfloat16, False)
    pair = PairProblem.of(left.link(right), Problem.on(DEVICE, right, 500, torch.bfloat16, Layout.BATCH_FIRST))
    product = fused.prepare(pair, "none")
    expected = product(x, w_left, w_right, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, w_left, w_right, None)
    x.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, -expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda t: t.float()}, "float16 and bfloat16"),
        ({"right": lambda t: t[:, :, :, :60].contiguous()}, "chainable|features|16-byte"),
        ({"left": lambda t: t[:, :, :, :-8].contiguous()}, "chainable"),
        ({"x": lambda t: t[:, :-3]}, "16-byte"),
    ],
)
def test_refusals_name_the_reason(change, message):
    left, right = pair_of(1, 4, 4, 8, 32, 64)
    x, w_left, w_right, _ = tensors(left, right, 100, torch.float16, False)
    given = {"x": x, "left": w_left, "right": w_right}
    for name, alter in change.items():
        given[name] = alter(given[name])
    if "x" in change and given["x"].shape == x.shape:
        given = {name: tensor.float() for name, tensor in given.items()}
    elif "x" in change:
        given["x"] = given["x"].contiguous()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.structlayers.cuda_pair(
            given["x"], given["left"], given["right"], None, left.out_features, False, 0, False, 0
        )
    # The process goes on.
    assert torch.isfinite(ks_chain(x, [w_left, w_right])).all()
