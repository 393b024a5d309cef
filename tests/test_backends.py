"""One contract for every backend: values and gradients over patterns, layouts, dtypes, strides and batch sizes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structlayers import Layout, Pattern, ks_linear
from structlayers.backends import BACKENDS, available_backends, bmm, check_backend, resolve
from structlayers.errors import BackendError
from structlayers.problem import Problem
from structlayers.tolerances import tolerance

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("batch_first", "batch_last")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """PyTorch's deterministic mode fills fresh tensors with NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def factor_matrix(weight: Tensor) -> Tensor:
    """The dense matrix of a factor, by the index map; differentiable."""
    a, d, b, c = weight.shape
    i, l, j, k = torch.meshgrid(*(torch.arange(size) for size in (a, d, b, c)), indexing="ij")
    matrix = weight.new_zeros(a * b * d, a * c * d)
    return matrix.index_put(((i * b + j) * d + l, (i * c + k) * d + l), weight)


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    distance, size = (value.detach().double() - expected).norm(), expected.norm()
    # An empty batch gives gradients of zero, and they are exact.
    return float(distance if size == 0 else distance / size)


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The same values in other strides; ``"expanded"`` repeats the first slice of every dimension but the last."""
    if kind == "transposed" and tensor.dim() >= 2:
        return tensor.mT.contiguous().mT
    if kind == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if kind == "expanded":
        first = tensor[tuple(slice(0, 1) for _ in tensor.shape[:-1])]
        return first.expand(tensor.shape) if tensor.numel() else tensor
    return tensor.contiguous()


STRIDES = ("contiguous", "transposed", "sliced", "expanded")


def check_contract(backend: str, pattern: Pattern, n: int, layout: str, dtype: torch.dtype, strides, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def features_last(tensor: Tensor) -> Tensor:
        return tensor if layout == "batch_first" else tensor.movedim(0, -1)

    shape = (n, pattern.in_features) if layout == "batch_first" else (pattern.in_features, n)
    out_shape = (n, pattern.out_features) if layout == "batch_first" else (pattern.out_features, n)
    x, w, dy = (
        strided(draw(*s), kind) for s, kind in zip((shape, pattern.weight_shape, out_shape), strides, strict=True)
    )
    x, w, bias = x.requires_grad_(), w.requires_grad_(), draw(pattern.out_features).requires_grad_()
    y = ks_linear(x, w, bias, layout=layout, backend=backend)
    assert y.dtype == dtype
    assert y.is_contiguous()
    grads = torch.autograd.grad(y, (x, w, bias), dy)

    x64, w64, bias64 = (t.detach().double().requires_grad_() for t in (x, w, bias))
    y64 = features_last(x64) @ factor_matrix(w64).T + bias64
    grads64 = torch.autograd.grad(y64, (x64, w64, bias64), features_last(dy).double())

    where = f"{backend} {pattern} n={n} {layout} {dtype} {strides}"
    # The bias is one more term of the sum; each result is rounded once more when it is added.
    assert relative_error(features_last(y), y64.detach()) <= tolerance(dtype, pattern.c + 1, 2), where
    for name, grad, expected, length in zip(
        ("x", "weight", "bias"), grads, grads64, (pattern.b, max(n, 1), max(n, 1)), strict=True
    ):
        assert grad.dtype == dtype, where
        assert relative_error(grad, expected) <= tolerance(dtype, length), f"gradient of {name}: {where}"


def pattern_grid() -> list[Pattern]:
    small = [Pattern(*p) for p in itertools.product((1, 2, 3), (1, 4, 5), (1, 3, 4), (1, 2, 7))]
    odd = [(1, 1, 1, 97), (97, 1, 1, 1), (1, 17, 1, 13), (13, 1, 17, 1), (5, 2, 2, 11), (1, 31, 37, 1), (3, 16, 48, 2)]
    powers = [(1, 2, 2, 32), (32, 2, 2, 1), (4, 2, 2, 8), (1, 16, 8, 8), (8, 8, 16, 1), (2, 32, 16, 4), (6, 12, 3, 4)]
    return random.Random(0).sample(small, 24) + [Pattern(*p) for p in odd + powers]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_contract(backend, layout, dtype):
    draw = random.Random(1)
    for seed, (pattern, n) in enumerate(itertools.product(pattern_grid(), (0, 1, 6))):
        strides = draw.choices(STRIDES, k=3)
        problem = Problem(pattern, n, dtype, "cpu", Layout(layout))
        if backend != "auto" and backend not in available_backends(problem):
            continue
        check_contract(backend, pattern, n, layout, dtype, strides, seed)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    entries=st.tuples(*[st.integers(1, 12)] * 4),
    n=st.integers(0, 20),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES[:2]),
    strides=st.tuples(*[st.sampled_from(STRIDES)] * 3),
)
def test_contract_on_generated_patterns(entries, n, layout, dtype, strides):
    problem = Problem(Pattern(*entries), n, dtype, "cpu", Layout(layout))
    for backend in available_backends(problem):
        check_contract(backend, Pattern(*entries), n, layout, dtype, strides, seed=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_bmm_by_pieces_and_groups(dtype, monkeypatch):
    """Batches that the bmm backend takes in pieces, the last one shorter; small blocks that it takes in groups."""
    monkeypatch.setattr(bmm, "_PIECE", 1000)
    for entries in ((1, 2, 2, 32), (1, 3, 5, 17), (2, 16, 4, 3), (4, 1, 2, 1), (1, 24, 16, 2), (3, 2, 2, 2)):
        for n in (bmm._SMALLEST_GROUPED_BATCH, 75):
            check_contract("bmm", Pattern(*entries), n, "batch_first", dtype, ("contiguous", "sliced", "transposed"), 0)


def test_every_combination_of_strides():
    pattern = Pattern(3, 4, 5, 2)
    problem = Problem(pattern, 7, torch.float64, "cpu", Layout.BATCH_FIRST)
    for backend, layout in itertools.product(available_backends(problem), LAYOUTS):
        for strides in itertools.product(STRIDES, repeat=3):
            check_contract(backend, pattern, 7, layout, torch.float64, strides, seed=2)


def test_bmm_makes_no_copy_of_the_input_without_interleaving():
    x, w = torch.randn(64, 8 * 32), torch.randn(8, 1, 16, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bmm.multiply(x, w, Layout.BATCH_FIRST)
    names = {event.name for event in profile.events()}
    assert "aten::bmm" in names
    assert not names & {"aten::clone", "aten::contiguous", "aten::native_channel_shuffle"}


# ---- the registry


def test_unknown_backend_is_named():
    with pytest.raises(BackendError, match=r"'cublas'.*'auto', 'reference', 'einsum', 'bmm', 'bsr', 'csr', 'dense'"):
        check_backend("cublas")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["csr", "bsr"])
def test_a_backend_says_what_it_cannot_do_before_it_works(backend, dtype):
    problem = Problem(Pattern(2, 3, 4, 5), 6, dtype, "cpu", Layout.BATCH_FIRST)
    assert backend not in available_backends(problem)
    with pytest.raises(BackendError, match=rf"{backend}.*\(2, 3, 4, 5\), n=6.*sparse CPU kernels have no {dtype}"):
        resolve(backend, problem)
    x, w = torch.randn(6, 40).to(dtype), torch.randn(2, 5, 3, 4).to(dtype)
    with pytest.raises(BackendError, match="sparse CPU kernels"):
        ks_linear(x, w, backend=backend)
    # The reason is true: PyTorch itself refuses.
    with pytest.raises(RuntimeError):
        BACKENDS[backend].multiply(x, w, Layout.BATCH_FIRST)


def test_resolve_keeps_what_was_asked_for():
    problem = Problem(Pattern(2, 3, 4, 5), 6, torch.float32, "cpu", Layout.BATCH_LAST)
    assert available_backends(problem) == [name for name in BACKENDS if name != "cuda"]
    for name in available_backends(problem):
        assert resolve(name, problem).name == name
    assert resolve("auto", problem).name in available_backends(problem)


def test_the_compiled_kernels_take_no_cpu_tensor():
    problem = Problem(Pattern(2, 3, 4, 5), 6, torch.float32, "cpu", Layout.BATCH_FIRST)
    reason = BACKENDS["cuda"].reason_against(problem)
    assert reason == "the tensors are on cpu: expected cuda"
    x, w = torch.randn(6, 40), torch.randn(2, 5, 3, 4)
    for call in (lambda: resolve("cuda", problem), lambda: ks_linear(x, w, backend="cuda")):
        with pytest.raises(BackendError, match=rf"'cuda' cannot compute \(2, 3, 4, 5\), n=6.*: {reason}"):
            call()
