"""Patterns and chains against explicit Kronecker matrices."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import warnings

import numpy as np
import pytest

from structlayers import Chain, Pattern
from structlayers.errors import ChainError


def support(pattern: Pattern) -> np.ndarray:
    a, b, c, d = pattern
    return np.kron(np.kron(np.eye(a), np.ones((b, c))), np.eye(d))


def product_support(chain: Chain) -> np.ndarray:
    """Where the logical part of a chain's matrix can be non-zero, and through how many paths."""
    out = support(chain[0])
    for pattern in chain.patterns[1:]:
        out = out @ support(pattern)
    return out[: chain.out_features, : chain.in_features]


PATTERNS = [Pattern(*p) for p in itertools.product((1, 2, 3), (1, 2, 5), (1, 3, 4), (1, 2, 7))]

# ---- one pattern


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{tuple(p)}")
def test_pattern_sizes_match_the_kronecker_matrix(pattern):
    matrix = support(pattern)
    assert matrix.shape == (pattern.out_features, pattern.in_features)
    assert pattern.nnz == np.count_nonzero(matrix)
    assert pattern.density == pytest.approx(np.count_nonzero(matrix) / matrix.size)
    assert np.array_equal(support(pattern.T), matrix.T)
    a, b, c, d = pattern
    assert pattern.weight_shape == (a, d, b, c)
    assert pattern.n_blocks == a * d
    assert Pattern.of_weight(pattern.weight_shape) == pattern


def test_pattern_costs():
    pattern = Pattern(2, 3, 4, 5)
    assert pattern.flops(7) == 2 * 7 * 120
    # 7 rows of 40 features read, 7 of 30 written, 120 weights read, 2 bytes each
    assert pattern.bytes(7, 2) == (7 * 40 + 7 * 30 + 120) * 2


def test_pattern_is_a_printable_sortable_value():
    assert str(Pattern(2, 3, 4, 5)) == "I2 (x) 1[3x4] (x) I5"
    assert tuple(Pattern(2, 3, 4, 5)) == (2, 3, 4, 5)
    assert len({Pattern(1, 2, 3, 4), Pattern(1, 2, 3, 4)}) == 1
    assert sorted([Pattern(2, 1, 1, 1), Pattern(1, 9, 9, 9)])[0].a == 1


@pytest.mark.parametrize("entries", [(0, 1, 1, 1), (1, -2, 1, 1), (1, 1, 2.0, 1), (1, 1, 1, True), (1, "2", 1, 1)])
def test_pattern_refuses_what_is_no_positive_integer(entries):
    wrong = next(e for e in entries if type(e) is not int or e < 1)
    with pytest.raises(ChainError, match=f"= {wrong!r}: expected an integer >= 1".replace(".", r"\.")):
        Pattern(*entries)


def test_pattern_of_weight_refuses_other_ranks():
    with pytest.raises(ChainError, match=r"\(3, 4\).*four dimensions"):
        Pattern.of_weight((3, 4))


# ---- pairs


def composable_pairs(limit: int = 4000) -> list[tuple[Pattern, Pattern]]:
    values = (1, 2, 3, 4, 6)
    lefts = [Pattern(*p) for p in itertools.product(values, (1, 2, 3), values, values)]
    rights = [Pattern(*p) for p in itertools.product(values, values, (1, 2, 3), values)]
    by_rows: dict[int, list[Pattern]] = {}
    for right in rights:
        by_rows.setdefault(right.out_features, []).append(right)
    pairs = [
        (left, right)
        for left in lefts
        if left.in_features <= 36
        for right in by_rows.get(left.in_features, [])
        if max(left.out_features, right.in_features) <= 48
    ]
    return random.Random(0).sample(pairs, limit) if len(pairs) > limit else pairs


def test_link_rank_and_product_against_dense_products():
    """A pair is chainable exactly as defined, and then every entry of the product has ``rank`` paths on its support."""
    chainable = 0
    for left, right in composable_pairs():
        link = left.link(right)
        divides = right.a % left.a == 0 and left.d % right.d == 0
        integer = (left.a * left.c) % right.a == 0 and (right.b * right.d) % left.d == 0
        assert (link is not None) == (divides and integer), (left, right)
        if link is None:
            continue
        chainable += 1
        paths = support(left) @ support(right)
        assert np.array_equal(paths, link.rank * support(link.product)), (left, right)
        assert link.rank == right.b * right.d / left.d
        assert link.is_redundant == (link.rank >= min(left.b, right.c))
    assert chainable > 200


