"""``KSLinear`` as a stand-in for ``nn.Linear``."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from structlayers import Chain, KSLinear, Layout
from structlayers.backends import BACKENDS, available_backends
from structlayers.errors import BackendError, ChainError, ShapeError
from structlayers.init import factor_std
from structlayers.problem import Problem

CHAIN = Chain.parse("(1,4,6,2)(2,6,5,1)[:7,:9]")
CPU_PROBLEM = Problem(CHAIN[0], 4, torch.float64, "cpu", Layout.BATCH_LAST)
CHAINS = [CHAIN, Chain.dense(5, 7), Chain.butterfly(8), Chain.low_rank(6, 9, 2), Chain.block_diagonal(7, 10, 3)]


def layer_of(chain: Chain, seed: int = 0, **options) -> KSLinear:
    torch.manual_seed(seed)
    return KSLinear(chain, **options)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.spec)
@pytest.mark.parametrize("bias", [True, False])
def test_behaves_as_the_linear_layer_of_its_dense_weight(chain, bias):
    layer = layer_of(chain, bias=bias, dtype=torch.float64)
    linear = nn.Linear(chain.in_features, chain.out_features, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(layer.to_dense())
        if bias:
            linear.bias.copy_(layer.bias)
    for shape in ((), (1,), (0,), (4,), (2, 3), (2, 0, 3)):
        x = torch.randn(*shape, chain.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), linear(x))
    assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)


@pytest.mark.parametrize("backend", ["auto", *available_backends(CPU_PROBLEM)])
def test_batch_last_is_the_transposed_layer(backend):
    layer = layer_of(CHAIN, dtype=torch.float64)
    last = KSLinear(CHAIN, layout="batch_last", backend=backend, dtype=torch.float64)
    last.load_state_dict(layer.state_dict())
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(last(x.T), layer(x).T)
    torch.testing.assert_close(last(x[0]), layer(x[0]))
    assert last(torch.randn(9, 2, 3, dtype=torch.float64)).shape == (7, 2, 3)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "gelu_tanh"])
def test_activation_follows_the_product(activation):
    plain, layer = layer_of(CHAIN), layer_of(CHAIN, activation=activation)
    x = torch.randn(3, 9)
    function = {"gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}.get(activation) or getattr(F, activation)
    torch.testing.assert_close(layer(x), function(plain(x)))


def test_state_dict_is_the_same_for_every_backend_and_layout():
    reference = {name: tensor.shape for name, tensor in layer_of(CHAIN).state_dict().items()}
    assert reference == {"factors.0": (1, 2, 4, 6), "factors.1": (2, 1, 6, 5), "bias": (7,)}
    for backend, layout in itertools.product(BACKENDS, ("batch_first", "batch_last")):
        layer = layer_of(CHAIN, backend=backend, layout=layout, recompute=True)
        assert {name: tensor.shape for name, tensor in layer.state_dict().items()} == reference
        KSLinear(CHAIN).load_state_dict(layer.state_dict())


def test_deepcopy_and_pickle():
    layer = layer_of(CHAIN, activation="relu", backend="bmm").eval()
    x = torch.randn(3, 9)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        assert not twin.training
        twin.factors[0].data.zero_()
        assert not torch.equal(twin(x), layer(x))


def test_dtype_and_device_options():
    layer = KSLinear(CHAIN, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(2, 9, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to_dense().dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 9, dtype=torch.float64)).dtype == torch.float64
    meta = KSLinear(CHAIN, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    meta = meta.to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.isfinite(meta(torch.randn(2, 9))).all()


def test_to_dense_is_differentiable_and_ignores_autocast():
    layer = layer_of(CHAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = layer.to_dense()
    assert dense.shape == (7, 9)
    assert dense.dtype == torch.float32
    dense.square().sum().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in layer.factors)


def test_text_of_a_layer():
    assert repr(layer_of(CHAIN)) == (
        "KSLinear(9 -> 7, ((I1 (x) 1[4x6] (x) I2) @ (I2 (x) 1[6x5] (x) I1))[:7, :9], bias=True, "
        "kept=171.4%, backend='auto')"
    )
    text = repr(KSLinear("(2,3,4,1)", activation="relu", layout="batch_last", backend="bmm"))
    assert "backend='bmm', activation='relu', layout='batch_last'" in text


def test_arguments_that_name_nothing_known():
    with pytest.raises(ChainError, match=r"chain = 3: expected a Chain"):
        KSLinear(3)
    with pytest.raises(ChainError, match=r"\(1,2\)"):
        KSLinear("(1,2)")
    with pytest.raises(BackendError, match="backend = 'fast'"):
        KSLinear(CHAIN, backend="fast")
    with pytest.raises(ValueError, match="layout = 'last'"):
        KSLinear(CHAIN, layout="last")
    with pytest.raises(ValueError, match="activation = 'tanh'"):
        KSLinear(CHAIN, activation="tanh")
    with pytest.raises(ValueError, match=r"init = 'xavier': expected one of \['variance', 'structure'\]"):
        KSLinear(CHAIN, init="xavier")
    with pytest.raises(ShapeError, match="expected 9 features"):
        KSLinear(CHAIN)(torch.randn(2, 8))


# ---- initial scale


def output_std(layer: nn.Module, features: int, seed: int) -> float:
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        return float(layer(torch.randn(512, features)).std())


def dense_std(in_features: int, out_features: int, seed: int) -> float:
    linear = nn.Linear(in_features, out_features, bias=False)
    torch.manual_seed(seed)
    nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
    return output_std(linear, in_features, seed)


@pytest.mark.parametrize("seed", range(4))
def test_ten_factor_butterfly_keeps_the_scale_of_a_dense_layer(seed):
    chain = Chain.butterfly(1024)
    assert len(chain) == 10
    std = output_std(layer_of(chain, seed, bias=False), 1024, seed)
    assert std == pytest.approx(dense_std(1024, 1024, seed), rel=0.1)


@pytest.mark.parametrize(
    "chain",
    [
        Chain.dense(256, 128),
        Chain.monarch(256, 512, blocks=4),
        Chain.monarch(500, 300, blocks=8, rank=4),
        Chain.btt(400, 256, rank=2),
        Chain.low_rank(512, 512, 64),
        Chain.block_diagonal(510, 300, 4),
        Chain.butterfly(700, radix=3, out_features=700),
        Chain.butterfly(256, radix=4, out_features=1024),
        Chain.parse("(4,32,16,4)(4,4,8,16)(1,64,64,8)"),
    ],
    ids=lambda c: c.spec[:40],
)
def test_scale_of_other_chains(chain):
    stds = [output_std(layer_of(chain, seed, bias=False), chain.in_features, seed) for seed in range(4)]
    expected = [dense_std(chain.in_features, chain.out_features, seed) for seed in range(4)]
    assert sum(stds) / 4 == pytest.approx(sum(expected) / 4, rel=0.1)


def test_structure_rule_is_its_formula():
    chain = Chain.parse("(1,8,4,2)(2,4,16,1)")
    assert factor_std(chain, "structure") == pytest.approx([math.sqrt(4) / 4, math.sqrt(4) / 16])
    layer = layer_of(Chain.monarch(256, 256, blocks=4), init="structure")
    for factor, std in zip(layer.factors, factor_std(layer.chain, "structure"), strict=True):
        assert float(factor.detach().std()) == pytest.approx(std, rel=0.05)
        assert float(factor.detach().abs().max()) <= math.sqrt(3) * std
    with pytest.raises(ValueError, match="init rule = 'he'"):
        factor_std(chain, "he")


def test_gain_scales_the_product():
    chain = Chain.butterfly(64)
    ratio = [b / a for a, b in zip(factor_std(chain), factor_std(chain, gain=3.0), strict=True)]
    assert math.prod(ratio) == pytest.approx(3.0)


def test_bias_is_drawn_as_in_linear():
    bias = layer_of(Chain.dense(100, 4000)).bias.detach()
    assert float(bias.abs().max()) <= 0.1
    assert float(bias.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.05)


# ---- from_linear


def best_block_error(weight: torch.Tensor, chain: Chain) -> float:
    """Distance from ``weight`` to the nearest product of a two-factor chain: SVD of every block of shared support."""
    (a1, b1, c1, d1), (a2, b2, c2, d2) = chain
    rank = a1 * c1 // a2
    padded = torch.zeros(chain.padded_out_features, chain.padded_in_features, dtype=torch.float64)
    padded[: chain.out_features, : chain.in_features] = weight
    # A left column and a right row meet in one of a1*c1*d1 middle indices; those with the same rows and columns form
    # one block.
    blocks: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for middle in range(a1 * c1 * d1):
        i, l = middle // (c1 * d1), middle % d1
        rows = tuple((i * b1 + j) * d1 + l for j in range(b1))
        i, l = middle // (b2 * d2), middle % d2
        columns = tuple((i * c2 + j) * d2 + l for j in range(c2))
        blocks[rows, columns] = blocks.get((rows, columns), 0) + 1
    assert set(blocks.values()) == {rank}
    covered = torch.zeros_like(padded, dtype=torch.bool)
    error = 0.0
    for rows, columns in blocks:
        block = padded[list(rows)][:, list(columns)]
        error += float(torch.linalg.svdvals(block)[rank:].square().sum())
        covered[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    return math.sqrt(error + float(padded[~covered].square().sum()))


@pytest.mark.parametrize(
    "chain",
    [
        Chain.monarch(16, 16, blocks=4),
        Chain.monarch(30, 18, blocks=4, rank=1),
        Chain.monarch(12, 24, blocks=3, rank=2),
        Chain.btt(12, 20, rank=2),
        Chain.low_rank(9, 14, 4),
        Chain.parse("(2,3,4,6)(4,6,5,2)"),
        Chain.parse("(2,3,4,6)(4,6,5,2)[:33,:37]"),
    ],
    ids=lambda c: c.spec,
)
def test_from_linear_is_the_optimum_for_two_factors(chain):
    torch.manual_seed(0)
    linear = nn.Linear(chain.in_features, chain.out_features, dtype=torch.float64)
    layer = KSLinear.from_linear(linear, chain)
    distance = float((layer.to_dense() - linear.weight).detach().norm())
    if not chain.is_padded:
        assert distance == pytest.approx(best_block_error(linear.weight.detach(), chain), rel=1e-9)
    else:
        # The optimum over the padded matrix, whose padding counts as zeros to be met.
        assert distance <= best_block_error(linear.weight.detach(), chain) * (1 + 1e-9)
    assert torch.equal(layer.bias, linear.bias)


def test_from_linear_keeps_what_the_layer_was():
    linear = nn.Linear(9, 7, bias=False, dtype=torch.float64).eval()
    linear.weight.requires_grad_(False)
    layer = KSLinear.from_linear(linear, CHAIN.spec, backend="bmm", activation="relu")
    assert layer.bias is None
    assert not layer.training
    assert layer.factors[0].dtype == torch.float64
    assert not any(p.requires_grad for p in layer.parameters())
    assert (layer.backend, layer.activation) == ("bmm", "relu")
    half = KSLinear.from_linear(nn.Linear(9, 7).bfloat16(), CHAIN)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_from_linear_recovers_a_chain_exactly():
    layer = layer_of(Chain.butterfly(16), dtype=torch.float64)
    linear = nn.Linear(16, 16, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(layer.to_dense())
    torch.testing.assert_close(KSLinear.from_linear(linear, layer.chain).to_dense(), linear.weight)


def test_from_linear_refuses_other_sizes():
    with pytest.raises(ShapeError, match=r"maps 9 -> 7 features: expected 8 -> 7"):
        KSLinear.from_linear(nn.Linear(8, 7), CHAIN)
    with pytest.raises(ChainError, match=r"chain = \[\(1, 7, 8, 1\)\]: expected a Chain or its text"):
        KSLinear.from_linear(nn.Linear(8, 7), [(1, 7, 8, 1)])


def test_trains():
    """A structured layer fits a target that its own structure can express."""
    torch.manual_seed(0)
    target, layer = KSLinear(Chain.monarch(16, 16, blocks=4)), KSLinear(Chain.monarch(16, 16, blocks=4))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        x = torch.randn(64, 16)
        loss = F.mse_loss(layer(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
