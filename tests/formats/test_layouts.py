"""Importers and exporters, against what the other projects compute, written as loops from their definitions."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from structlayers import Chain, FactoredMatrix, KSLinear, export_weights, import_weights
from structlayers.errors import ChainError, ShapeError
from structlayers.formats import (
    PermutedLinear,
    from_blast,
    from_btt,
    from_butterfly,
    from_ksmm,
    from_monarch,
    to_blast,
    to_btt,
    to_butterfly,
    to_ksmm,
    to_monarch,
)
from structlayers.reference import reference

RANDOM = np.random.default_rng(0)


def draw(*shape: int, dtype: type = np.float64) -> Tensor:
    values = RANDOM.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * RANDOM.standard_normal(shape)
    return torch.from_numpy(values.astype(dtype))


def apply(matrix: FactoredMatrix, x: Tensor) -> Tensor:
    """``x W^T`` by the oracle and the two permutations, real or complex."""
    if matrix.input_permutation is not None:
        x = x[:, matrix.input_permutation]
    y = torch.nn.functional.pad(x, (0, matrix.chain.padded_in_features - x.shape[1]))
    for weight in reversed(matrix.weights):
        y = reference(y, weight)
    y = y[:, : matrix.chain.out_features]
    return y if matrix.output_permutation is None else y[:, matrix.output_permutation]


def check(matrix: FactoredMatrix, foreign_matrix: np.ndarray) -> None:
    """The matrix, applied and as a dense one and as a layer with a bias, is the foreign one."""
    expected = torch.from_numpy(foreign_matrix)
    assert (matrix.out_features, matrix.in_features) == tuple(expected.shape)
    x = torch.randn(3, matrix.in_features, dtype=expected.dtype)
    torch.testing.assert_close(apply(matrix, x), x @ expected.T)
    torch.testing.assert_close(matrix.to_dense(), expected)
    if not expected.is_complex():
        bias = torch.randn(matrix.out_features, dtype=expected.dtype)
        layer = matrix.layer(bias, activation="silu")
        torch.testing.assert_close(layer(x), torch.nn.functional.silu(x @ expected.T + bias))
        torch.testing.assert_close(layer.bias, bias)
        last = matrix.layer(bias, layout="batch_last")
        torch.testing.assert_close(last(x.T), (x @ expected.T + bias).T)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit: NaN equals itself and -0 differs from 0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.flatten().clone().view(torch.uint8), right.flatten().clone().view(torch.uint8))


def check_round_trip(name: str, tensors: tuple, **options) -> None:
    exported = export_weights(name, import_weights(name, tensors, **options))
    back = [tensor for tensor in exported if isinstance(tensor, Tensor)]
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    assert len(back) == len(given)
    assert all(same_bits(a, b) for a, b in zip(back, given, strict=True))
    assert all(tensor.is_contiguous() for tensor in back)


# ---- what each project computes, as a matrix


def monarch_matrix(w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    first = np.zeros((k * q, k * p))
    for block in range(k):
        first[block * q : (block + 1) * q, block * p : (block + 1) * p] = w1[block]
    # "(r l) -> (l r)": the second block-diagonal matrix reads the transpose of the middle.
    transpose = np.zeros((l * r, k * q))
    for i, j in itertools.product(range(r), range(l)):
        transpose[j * r + i, i * l + j] = 1
    second = np.zeros((l * s, l * r))
    for block in range(l):
        second[block * s : (block + 1) * s, block * r : (block + 1) * r] = w2[block]
    # "(l s) -> (s l)"
    back = np.zeros((s * l, l * s))
    for i, j in itertools.product(range(l), range(s)):
        back[j * l + i, i * s + j] = 1
    return back @ second @ transpose @ first


def btt_matrix(core1: np.ndarray, core2: np.ndarray) -> np.ndarray:
    (m1, m0, middle), (n0, _, n1) = core1.shape, core2.shape
    rank = middle // n0
    matrix = np.zeros((n0 * n1, m1 * m0))
    for i0, i1, j0, j1, t in itertools.product(range(m0), range(m1), range(n0), range(n1), range(rank)):
        matrix[j0 * n1 + j1, i1 * m0 + i0] += core1[i1, i0, j0 * rank + t] * core2[j0, i1 * rank + t, j1]
    return matrix


def butterfly_matrix(twiddle: np.ndarray, increasing_stride: bool) -> np.ndarray:
    stacks, blocks, log_n = twiddle.shape[:3]
    n = 2**log_n
    result = np.zeros((stacks * n, n), dtype=twiddle.dtype)
    for stack in range(stacks):
        product = np.eye(n, dtype=twiddle.dtype)
        increasing = increasing_stride
        for block in range(blocks):
            for step in range(log_n):
                stride = 2**step if increasing else 2 ** (log_n - 1 - step)
                factor = np.zeros((n, n), dtype=twiddle.dtype)
                for pair in range(n // 2):
                    low = pair // stride * 2 * stride + pair % stride
                    for j, k in itertools.product(range(2), range(2)):
                        factor[low + j * stride, low + k * stride] = twiddle[stack, block, step, pair, j, k]
                product = factor @ product
            increasing = not increasing
        result[stack * n : (stack + 1) * n] = product
    return result


def ksmm_matrix(weights: list[np.ndarray]) -> np.ndarray:
    product = np.eye(weights[0].shape[0] * weights[0].shape[2] * weights[0].shape[3])
    for weight in weights:
        a, b, c, d = weight.shape
        factor = np.zeros((a * b * d, a * c * d))
        for i, j, k, l in itertools.product(range(a), range(b), range(c), range(d)):
            factor[(i * b + j) * d + l, (i * c + k) * d + l] = weight[i, j, k, l]
        product = factor @ product
    return product


def blast_matrix(B: np.ndarray, D: np.ndarray, C: np.ndarray) -> np.ndarray:
    return np.block([[B[i] @ np.diag(D[i, j]) @ C[j] for j in range(len(C))] for i in range(len(B))])


# ---- Monarch

MONARCHS = [
    ((4, 4, 4), (4, 4, 4)),
    ((4, 8, 6), (4, 5, 8)),
    # Not chainable: k does not divide q.
    ((4, 6, 3), (4, 7, 6)),
    # Another number of blocks, in both directions.
    ((4, 6, 3), (3, 5, 8)),
    ((2, 15, 7), (6, 1, 5)),
    # Narrower than its blocks.
    ((5, 2, 3), (5, 3, 2)),
    ((1, 7, 3), (1, 2, 7)),
]


@pytest.mark.parametrize(("shape1", "shape2"), MONARCHS)
def test_monarch(shape1, shape2):
    w1, w2 = draw(*shape1), draw(*shape2)
    matrix = from_monarch(w1, w2)
    k, q, p = shape1
    l, s, r = shape2
    assert matrix.chain == Chain([(1, s, r, l), (k, q, p, 1)])
    dense = monarch_matrix(w1.numpy(), w2.numpy())
    check(matrix, dense)
    check_round_trip("monarch", (w1, w2))
    # Padded input, cropped output.
    sizes = (max(1, k * p - 2), max(1, l * s - 1))
    padded = from_monarch(w1, w2, *sizes)
    check(padded, dense[: sizes[1], : sizes[0]])
    assert same_bits(to_monarch(padded).blkdiag1, w1)


def test_monarch_shares_its_memory_and_is_differentiable():
    w1, w2 = draw(4, 8, 3).requires_grad_(), draw(4, 5, 8)
    matrix = from_monarch(w1, w2)
    assert matrix.weights[0].data_ptr() == w2.data_ptr()
    (gradient,) = torch.autograd.grad(matrix.to_dense().sum(), w1)
    assert gradient.shape == w1.shape


def test_a_structured_layer_as_monarch():
    """Any chain of that form goes out, whoever made it; others do not, and say why."""
    layer = KSLinear(Chain.monarch(10, 14, blocks=3, rank=2), dtype=torch.float64)
    w1, w2 = export_weights("monarch", layer)
    assert (w1.shape, w2.shape) == ((3, 6, 4), (3, 5, 6))
    np.testing.assert_allclose(monarch_matrix(w1.numpy(), w2.numpy())[:14, :10], layer.to_dense().detach().numpy())
    assert not w1.requires_grad
    for spec in ("(2,3,4,2)(4,4,2,1)", "(1,4,4,2)(2,2,3,2)", "(1,4,4,1)", "(1,2,2,4)(2,2,2,2)(4,2,2,1)"):
        with pytest.raises(ChainError, match=r"no monarch form: expected two factors \(1, s, r, l\)\(k, q, p, 1\)"):
            to_monarch(KSLinear(spec))


# ---- BTT

BTTS = [
    # (m1, m0, n0, n1, rank)
    (4, 4, 4, 4, 1),
    (3, 5, 2, 7, 1),
    (3, 5, 2, 7, 3),
    (5, 3, 7, 2, 2),
    (1, 6, 4, 3, 2),
    (6, 1, 1, 3, 2),
    (2, 3, 5, 1, 4),
]


@pytest.mark.parametrize(("m1", "m0", "n0", "n1", "rank"), BTTS)
def test_btt(m1, m0, n0, n1, rank):
    core1, core2 = draw(m1, m0, n0 * rank), draw(n0, m1 * rank, n1)
    matrix = from_btt(core1, core2)
    assert matrix.chain == Chain([(1, n1, m1 * rank, n0), (m1, rank * n0, m0, 1)])
    assert matrix.chain.is_chainable
    check(matrix, btt_matrix(core1.numpy(), core2.numpy()))
    check_round_trip("btt", (core1, core2))
    assert (matrix.output_permutation is None) == (n0 == 1 or n1 == 1)
    assert isinstance(matrix.layer(), KSLinear if matrix.output_permutation is None else PermutedLinear)


def test_btt_with_permutations_of_its_own():
    core1, core2 = draw(3, 5, 2 * 2), draw(2, 3 * 2, 7)
    dense = btt_matrix(core1.numpy(), core2.numpy())
    inputs, outputs = torch.randperm(15), torch.randperm(14)
    # y = btt(x[inputs])[outputs]
    expected = np.zeros_like(dense)
    for column, source in enumerate(inputs.tolist()):
        expected[:, source] = dense[outputs.numpy(), column]
    check(from_btt(core1, core2, inputs, outputs), expected)
    check_round_trip("btt", (core1, core2, inputs, outputs))
    check(from_btt(core1, core2, inputs.tolist()), dense[:, inputs.argsort().numpy()])
    back = to_btt(from_btt(core1, core2, list(range(15)), torch.arange(14)))
    assert back.input_permutation is None and back.output_permutation is None


def test_a_plain_chain_as_btt_names_its_permutation():
    layer = KSLinear(Chain.btt(15, 12, rank=2), dtype=torch.float64)
    core1, core2, inputs, outputs = export_weights("btt", layer)
    assert inputs is None
    dense = btt_matrix(core1.numpy(), core2.numpy())[outputs.numpy()]
    np.testing.assert_allclose(dense, layer.to_dense().detach().numpy())
    check(from_btt(core1, core2, inputs, outputs), dense)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("(2,3,4,2)(4,4,2,1)", "expected two factors"),
        ("(1,3,4,3)(3,4,2,1)", r"left factor's c = 4 to be a multiple of m1 = 3"),
        ("(1,3,4,2)(4,2,2,1)[:6,:7]", "expected no padding, found 7 -> 6 of 8 -> 6"),
    ],
)
def test_chains_that_are_no_btt(spec, reason):
    with pytest.raises(ChainError, match=reason):
        to_btt(KSLinear(spec))


def test_btt_refuses_to_drop_outputs():
    matrix = from_btt(draw(2, 3, 4), draw(4, 2, 3))
    with pytest.raises(ChainError, match="expected all 12 outputs, found 5"):
        to_btt(dataclasses.replace(matrix, output_permutation=matrix.output_permutation[:5]))


# ---- butterflies


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("increasing_stride", [True, False])
@pytest.mark.parametrize(
    ("stacks", "blocks", "log_n"), [(1, 1, 1), (1, 1, 4), (3, 1, 3), (1, 2, 3), (2, 3, 2), (3, 2, 1), (5, 4, 3)]
)
def test_butterfly(stacks, blocks, log_n, increasing_stride, dtype):
    n = 2**log_n
    twiddle = draw(stacks, blocks, log_n, n // 2, 2, 2, dtype=dtype)
    dense = butterfly_matrix(twiddle.numpy(), increasing_stride)
    matrix = from_butterfly(twiddle, increasing_stride)
    assert matrix.chain.n_params == twiddle.numel()
    check(matrix, dense)
    check_round_trip("butterfly", (twiddle, increasing_stride))
    sizes = (n - 1, stacks * n - 1)
    cropped = from_butterfly(twiddle, increasing_stride, *sizes)
    check(cropped, dense[: sizes[1], : sizes[0]])
    back = to_butterfly(cropped)
    assert same_bits(back.twiddle, twiddle)
    # With one step per block both directions are one, so that the flag may differ but not the function.
    assert back.increasing_stride == increasing_stride or n == 2
    check(from_butterfly(*back, *sizes), dense[: sizes[1], : sizes[0]])


def test_an_increasing_butterfly_is_the_named_chain():
    matrix = from_butterfly(draw(1, 1, 4, 8, 2, 2), in_features=13, out_features=11)
    assert matrix.chain == Chain.butterfly(13, out_features=11)
    assert matrix.output_permutation is None and isinstance(matrix.layer(), KSLinear)
    assert from_butterfly(draw(3, 1, 4, 8, 2, 2)).chain.is_chainable
    layer = KSLinear(Chain.butterfly(13), dtype=torch.float64)
    twiddle, increasing_stride = export_weights("butterfly", layer)
    assert increasing_stride
    dense = butterfly_matrix(twiddle.numpy(), True)[:13, :13]
    np.testing.assert_allclose(dense, layer.to_dense().detach().numpy())


def test_complex_twiddles_stored_as_pairs_and_a_bit_reversal():
    """The DFT: a bit reversal, then butterflies of increasing stride; the twiddle kept as real pairs."""
    log_n, n = 4, 16
    twiddle = torch.empty(1, 1, log_n, n // 2, 2, 2, dtype=torch.complex128)
    for step, pair in itertools.product(range(log_n), range(n // 2)):
        stride = 2**step
        root = complex(np.exp(-1j * math.pi * (pair % stride) / stride))
        twiddle[0, 0, step, pair] = torch.tensor([[1, root], [1, -root]])
    matrix = from_butterfly(torch.view_as_real(twiddle))
    reversal = [int(f"{i:04b}"[::-1], 2) for i in range(n)]
    dft = dataclasses.replace(matrix, input_permutation=torch.tensor(reversal))
    x = draw(3, n, dtype=np.complex128)
    torch.testing.assert_close(apply(dft, x), torch.fft.fft(x))
    assert same_bits(to_butterfly(matrix).twiddle, twiddle)
    with pytest.raises(ChainError, match="increasing strides: its input is permuted"):
        to_butterfly(dft)
    with pytest.raises(ShapeError, match=r"weights of torch\.complex128: expected a floating-point dtype"):
        matrix.layer()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("(1,3,3,3)(3,3,3,1)", "expected a padded input of a power of 2, at least 2, found 9"),
        ("(1,3,1,1)", "at least 2, found 1"),
        ("(1,6,4,1)", "expected a multiple of 4 rows and of 2 factors, found 6 and 1"),
        ("(1,4,4,1)", "a multiple of 4 rows and of 2 factors, found 4 and 1"),
        ("(1,4,4,1)(1,4,4,1)", r"increasing strides: factor 2 is \(1, 4, 4, 1\), expected \(2, 2, 2, 1\); decreasing"),
        ("(1,4,2,2)(2,2,2,1)", r"factor 2 is \(2, 2, 2, 1\), expected \(2, 4, 2, 1\)"),
    ],
)
def test_chains_that_are_no_butterfly(spec, reason):
    with pytest.raises(ChainError, match=reason):
        to_butterfly(KSLinear(spec))


def test_butterflies_in_another_order_are_refused():
    matrix = from_butterfly(draw(3, 1, 2, 2, 2, 2))
    with pytest.raises(ChainError, match="its outputs are not in the order of 3 stacks"):
        to_butterfly(dataclasses.replace(matrix, output_permutation=None))
    single = from_butterfly(draw(1, 1, 2, 2, 2, 2))
    with pytest.raises(ChainError, match="its output is permuted"):
        to_butterfly(dataclasses.replace(single, output_permutation=torch.tensor([1, 0, 2, 3])))


# ---- ksmm


@pytest.mark.parametrize(
    "patterns",
    [
        [(3, 5, 7, 2)],
        [(6, 64, 64, 1), (1, 76, 192, 2)],
        [(4, 6, 3, 1), (3, 5, 8, 1), (1, 2, 3, 5)],
        # Composable, not chainable.
        [(1, 3, 5, 4), (4, 2, 3, 1)],
    ],
)
def test_ksmm(patterns):
    weights = [draw(*pattern) for pattern in patterns]
    matrix = from_ksmm(weights)
    assert matrix.chain == Chain(reversed(patterns))
    check(matrix, ksmm_matrix([weight.numpy() for weight in weights]))
    check_round_trip("ksmm", tuple(weights))
    assert [tuple(weight.shape) for weight in to_ksmm(matrix)] == patterns


def test_ksmm_has_neither_padding_nor_permutations():
    with pytest.raises(ChainError, match="expected no padding, found 3 -> 4 of 4 -> 4"):
        to_ksmm(KSLinear("(1,4,4,1)[:4,:3]"))
    with pytest.raises(ChainError, match=r"ksmm form: .* found output_permutation = \[0, 2, 4, 6, 8, 10, 1, 3, ...\]"):
        to_ksmm(from_btt(draw(3, 5, 2), draw(2, 3, 6)))


# ---- BLAST


@pytest.mark.parametrize(
    ("b1", "b2", "p", "q", "r"), [(2, 2, 4, 4, 2), (3, 5, 2, 7, 3), (5, 3, 7, 2, 6), (1, 4, 3, 2, 5), (4, 1, 2, 3, 1)]
)
def test_blast(b1, b2, p, q, r):
    tensors = draw(b1, p, r), draw(b1, b2, r), draw(b2, r, q)
    matrix = from_blast(*tensors)
    assert matrix.chain == Chain([(b1, p, r, 1), (1, b1, b2, r), (b2, r, q, 1)])
    check(matrix, blast_matrix(*(tensor.numpy() for tensor in tensors)))
    check_round_trip("blast", tensors)
    # The other layout of C, through a view.
    B, D, C = tensors
    assert torch.equal(from_blast(B, D, C.transpose(1, 2).contiguous().transpose(1, 2)).to_dense(), matrix.to_dense())


@pytest.mark.parametrize(
    "spec", ["(2,3,4,1)(2,4,3,1)", "(2,3,4,1)(1,2,3,4)(3,4,5,1)[:6,:14]", "(2,3,4,1)(2,4,4,1)(2,4,5,1)"]
)
def test_chains_that_are_no_blast(spec):
    with pytest.raises(ChainError, match=r"has no blast form: expected (three factors|no padding)"):
        to_blast(KSLinear(spec))