def test_link_of_sizes_that_do_not_meet_is_none():
    assert Pattern(1, 2, 3, 1).link(Pattern(1, 4, 2, 1)) is None


def test_redundant_pair_is_no_smaller_than_its_product():
    for left, right in composable_pairs():
        link = left.link(right)
        if link is not None and link.is_redundant:
            assert left.nnz + right.nnz >= link.product.nnz, (left, right)


# ---- chains as values


CHAINS = [
    Chain.dense(5, 7),
    Chain.low_rank(30, 20, 3),
    Chain.block_diagonal(30, 21, 4),
    Chain.monarch(64, 128, blocks=4),
    Chain.monarch(50, 30, blocks=3, rank=2),
    Chain.btt(36, 64, rank=2),
    Chain.btt(17, 13, rank=1),
    Chain.butterfly(16),
    Chain.butterfly(12, radix=(2, 3, 2)),
    Chain.butterfly(10, radix=[(3, 2), (2, 5)], out_features=6),
    Chain.butterfly(100, radix=3, out_features=20),
    Chain.parse("(2,3,5,1)(1,5,4,2)(8,1,3,1)"),
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.spec)
def test_chain_round_trips_and_formulas(chain):
    assert Chain.parse(chain.spec) == chain
    assert hash(Chain.parse(chain.spec)) == hash(chain)
    assert eval(repr(chain), {"Chain": Chain}) == chain
    assert copy.deepcopy(chain) == pickle.loads(pickle.dumps(chain)) == chain
    assert len(chain) == len(list(chain)) == len(chain.patterns)
    for pattern in chain:
        assert str(pattern) in str(chain)
    assert chain.n_params == sum(np.count_nonzero(support(p)) for p in chain)
    assert chain.dense_params == chain.in_features * chain.out_features
    assert chain.kept == pytest.approx(chain.n_params / chain.dense_params)
    assert chain.is_dense_in_disguise == (chain.kept >= 1)
    assert chain.flops(3) == 6 * chain.n_params
    assert chain.bytes(3, 2) == sum(p.bytes(3, 2) for p in chain)
    assert chain.bytes(3, 2, fused=True) <= chain.bytes(3, 2)
    assert chain.weight_shapes == tuple(p.weight_shape for p in chain)
    assert np.array_equal(product_support(chain.T), product_support(chain).T)
    assert chain == chain.T.T
    assert (chain.T.in_features, chain.T.out_features) == (chain.out_features, chain.in_features)


@pytest.mark.parametrize("chain", [c for c in CHAINS if c.is_chainable], ids=lambda c: c.spec)
def test_merged_chain_has_the_same_support(chain):
    whole = chain.merge()
    assert len(whole) == 1
    assert (whole.in_features, whole.out_features) == (chain.in_features, chain.out_features)
    assert np.array_equal(product_support(whole) > 0, product_support(chain) > 0)
    assert np.unique(product_support(chain)[product_support(chain) > 0]).tolist() == [np.prod(chain.link_ranks)]
    for start, stop in itertools.combinations(range(len(chain) + 1), 2):
        merged = chain.merge(start, stop)
        assert len(merged) == len(chain) - (stop - start) + 1
        assert np.array_equal(product_support(merged) > 0, product_support(chain) > 0)


def test_chain_index_and_slice():
    chain = Chain.butterfly(16)
    assert chain[0] == Pattern(1, 2, 2, 8)
    assert chain[-1] == Pattern(8, 2, 2, 1)
    assert isinstance(chain[1:3], Chain)
    assert list(chain[1:3]) == [Pattern(2, 2, 2, 4), Pattern(4, 2, 2, 2)]


def test_parse_allows_spaces_and_commas():
    assert Chain.parse(" (1, 4, 2, 2), (2,2,2,1) [:7, :3] ") == Chain([(1, 4, 2, 2), (2, 2, 2, 1)], 3, 7)


