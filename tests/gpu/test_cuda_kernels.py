"""The values of the compiled kernels on a GPU over a broad family of shapes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers import Layout, Pattern, ks_linear
from structlayers._extension import built_for_sm90a, why_missing
from structlayers.backends import cuda
from structlayers.backends.tiles import Tile, tiles_for
from structlayers.bench.products import float32_precision
from structlayers.bench.verify import agreement
from structlayers.problem import ACTIVATIONS, Problem
from structlayers.reference import reference
from structlayers.tolerances import tolerance

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else why_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]

DEVICE = torch.device("cuda")
CAPABILITY = (8, 0) if NO_GPU else torch.cuda.get_device_capability()
LAYOUTS = ("batch_first", "batch_last")
KINDS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
EPILOGUES = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
STRIDES = ("contiguous", "transposed", "sliced", "wide", "expanded")


@dataclass(frozen=True)
class Call:
    """One product to check: what the kernel is told, and in which memory its input lies."""

    problem: Problem
    in_features: int
    out_features: int
    bias: bool
    activation: str
    strides: str


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values in other memory; everything around them is NaN."""
    rows, columns = x.shape
    if kind == "transposed":
        return x.T.contiguous().T
    if kind == "sliced":
        around = x.new_full((rows, 2 * columns + 1), float("nan"))
        around[:, 1::2] = x
        return around[:, 1::2]
    if kind == "wide":
        # Rows of another length, beginning at an address that is aligned to nothing.
        around = x.new_full((rows + 2, columns + 3), float("nan"))
        around[1:-1, 1:-2] = x
        return around[1:-1, 1:-2]
    if kind == "expanded":
        return x[:1].expand(rows, columns)
    return x


def poison(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Leave NaN in memory of the output's size, which the allocator hands out next: what nobody writes is seen."""
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float32, device=DEVICE, generator=generator).to(dtype)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """The float64 oracle, batch-first."""
    padded = call.problem.pattern.in_features
    rows = (x if call.problem.layout is Layout.BATCH_FIRST else x.T).double()
    y = reference(F.pad(rows, (0, padded - call.in_features)), weight.double())[:, : call.out_features]
    return EPILOGUES[call.activation](y if bias is None else y + bias.double())


def check(call: Call, tiles: Sequence[Tile], seed: int = 0) -> None:
    problem, pattern, dtype = call.problem, call.problem.pattern, call.problem.dtype
    first = problem.layout is Layout.BATCH_FIRST
    shape = (problem.n, call.in_features) if first else (call.in_features, problem.n)
    out_shape = (problem.n, call.out_features) if first else (call.out_features, problem.n)
    x = strided(draw(*shape, dtype=dtype, seed=seed), call.strides)
    weight = draw(*pattern.weight_shape, dtype=dtype, seed=seed + 1) * pattern.c**-0.5
    bias = draw(call.out_features, dtype=dtype, seed=seed + 2) if call.bias else None
    truth = expected(x, weight, bias, call)
    # Bias is one more term; activations are rounded once more, and where they are flat the error is relative to less.
    bound = tolerance(
        dtype,
        pattern.c + 1,
        1 if call.activation == "none" else 2,
        float32_precision="high" if problem.tf32 else "highest",
    )
    for tile in tiles:
        product = cuda.prepare(problem, call.activation, call.out_features, tile)
        poison(out_shape, dtype)
        y = product(x, weight, bias)
        where = f"{tile.name}: {call}"
        assert (y.shape, y.dtype, y.is_contiguous()) == (out_shape, dtype, True), where
        value = y if first else y.T
        if not truth.any():
            assert not value.any(), where
            continue
        found = agreement(value, truth, bound)
        assert found.agrees, f"{where}: {found}"


SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 32, 33, 48, 61, 64, 65, 96, 127, 128, 130)
BATCHES = (1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257)


def family(kind: str, layout: str, count: int, seed: int) -> Iterator[Call]:
    """Random problems, most of them with sizes that divide nothing."""
    dtype, tf32 = KINDS[kind]
    pick = random.Random(seed)
    for _ in range(count):
        pattern = Pattern(
            pick.choice((1, 1, 2, 3, 5)),
            pick.choice(SIZES),
            pick.choice(SIZES),
            pick.choice((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)),
        )
        problem = Problem(pattern, pick.choice(BATCHES), dtype, "cuda", Layout(layout), tf32, capability=CAPABILITY)
        pads = pick.random() < 0.4
        yield Call(
            problem,
            pick.randint(1, pattern.in_features) if pads else pattern.in_features,
            pick.randint(1, pattern.out_features) if pads else pattern.out_features,
            pick.random() < 0.5,
            pick.choice(ACTIVATIONS),
            pick.choice(STRIDES),
        )


