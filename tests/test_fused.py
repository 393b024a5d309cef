"""The fused pair as a backend: which pairs it takes, how they are cut, what its kernel is given. No GPU needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from structlayers import Chain, Layout, _extension
from structlayers.backends import fused, tuning
from structlayers.backends.auto import CALL_S, pair_cost_s
from structlayers.backends.fused import PairProblem, choose_pair_tile, pair_tiles, reason_against
from structlayers.problem import ACTIVATIONS, Problem


def pair_of(chain: Chain | str, n: int = 4096, **changes) -> PairProblem:
    chain = Chain.parse(chain) if isinstance(chain, str) else chain
    single = Problem(chain[1], n, torch.bfloat16, "cuda", Layout.BATCH_FIRST, False, 0, (9, 0))
    problem = PairProblem.of(chain.links[0], single, chain.in_features, chain.out_features)
    return dataclasses.replace(problem, **changes)


PAIR = pair_of(Chain.monarch(1024, 1024, 32))


@pytest.fixture
def serving(monkeypatch):
    """As on a machine with Hopper and the kernels."""
    monkeypatch.setattr(fused, "_why_device_does_not_serve", lambda problem: None)


# ---- what it takes


@pytest.mark.parametrize(
    "chain",
    [
        Chain.monarch(384, 1536, 4),
        Chain.monarch(1536, 384, 4),
        Chain.monarch(768, 768, 4),
        Chain.monarch(1024, 1024, 32),
        Chain.monarch(1024, 4096, 4),
        Chain.monarch(4096, 1024, 16),
        Chain.monarch(4096, 4096, 64),
        Chain.monarch(8192, 8192, 64),
        Chain.parse("(2,16,16,16)(32,16,16,1)"),
        Chain.low_rank(1024, 512, 64),
    ],
    ids=lambda c: c.spec,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs_that_it_takes(chain, dtype, serving):
    problem = pair_of(chain, dtype=dtype)
    assert reason_against(problem) is None
    tile = choose_pair_tile(problem)
    assert tile in pair_tiles(problem)
    assert tile.stages >= 2
    assert pair_cost_s(problem) > CALL_S


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (dataclasses.replace(PAIR, dtype=torch.float32), r"no torch\.float32: expected one of"),
        (dataclasses.replace(PAIR, layout=Layout.BATCH_LAST), "no batch_last: expected batch_first"),
        (pair_of("(1,16,16,32)(16,8,16,4)"), r"\(16, 8, 16, 4\), is interleaved: expected d = 1"),
        (pair_of("(1,32,32,32)(32,32,12,1)"), r"c of \(32, 32, 12, 1\) = 12: expected a multiple of 8"),
        (pair_of("(1,32,12,32)(12,32,16,1)"), r"c of \(1, 32, 12, 32\) = 12"),
        (pair_of("(1,32,32,32)(32,32,32,1)[:1024,:1020]"), "in_features = 1020: expected a multiple of 8"),
        (pair_of("(1,32,24,12)(24,12,16,1)"), r"d of \(1, 32, 24, 12\) = 12: expected 1, 2, 4 or a multiple of 8"),
        (pair_of(Chain.monarch(4096, 4096, 4)), "does not fit the shared memory"),
        (dataclasses.replace(PAIR, n=2**31), "2147483583 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pairs_that_it_does_not_take(problem, reason, serving):
    with pytest.raises(AssertionError, match=reason):
        assert reason_against(problem) is None, reason_against(problem)


def test_machines_that_it_does_not_take(monkeypatch):
    assert reason_against(dataclasses.replace(PAIR, device_type="cpu")) == "the tensors are on cpu: expected cuda"
    old = dataclasses.replace(PAIR, capability=(8, 6))
    assert reason_against(old) == "compute capability 8.6: expected 9.0"
    monkeypatch.setattr(fused, "why_missing", lambda: "the CUDA kernels are not built")
    assert reason_against(PAIR) == "the CUDA kernels are not built"


def test_older_kernels_are_named(monkeypatch):
    """An extension that was built before there was a fused kernel, or not for sm_90a."""
    monkeypatch.setattr(fused, "why_missing", lambda: None)
    monkeypatch.setattr(fused, "built_for_sm90a", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    assert reason_against(PAIR).startswith("the compiled kernels are older than the fused one; build them again with:")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    assert reason_against(PAIR) is None
    monkeypatch.setattr(fused, "built_for_sm90a", lambda: False)
    assert "hold no code for sm_90a" in reason_against(PAIR)
    assert _extension.BUILD_COMMAND in reason_against(PAIR)


# ---- how it is cut


def test_tiles_fit_and_have_names_of_their_own():
    for chain in (Chain.monarch(1024, 1024, 32), Chain.monarch(4096, 4096, 64), Chain.btt(1024, 1024, 2)):
        tiles = pair_tiles(pair_of(chain))
        assert tiles
        assert len({tile.name for tile in tiles}) == len({tile.number for tile in tiles}) == len(tiles)
        for tile in tiles:
            assert tile.number == tile.cluster + 8 * tile.right_rows + 2048 * tile.left_rows
            assert 2 <= tile.stages <= fused.MOST_STAGES


def test_a_wide_intermediate_is_spread_over_a_cluster():
    assert choose_pair_tile(pair_of(Chain.monarch(1024, 1024, 32))).cluster == 1
    assert choose_pair_tile(pair_of(Chain.monarch(8192, 8192, 64))).cluster > 1


def test_layers_of_four_blocks_keep_the_intermediate_in_registers():
    for sizes in ((384, 384), (384, 1536), (1536, 384), (768, 768), (1024, 4096)):
        problem = pair_of(Chain.monarch(*sizes, 4), n=25_088)
        tile = choose_pair_tile(problem)
        assert tile.in_registers
        assert (tile.name, tile.number) == ("registers", 1 + 256)
        assert 5 <= tile.stages <= fused.MOST_STAGES
        others = [other for other in pair_tiles(problem) if not other.in_registers]
        assert choose_pair_tile(problem, others[0].name) == others[0]


def test_outputs_are_cut_into_parts_where_tiles_are_fewer_than_sms():
    wide = pair_of(Chain.monarch(1024, 4096, 4))
    parts = {n: choose_pair_tile(dataclasses.replace(wide, n=n)).parts for n in (512, 2048, 4096, 8192, 25_088)}
    assert parts == {512: 8, 2048: 4, 4096: 2, 8192: 1, 25_088: 1}
    # A chunk of 64 j is not cut, and no part is empty: 1,024 j are 16 chunks.
    assert [tile.parts for tile in pair_tiles(wide) if tile.in_registers] == [1, 2, 3, 4, 6, 8]
    assert [tile.parts for tile in pair_tiles(pair_of(Chain.monarch(768, 768, 4))) if tile.in_registers] == [1, 2, 4]
    times = [pair_cost_s(dataclasses.replace(wide, n=n)) for n in (512, 4096, 8192)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    "chain",
    [
        Chain.monarch(1024, 1024, 32),
        "(1,64,160,4)(4,160,64,1)",  # link rank 40
        "(1,64,96,2)(4,48,64,1)",  # delta 2
        "(1,33,96,4)(4,96,64,1)",  # b odd
        "(1,64,96,4)(4,96,64,1)[:250,:256]",  # rows of y that are no whole pieces
        "(1,64,96,4)(4,96,96,1)[:256,:352]",  # padded blocks of x
        "(2,64,96,4)(8,96,64,1)[:504,:512]",  # a padded group of y
    ],
    ids=lambda c: c if isinstance(c, str) else c.spec,
)
def test_pairs_whose_intermediate_does_not_stay_in_registers(chain):
    assert not any(tile.in_registers for tile in pair_tiles(pair_of(chain)))


def test_a_measured_tile_decides_if_it_fits():
    problem = pair_of(Chain.monarch(4096, 4096, 64))
    for tile in pair_tiles(problem):
        assert choose_pair_tile(problem, tile.name) == tile
    assert choose_pair_tile(problem, "cluster99_rows1") == choose_pair_tile(problem)
    with pytest.raises(ValueError, match="no tile takes"):
        choose_pair_tile(pair_of(Chain.monarch(4096, 4096, 4)))


def test_estimates_grow_with_the_batch():
    times = [pair_cost_s(dataclasses.replace(PAIR, n=n)) for n in (0, 1, 64, 4096, 25_088, 250_880)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(10 * times[-2], rel=0.15)


def test_pairs_have_entries_of_their_own(monkeypatch):
    monkeypatch.setattr(tuning, "device_name", lambda problem: "Test GPU")
    assert "(1,32,32,32)(32,32,32,1), n<=4096" in tuning.key(PAIR)
    assert tuning.key(dataclasses.replace(PAIR, n=0)) is None
    entry = tuning.Entry("fused", "cluster1_rows128x128", 0.25)
    assert pair_cost_s(PAIR, entry) == pytest.approx(2.5e-4)


# ---- what the kernel is given


@pytest.fixture
def kernel(monkeypatch):
    """The op with a recorder in its place."""
    given = []

    class Kernel:
        @staticmethod
        def default(*arguments):
            given.append(arguments)
            return arguments[0]

    monkeypatch.setattr(fused.torch.ops.structlayers, "cuda_pair", Kernel, raising=False)
    return given


def test_arguments_of_the_kernel(kernel):
    product = fused.prepare(dataclasses.replace(PAIR, out_features=1000), "silu")
    x, left, right = (torch.randn(s).bfloat16() for s in ((3, 1024), (1, 32, 32, 32), (32, 1, 32, 32)))
    bias = torch.randn(2000).bfloat16()[::2]
    product(x, left, right, bias)
    product(x, left, right, None)
    (first, second) = kernel
    assert first[0] is x
    assert first[1] is left
    assert first[2] is right
    assert first[3].is_contiguous()
    assert torch.equal(first[3], bias)
    number = choose_pair_tile(dataclasses.replace(PAIR, out_features=1000)).number
    assert first[4:] == (1000, False, ACTIVATIONS.index("silu"), False, number)
    assert second[3] is None


def test_the_kernel_is_told_of_a_measured_tile(kernel, monkeypatch):
    for tile in pair_tiles(PAIR):
        monkeypatch.setattr(tuning, "lookup", lambda problem, name=tile.name: tuning.Entry("fused", name))
        fused.prepare(PAIR, "none")(torch.randn(1, 1024).bfloat16(), torch.ones(1), torch.ones(1), None)
        assert kernel.pop()[-1] == tile.number


def test_what_the_kernel_cannot_read_is_copied(kernel):
    product = fused.prepare(PAIR, "none")
    memory = torch.randn(32**3 + 64).bfloat16()
    weights = [torch.randn(1, 32, 32, 32).bfloat16(), torch.randn(32, 1, 32, 32).bfloat16()]
    cases = (
        memory[1 : 1 + 4 * 1024].view(4, 1024),
        memory[: 4 * 1030].view(4, 1030)[:, :1024],
        torch.randn(1024, 4).bfloat16().T,
        torch.randn(1, 1024).bfloat16().expand(4, -1),
    )
    for x in cases:
        product(x, *weights, None)
        given = kernel.pop()[0]
        assert torch.equal(given, x)
        assert given.stride(1) == 1
        assert given.stride(0) % 8 == 0
        assert given.stride(0) >= 1024
        assert given.data_ptr() % 16 == 0
    strided = weights[0].transpose(2, 3)
    shifted = memory[1 : 1 + 32**3].view(32, 1, 32, 32)
    product(torch.randn(4, 1024).bfloat16(), strided, shifted, None)
    _, left, right, *_ = kernel.pop()
    for got, want in ((left, strided), (right, shifted)):
        assert torch.equal(got, want)
        assert got.is_contiguous()
        assert got.data_ptr() % 16 == 0


def test_the_schema_is_that_of_one_factor_with_two():
    pair, single = (getattr(torch.ops.structlayers, name).default._schema for name in ("cuda_pair", "cuda_product"))
    names = [argument.name for argument in single.arguments]
    names[names.index("weight") : names.index("weight") + 1] = ["left", "right"]
    assert [argument.name for argument in pair.arguments] == names