@pytest.mark.parametrize("text", ["", "(1,2,3)", "(1,2,3,4", "(1,2,3,x)", "(1,2,3,4)[:3]", "1,2,3,4", "(1,2,3,-4)"])
def test_parse_names_what_it_cannot_read(text):
    with pytest.raises(ChainError) as error:
        Chain.parse(text)
    assert repr(text) in str(error.value)


def test_parse_refuses_what_is_no_text():
    with pytest.raises(ChainError, match="5"):
        Chain.parse(5)


def test_chain_errors_name_the_values():
    with pytest.raises(ChainError, match="0 patterns"):
        Chain([])
    with pytest.raises(ChainError, match=r"factors 2 and 3 do not compose: \(1, 2, 3, 1\) reads 3 .* writes 4"):
        Chain([(1, 5, 2, 1), (1, 2, 3, 1), (1, 4, 2, 1)])
    with pytest.raises(ChainError, match=r"in_features = 4: expected 1 to 3"):
        Chain([(1, 2, 3, 1)], in_features=4)
    with pytest.raises(ChainError, match=r"out_features = 0: expected 1 to 2"):
        Chain([(1, 2, 3, 1)], out_features=0)
    with pytest.raises(ChainError, match=r"in_features = 2\.0: expected"):
        Chain([(1, 2, 3, 1)], in_features=2.0)
    with pytest.raises(ChainError, match=r"\(1, 2, 3\).*four"):
        Chain([(1, 2, 3)])


def test_merge_errors():
    not_chainable = Chain.parse("(4,2,2,1)(1,2,2,4)")
    assert not_chainable.links == (None,)
    assert not_chainable.link_ranks == (None,)
    assert not not_chainable.is_chainable
    with pytest.raises(ChainError, match="not chainable"):
        not_chainable.merge()
    with pytest.raises(ChainError, match=r"merge\(1, 1\)"):
        not_chainable.merge(1, 1)


# ---- named structures


def test_dense_low_rank_block_diagonal():
    assert list(Chain.dense(5, 7)) == [Pattern(1, 7, 5, 1)]
    assert Chain.dense(5, 7).is_dense_in_disguise
    assert list(Chain.low_rank(8, 6, 2)) == [Pattern(1, 6, 2, 1), Pattern(1, 2, 8, 1)]
    assert Chain.low_rank(8, 6, 2).link_ranks == (2,)
    chain = Chain.block_diagonal(10, 6, 4)
    assert list(chain) == [Pattern(4, 2, 3, 1)]
    assert (chain.in_features, chain.out_features) == (10, 6)
    assert (chain.padded_in_features, chain.padded_out_features) == (12, 8)
    assert chain.is_padded
    assert chain.n_params == 24


def test_monarch_is_chainable_with_link_rank_q_over_k():
    chain = Chain.monarch(256, 512, blocks=4)
    assert list(chain) == [Pattern(1, 128, 64, 4), Pattern(4, 64, 64, 1)]
    assert chain.link_ranks == (16,)
    assert np.all(product_support(chain) == 16)
    # 2 * 4 * 64 * (128 + 64) / 2 over 256 * 512
    assert chain.kept == pytest.approx((128 * 64 * 4 + 4 * 64 * 64) / (256 * 512))


def test_monarch_rank_widens_the_middle():
    chain = Chain.monarch(12, 12, blocks=4, rank=3)
    assert chain.link_ranks == (3,)
    assert chain[1].b == 12


def test_monarch_pads_logically_and_counts_it():
    chain = Chain.monarch(30, 18, blocks=4, rank=1)
    assert (chain.in_features, chain.out_features) == (30, 18)
    assert (chain.padded_in_features, chain.padded_out_features) == (32, 20)
    assert chain.n_params == 4 * 4 * 5 + 4 * 4 * 8
    assert chain.kept == chain.n_params / (30 * 18)