# ---- values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_tile(kind, layout):
    for seed, call in enumerate(family(kind, layout, 60, seed=list(KINDS).index(kind))):
        check(call, tiles_for(call.problem, built_for_sm90a()), seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_aligned_and_large_problems(kind, layout):
    """Several tiles along every index, whole ones and rests; every tile, the vector paths among them."""
    dtype, tf32 = KINDS[kind]
    for entries, n in (
        ((1, 128, 128, 4), 512),
        ((2, 256, 64, 16), 300),
        ((3, 48, 192, 8), 1000),
        ((1, 1024, 1024, 1), 257),
        ((4, 272, 144, 2), 1025),
        ((64, 16, 16, 16), 700),
        ((1, 2, 2, 512), 513),
        ((2, 384, 96, 12), 4096),
    ):
        pattern = Pattern(*entries)
        problem = Problem(pattern, n, dtype, "cuda", Layout(layout), tf32, capability=CAPABILITY)
        call = Call(problem, pattern.in_features, pattern.out_features, True, "none", "contiguous")
        check(call, tiles_for(problem, built_for_sm90a()))


# b, c, d and n of which hardly anything divides anything; 509 and 1021 are weights that no tile keeps.
UNALIGNED = (
    ((1, 61, 61, 2), 300),
    ((4, 127, 61, 3), 1025),
    ((1, 251, 251, 4), 257),
    ((7, 31, 113, 5), 1030),
    ((2, 127, 127, 7), 700),
    ((2, 59, 509, 3), 263),
    ((1, 40, 1021, 7), 270),
    ((1, 61, 40, 8), 2049),
)


# More than the L2 keeps of the weights (in float32 at least): w is fetched once for a group of rows, of which the last
# has fewer tiles than the others.
BEYOND_L2 = (
    ((2, 768, 704, 4), 1300),
    ((2, 384, 648, 8), 1100),
    ((1, 640, 512, 16), 1600),
    ((2, 96, 320, 64), 700),
    ((1, 192, 384, 96), 130),
)


@pytest.mark.parametrize("kind", KINDS)
def test_values_where_weights_outgrow_the_l2(kind):
    dtype, tf32 = KINDS[kind]
    for entries, n in BEYOND_L2:
        pattern = Pattern(*entries)
        problem = Problem(pattern, n, dtype, "cuda", Layout.BATCH_FIRST, tf32, capability=CAPABILITY)
        call = Call(problem, pattern.in_features, pattern.out_features, True, "none", "contiguous")
        check(call, [tile for tile in tiles_for(problem, built_for_sm90a()) if tile.registers])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", ["contiguous", "wide"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_where_nothing_is_made_of_whole_pieces(kind, strides, layout):
    """The chosen tile over several tiles and units; with and without a bias, the ends of features cut off."""
    dtype, tf32 = KINDS[kind]
    for seed, (entries, n) in enumerate(UNALIGNED):
        pattern = Pattern(*entries)
        problem = Problem(pattern, n | 1, dtype, "cuda", Layout(layout), tf32, capability=CAPABILITY)
        for cut, bias, activation in ((0, False, "none"), (5, True, "gelu"), (pattern.d * 11, True, "none")):
            call = Call(problem, pattern.in_features - cut, pattern.out_features - cut, bias, activation, strides)
            check(call, [cuda.tile_of(problem)], seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_of_strides_padding_bias_and_activation(kind):
    dtype, tf32 = KINDS[kind]
    pattern = Pattern(2, 24, 40, 4)
    for layout, strides, bias, activation, pads in itertools.product(
        LAYOUTS, STRIDES, (False, True), ACTIVATIONS, (0, 8, 13)
    ):
        problem = Problem(pattern, 70, dtype, "cuda", Layout(layout), tf32, capability=CAPABILITY)
        call = Call(problem, pattern.in_features - pads, pattern.out_features - pads, bias, activation, strides)
        check(call, [cuda.tile_of(problem)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_biases_in_other_memory(layout):
    x, w = draw(24, 24, dtype=torch.float16), draw(1, 4, 5, 6, dtype=torch.float16)
    bias = draw(20, dtype=torch.float16)
    y = ks_linear(x, w, bias, layout=layout, backend="cuda")
    other_w, other_bias = w.mT.contiguous().mT, torch.stack((bias, bias + 1), 1)[:, 0]
    assert not other_w.is_contiguous() and not other_bias.is_contiguous()
    assert torch.equal(ks_linear(x, other_w, other_bias, layout=layout, backend="cuda"), y)
    # A weight that begins at an odd address.
    shifted = torch.cat((w.new_zeros(1), w.flatten()))[1:].view(w.shape)
    assert torch.equal(ks_linear(x, shifted, bias, layout=layout, backend="cuda"), y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind, layout):
    dtype, _ = KINDS[kind]
    w, bias = draw(1, 4, 5, 6, dtype=dtype), draw(20, dtype=dtype)
    x = draw(0, 24, dtype=dtype) if layout == "batch_first" else draw(24, 0, dtype=dtype)
    y = ks_linear(x, w, bias, layout=layout, backend="cuda")
    assert y.shape == ((0, 20) if layout == "batch_first" else (20, 0))
    torch.cuda.synchronize()


def test_an_empty_batch_has_any_strides():
    """Without elements every tensor is contiguous: a transposed input, and the expanded gradient of a sum."""
    w = draw(1, 4, 5, 6, dtype=torch.float16).requires_grad_()
    x = draw(24, 7, dtype=torch.float16).T[:0].requires_grad_()
    assert x.is_contiguous() and x.stride() == (1, 7)
    dx, dw = torch.autograd.grad(ks_linear(x, w, backend="cuda").sum(), (x, w))
    assert dx.shape == x.shape and torch.equal(dw, torch.zeros_like(w))


def test_float32_is_as_accurate_as_cublas():
    for c in (64, 256, 1024):
        pattern = Pattern(2, 128, c, 4)
        x, w = draw(2048, pattern.in_features, dtype=torch.float32), draw(*pattern.weight_shape, dtype=torch.float32)
        truth = reference(x.double(), w.double())
        with float32_precision(False):
            errors = [float((ks_linear(x, w, backend=name) - truth).norm()) for name in ("cuda", "bmm")]
        assert errors[0] <= 2 * errors[1], f"c = {c}"


def test_tf32_only_where_it_is_allowed():
    x, w = draw(512, 1024, dtype=torch.float32), draw(1, 4, 256, 256, dtype=torch.float32)
    truth = reference(x.double(), w.double())
    errors = {}
    for tf32 in (False, True):
        with float32_precision(tf32):
            errors[tf32] = float((ks_linear(x, w, backend="cuda") - truth).norm() / truth.norm())
    assert errors[False] < 2e-6
    assert 1e-5 < errors[True] < 1e-3


def test_extreme_values():
    """Infinities and NaN stay in their rows; large float32 numbers do not overflow on the way through the split."""
    x, w = draw(40, 64, dtype=torch.float32), draw(1, 2, 32, 32, dtype=torch.float32)
    for factor in (1e30, 1e-30):
        y = ks_linear(x * factor, w, backend="cuda")
        assert agreement(y / factor, reference(x.double(), w.double()), tolerance(torch.float32, 32)).agrees
    x[3, 5], x[7, 9] = float("inf"), float("nan")
    y = ks_linear(x, w, backend="cuda")
    bad = ~torch.isfinite(y).all(1)
    assert bad.nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [(2, 32, 32, 1), (2, 64, 64, 4), (1, 64, 64, 16), (1, 61, 61, 3)], ids=str)
def test_nan_of_all_bits_stays(pattern, layout, tf32):
    """A GPU makes NaN of all bits, which rounding as an integer carries over into the sign."""
    pattern = Pattern(*pattern)
    x, w = draw(300, pattern.in_features, dtype=torch.float32), draw(*pattern.weight_shape, dtype=torch.float32)
    x.view(torch.int32)[3, 5], x.view(torch.int32)[7, 9] = 0x7FFFFFFF, -1
    with float32_precision(tf32):
        y = ks_linear(x if layout == "batch_first" else x.T.contiguous(), w, layout=layout, backend="cuda")
    bad = ~torch.isfinite(y if layout == "batch_first" else y.T).all(1)
    assert bad.nonzero().flatten().tolist() == [3, 7]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_two_to_the_31(layout):
    pattern, n = Pattern(2, 64, 64, 8), 2**21 + 5
    shape = (n, pattern.in_features) if layout == "batch_first" else (pattern.in_features, n)
    if torch.cuda.mem_get_info()[0] < 4 * 2 * shape[0] * shape[1]:
        pytest.skip("too little free GPU memory")
    x, w = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16), draw(*pattern.weight_shape, dtype=torch.bfloat16)
    y = ks_linear(x, w, layout=layout, backend="cuda")
    for rows in (slice(0, 64), slice(n // 2, n // 2 + 64), slice(n - 64, n)):
        part, out = (x[rows], y[rows]) if layout == "batch_first" else (x[:, rows].T, y[:, rows].T)
        found = agreement(out, reference(part.double(), w.double()), tolerance(torch.bfloat16, 64))
        assert found.agrees, str(found)