def test_monarch_refuses_a_mostly_zero_matrix_and_names_the_fraction():
    with pytest.raises(ChainError, match=r"only 2/8 = 25\.0% of W could be non-zero; expected blocks <= 4, or rank="):
        Chain.monarch(64, 16, blocks=8)
    # The bound in the message is right: it is accepted, and one more is not.
    for size in range(1, 60):
        small = max(k for k in range(1, size + 1) if -(-size // k) >= k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Chain.monarch(size, 2 * size, blocks=small)
        with pytest.raises(ChainError, match=f"blocks <= {small},"):
            Chain.monarch(size, 2 * size, blocks=small + 1)


def test_monarch_rounds_up_and_says_so():
    with pytest.warns(UserWarning, match="rounded up from 7 to 8, a multiple of the block count"):
        chain = Chain.monarch(28, 28, blocks=4)
    assert chain.is_chainable
    assert chain.link_ranks == (2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Chain.monarch(32, 32, blocks=4)


@pytest.mark.parametrize(("n", "m"), [(36, 64), (64, 36), (17, 13), (1, 1), (2, 3), (768, 3072), (97, 97)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_btt(n, m, rank):
    chain = Chain.btt(n, m, rank)
    assert (chain.in_features, chain.out_features) == (n, m)
    assert chain.link_ranks == (rank,)
    right = chain[1]
    m1, _, m0, one = right
    assert one == 1
    assert max(m0, m1) <= 2 * min(m0, m1)
    assert m0 * m1 < max(1.2 * n, n + 3)
    if n * m <= 36 * 64:
        assert np.all(product_support(chain) == rank)


@pytest.mark.parametrize("log2", [1, 2, 3, 6])
def test_butterfly_radix_two(log2):
    n = 2**log2
    chain = Chain.butterfly(n)
    assert list(chain) == [Pattern(2 ** (l - 1), 2, 2, 2 ** (log2 - l)) for l in range(1, log2 + 1)]
    assert np.all(product_support(chain) == 1)
    assert set(chain.link_ranks) <= {1}


def test_butterfly_pads_to_the_next_power():
    chain = Chain.butterfly(100)
    assert (chain.padded_in_features, chain.in_features, len(chain)) == (128, 100, 7)


def test_butterfly_mixed_and_rectangular():
    chain = Chain.butterfly(30, radix=(5, 3, 2))
    assert [(p.b, p.c) for p in chain] == [(5, 5), (3, 3), (2, 2)]
    assert np.all(product_support(chain) == 1)
    wide = Chain.butterfly(16, out_features=64)
    assert (wide.padded_in_features, wide.padded_out_features, len(wide)) == (16, 64, 4)
    assert [p.b for p in wide] == [4, 4, 2, 2]
    assert np.all(product_support(wide) == 1)
    narrow = Chain.butterfly(64, out_features=8, radix=2)
    assert (narrow.padded_in_features, narrow.padded_out_features) == (64, 8)
    pairs = Chain.butterfly(6, radix=[(4, 2), (2, 3)], out_features=8)
    assert np.all(product_support(pairs) == 1)
    assert not pairs.is_padded


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Chain.dense(0, 3), "in_features|c = 0"),
        (lambda: Chain.low_rank(4, 4, 0), "= 0: expected"),
        (lambda: Chain.block_diagonal(4, 4, 0), "blocks = 0"),
        (lambda: Chain.monarch(4, 4, blocks=2.0), r"blocks = 2\.0"),
        (lambda: Chain.monarch(4, 4, blocks=2, rank=0), "rank = 0"),
        (lambda: Chain.btt(4, 0, 1), "out_features = 0"),
        (lambda: Chain.butterfly(0), "in_features = 0"),
        (lambda: Chain.butterfly(8, radix=1), "radix = 1"),
        (lambda: Chain.butterfly(8, radix=()), r"radix = \(\)"),
        (lambda: Chain.butterfly(8, radix=(2, 2)), "4 inputs and 4 outputs: expected at least 8 and 8"),
        (lambda: Chain.butterfly(8, radix=(2, 2.5)), "2.5"),
        (lambda: Chain.butterfly(8, radix=2.0), r"radix = 2\.0"),
        (lambda: Chain.butterfly(8, radix=[(2, 3, 4), 4]), r"\(2, 3, 4\)"),
        (lambda: Chain.butterfly(8, radix="22"), "'22'"),
    ],
)
def test_constructors_name_the_wrong_value(build, message):
    with pytest.raises(ChainError, match=message):
        build()
