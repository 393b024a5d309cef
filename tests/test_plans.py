"""Plans: which steps a chain is cut into, that no cut is cheaper, and that every plan computes the chain."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structlayers import Chain, KSLinear, Layout, Pattern, ks_chain, prepared
from structlayers.backends import BACKENDS, auto, fused, tuning
from structlayers.errors import BackendError
from structlayers.factorize import to_dense
from structlayers.plans import (
    MODES,
    ChainProblem,
    Plan,
    Step,
    _cached_forms,
    _cached_plan,
    _steps,
    choose_forms,
    plan,
    plan_problem,
    prepare,
)
from structlayers.tolerances import tolerance

HOPPER = {"device_type": "cuda", "layout": Layout.BATCH_FIRST, "capability": (9, 0)}
NOT_CHAINABLE = Chain.parse("(4,2,2,1)(1,2,2,4)")
CHAINS = [
    Chain.dense(6, 5),
    Chain.monarch(12, 18, blocks=3, rank=2),
    Chain.monarch(10, 14, blocks=4, rank=2),
    Chain.butterfly(16),
    Chain.butterfly(24, out_features=20),
    Chain.low_rank(9, 7, 3),
    NOT_CHAINABLE,
    Chain([*NOT_CHAINABLE, Pattern(2, 2, 3, 2)], in_features=11),
]


def on_gpu(chain: Chain, n: int, dtype: torch.dtype = torch.bfloat16, **changes) -> ChainProblem:
    return ChainProblem(chain, n, dtype, **{**HOPPER, **changes})


def on_cpu(
    chain: Chain, n: int, layout: Layout = Layout.BATCH_FIRST, dtype: torch.dtype = torch.float64
) -> ChainProblem:
    return ChainProblem(chain, n, dtype, "cpu", layout)


def forget() -> None:
    _cached_plan.cache_clear()
    _cached_forms.cache_clear()
    prepared._plans.clear()


@pytest.fixture
def gpu(monkeypatch):
    """Plans as on a machine with Hopper and the compiled kernels; nothing is executed there."""
    compiled = dataclasses.replace(BACKENDS["cuda"], reason_against=lambda problem: None)
    monkeypatch.setitem(BACKENDS, "cuda", compiled)
    monkeypatch.setattr("structlayers.backends.cuda.reason_against", lambda problem: None)
    monkeypatch.setattr(fused, "_why_device_does_not_serve", lambda problem: None)
    monkeypatch.setattr(tuning, "device_name", lambda problem: "Test GPU")
    monkeypatch.setattr(tuning, "_entries", {})
    forget()
    yield
    forget()


def shape(chosen: Plan) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    return [(step.backend, tuple((o.start, o.stop) for o in step.operands)) for step in chosen.steps]


# ---- the choice


def brute_force(steps: list[Step], length: int) -> float:
    """The cheapest of all covers of a chain by steps, one after the other."""

    def covers(start: int) -> float:
        if start == length:
            return 0.0
        return min((step.cost_s + covers(step.stop) for step in steps if step.start == start), default=math.inf)

    return covers(0)


@st.composite
def chains(draw) -> Chain:
    """Neighbours that compose, chainable or not."""
    size = draw(st.sampled_from([4, 8, 12, 24]))
    patterns = []
    for _ in range(draw(st.integers(1, 5))):
        a = draw(st.sampled_from([f for f in range(1, size + 1) if size % f == 0]))
        d = draw(st.sampled_from([f for f in range(1, size // a + 1) if size // a % f == 0]))
        patterns.append(Pattern(a, size // a // d, size // a // d, d))
    return Chain(patterns)


@settings(max_examples=40)
@given(chain=chains(), n=st.sampled_from([0, 1, 37, 5000]), mode=st.sampled_from(MODES))
def test_no_cut_is_cheaper(chain, n, mode):
    for problem in (on_cpu(chain, n), on_gpu(chain, n)):
        chosen = plan_problem(problem, mode)
        merging = {"inference": "each call", "training": "never", "frozen": "once"}[mode]
        steps = list(_steps(problem, merging, fuse=mode != "training"))
        assert chosen.cost_s == pytest.approx(brute_force(steps, len(chain)))
        assert [o.start for o in chosen.operands] == [0, *(o.stop for o in chosen.operands[:-1])]
        assert chosen.operands[-1].stop == len(chain)


def test_no_cut_with_fused_pairs_is_cheaper(gpu):
    for chain, n, mode in itertools.product(
        [Chain.butterfly(256), Chain.monarch(512, 512, blocks=16), Chain.butterfly(4096, radix=8)],
        (1, 4096, 25_088),
        ("inference", "frozen"),
    ):
        problem = on_gpu(chain, n)
        steps = list(_steps(problem, "each call" if mode == "inference" else "once", fuse=True))
        assert any(step.backend == "fused" for step in steps)
        assert plan_problem(problem, mode).cost_s == pytest.approx(brute_force(steps, len(chain)))


def test_a_butterfly_is_two_merged_parts_in_one_pass(gpu):
    for width, half in ((1024, 5), (4096, 6)):
        (step,) = plan_problem(on_gpu(Chain.butterfly(width), 25_088), "frozen").steps
        assert step.backend == "fused"
        assert all(operand.is_derived for operand in step.operands)
        monarch = plan_problem(on_gpu(Chain.monarch(width, width, 2**half), 25_088))
        assert shape(monarch) == [("fused", ((0, 1), (1, 2)))]
        assert step.cost_s <= monarch.cost_s
        # One launch multiplies each half at a call, too little for another plan to be better.
        unfrozen = plan_problem(on_gpu(Chain.butterfly(width), 25_088))
        assert shape(unfrozen) == shape(plan_problem(on_gpu(Chain.butterfly(width), 25_088), "frozen"))
        assert unfrozen.cost_s <= 1.2 * monarch.cost_s


def test_a_butterfly_is_merged_on_a_cpu_too():
    chosen = plan_problem(on_cpu(Chain.butterfly(1024), 4096, dtype=torch.float32))
    assert len(chosen.steps) <= 2
    assert all(operand.is_derived for operand in chosen.operands)


def test_training_keeps_every_factor_a_step(gpu):
    chain = Chain.butterfly(64)
    chosen = plan_problem(on_gpu(chain, 25_088), "training")
    assert [len(step.operands) for step in chosen.steps] == [1] * len(chain)
    assert not any(operand.is_derived for operand in chosen.operands)
    assert chosen.notes == ("not fused: the input of every factor is kept for its weight gradient",)


def test_a_pair_that_is_not_chainable_runs_unfused_and_the_plan_says_so(gpu):
    chain = Chain.parse("(64,64,64,1)(1,64,64,64)")
    chosen = plan_problem(on_gpu(chain, 25_088))
    assert [len(step.operands) for step in chosen.steps] == [1, 1]
    assert chosen.notes == ("not fused: factors 1 and 2 are not chainable",)
    assert "not chainable" in chosen.explain()


def test_the_plan_says_why_a_pair_is_not_fused(gpu):
    odd = Chain.parse("(1,100,100,100)(100,100,100,1)")
    assert "expected a multiple of 8" in plan_problem(on_gpu(odd, 25_088)).notes[0]
    assert "torch.float32" in plan_problem(on_gpu(Chain.monarch(4096, 4096, 64), 25_088, torch.float32)).notes[0]
    small = plan_problem(on_gpu(Chain.monarch(4096, 4096, 64), 1))
    assert "separate kernels are expected to be faster" in small.notes[0]


def test_arithmetic_decides_for_one_dense_matrix(gpu):
    """4 blocks at 4,096 do half the FLOPs of dense in two passes that are no faster."""
    chosen = plan_problem(on_gpu(Chain.monarch(4096, 4096, 4), 64), "frozen")
    assert shape(chosen) == [("dense", ((0, 2),))]


def test_small_batches(gpu):
    """Two kernels where the factors are much smaller than the matrix, else one on the whole matrix."""
    for width, n in itertools.product((4096, 8192), (1, 16, 64)):
        chosen = plan_problem(on_gpu(Chain.monarch(width, width, 64), n), "frozen")
        assert len(chosen.steps) == 2 and not any(operand.is_derived for operand in chosen.operands), (width, n)
        # For many rows of what is not interleaved, cuBLAS is as fast.
        assert chosen.backends == ["cuda", "cuda"] or (n == 64 and chosen.backends == ["cuda", "bmm"]), (width, n)
    for width, n, backend in ((768, 1, "cuda"), (768, 16, "cuda"), (1024, 64, "dense"), (256, 1, "cuda")):
        chosen = plan_problem(on_gpu(Chain.monarch(width, width, 4), n), "frozen")
        assert shape(chosen) == [(backend, ((0, 2),))], (width, n)
        assert chosen.operands[0].is_derived


def test_measurements_overrule_estimates(gpu):
    chain = Chain.monarch(4096, 4096, 64)
    problem = on_gpu(chain, 25_088)
    assert shape(plan_problem(problem)) == [("fused", ((0, 1), (1, 2)))]
    pair = fused.PairProblem.of(chain.links[0], problem.single(chain[1]))

    def measured(entry: tuning.Entry, of) -> list:
        tuning._entries[tuning.key(of)] = entry
        tuning.generation += 1
        return shape(plan_problem(problem))

    assert measured(tuning.Entry("unfused"), pair) == [("cuda", ((0, 1),)), ("bmm", ((1, 2),))]
    assert measured(tuning.Entry("fused", "cluster8_rows128x128", 0.2), pair) == [("fused", ((0, 1), (1, 2)))]
    assert measured(tuning.Entry("fused", None, 50.0), pair)[0][0] != "fused"
    for pattern in chain:
        measured(tuning.Entry("einsum", None, 0.01), problem.single(pattern))
    assert shape(plan_problem(problem)) == [("einsum", ((0, 1),)), ("einsum", ((1, 2),))]
    assert plan_problem(problem).cost_s == pytest.approx(2e-5)


def test_a_named_backend_computes_every_factor():
    chain = Chain.butterfly(16)
    chosen = chain.plan(5, torch.float32, "cpu", backend="csr")
    assert shape(chosen) == [("csr", ((q, q + 1),)) for q in range(4)]
    assert chosen.cost_s is None
    with pytest.raises(BackendError, match="backend 'cuda' cannot compute"):
        chain.plan(5, torch.float32, "cpu", backend="cuda")
    with pytest.raises(BackendError, match="backend = 'fast'"):
        chain.plan(5, torch.float32, "cpu", backend="fast")


def test_a_plan_is_a_value():
    chain = Chain.monarch(64, 64, blocks=4)
    first = chain.plan(32, torch.float32, "cpu", "batch_last", "frozen")
    assert first is plan(chain, 32, torch.float32, torch.device("cpu"), Layout.BATCH_LAST, "frozen")
    _cached_plan.cache_clear()
    again = chain.plan(32, torch.float32, "cpu", "batch_last", "frozen")
    assert again is not first
    assert again == first
    assert hash(again) == hash(first)
    assert chain.plan(33, torch.float32, "cpu") != chain.plan(32, torch.float32, "cpu")
    with pytest.raises(ValueError, match="mode = 'fast': expected one of"):
        chain.plan(32, torch.float32, "cpu", mode="fast")
    with pytest.raises(ValueError, match="layout = 'last'"):
        chain.plan(32, torch.float32, "cpu", layout="last")


def test_text(gpu):
    text = plan_problem(on_gpu(Chain.monarch(4096, 4096, 64), 25_088)).explain()
    first, *steps = text.splitlines()
    assert first.startswith("(1,64,64,64)(64,64,64,1), n=25088, bfloat16, batch_first, cuda, inference: about ")
    assert steps[0].startswith("  1. factor 1 (1,64,64,64) and factor 2 (64,64,64,1): fused, about ")
    text = plan_problem(on_gpu(Chain.butterfly(1024), 25_088), "frozen").explain()
    assert re.search(r"factors 1-\d multiplied to \(1,.*\) and factors \d-10 multiplied to \(.*,1\): fused", text)
    text = plan_problem(on_gpu(NOT_CHAINABLE, 1), "frozen").explain()
    assert "1. factors 1-2 as one dense 8 x 8 matrix: cuda, about" in text
    # The last factor reads the input, so it comes first.
    lines = plan_problem(on_cpu(Chain.low_rank(300, 300, 2), 4096), "training").explain().splitlines()
    assert lines[1].startswith("  1. factor 2 (1,2,300,1): ")


# ---- what a plan computes


def weights_of(chain: Chain, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in chain.weight_shapes]


def fake_pair(problem: fused.PairProblem, activation: str):
    """The fused kernel's contract, computed factor by factor."""
    calls.append(problem)

    def product(x, left, right, bias):
        rows = x if problem.layout is Layout.BATCH_FIRST else x.T
        y = ks_chain(
            rows,
            [left, right],
            bias,
            backend="reference",
            activation=activation,
            in_features=problem.in_features,
            out_features=problem.out_features,
        )
        return y if problem.layout is Layout.BATCH_FIRST else y.T.contiguous()

    return product


calls: list[fused.PairProblem] = []


def every_plan(problem: ChainProblem, monkeypatch) -> list[Plan]:
    """All plans of a problem whose steps the present machine, or a fake of the fused kernel, can run."""
    monkeypatch.setattr(fused, "reason_against", lambda pair: None)
    monkeypatch.setattr(auto, "pair_cost_s", lambda pair, tuned=None: 1.0)
    steps = list(_steps(problem, "each call", fuse=True))

    def covers(start: int):
        if start == len(problem.chain):
            yield ()
        for step in steps:
            if step.start == start:
                for rest in covers(step.stop):
                    yield (step, *rest)

    return [Plan(problem, "inference", steps) for steps in covers(0)]


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.spec)
def test_every_plan_computes_the_chain(chain, layout, monkeypatch):
    weights = weights_of(chain)
    x = torch.randn(7, chain.in_features, dtype=torch.float64)
    bias = torch.randn(chain.out_features, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x @ to_dense(weights, chain.in_features, chain.out_features).T + bias)
    problem = on_cpu(chain, 7, layout)
    plans = every_plan(problem, monkeypatch)
    assert len(plans) >= len(chain)
    monkeypatch.setattr(fused, "prepare", fake_pair)
    calls.clear()
    given = x if layout is Layout.BATCH_FIRST else x.T
    for chosen in plans:
        y = prepare(chosen, "gelu")(given, weights, bias)
        torch.testing.assert_close(y if layout is Layout.BATCH_FIRST else y.T, expected, msg=chosen.explain())
        assert y.is_contiguous()
    assert bool(calls) == any(link is not None for link in chain.links)


def test_a_fused_step_gets_the_logical_sizes(monkeypatch):
    chain = Chain.monarch(10, 14, blocks=4, rank=2)
    problem = on_cpu(chain, 3)
    (chosen,) = [p for p in every_plan(problem, monkeypatch) if p.steps[0].backend == "fused"]
    monkeypatch.setattr(fused, "prepare", fake_pair)
    calls.clear()
    prepare(chosen)
    assert [(pair.in_features, pair.out_features) for pair in calls] == [(10, 14)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merged_weights_are_as_exact_as_two_steps(dtype, monkeypatch):
    chain = Chain.butterfly(64)
    weights = weights_of(chain, dtype)
    x = torch.randn(50, 64).to(dtype)
    expected = x.double() @ to_dense([w.double() for w in weights]).T
    bound = tolerance(dtype, 64, n_factors=len(chain))
    for chosen in every_plan(on_cpu(chain, 50, dtype=dtype), monkeypatch):
        if all(step.backend != "fused" for step in chosen.steps):
            y = prepare(chosen)(x, weights, None).double()
            assert (y - expected).norm() <= bound * expected.norm()


def test_gradients_through_a_merged_forward():
    """With ``recompute`` the forward pass may merge; gradients are those of the factors."""
    chain = Chain.butterfly(64)
    n = 4096
    assert any(o.is_derived for o in chain.plan(n, torch.float64, "cpu").operands)
    x = torch.randn(n, 64, dtype=torch.float64, requires_grad=True)
    weights = [w.requires_grad_() for w in weights_of(chain)]
    dy = torch.randn(n, 64, dtype=torch.float64)
    y, expected = ks_chain(x, weights, recompute=True), x @ to_dense(weights).T
    torch.testing.assert_close(y, expected)
    for got, want in zip(
        torch.autograd.grad(y, (x, *weights), dy), torch.autograd.grad(expected, (x, *weights), dy), strict=True
    ):
        torch.testing.assert_close(got, want)


# ---- chosen inside the operator


@pytest.mark.parametrize("layout", list(Layout))
def test_one_dynamic_graph_resolves_a_plan_for_every_batch(layout, monkeypatch):
    """One full graph serves N = 1, 64 and 4,096 with different plans and no recompilation."""
    torch._dynamo.reset()
    chain = Chain.butterfly(256)
    layer = KSLinear(chain, layout=layout, activation="gelu").requires_grad_(False)
    chosen = []
    monkeypatch.setattr(
        prepared, "plan_problem", lambda *arguments: chosen.append(plan_problem(*arguments)) or chosen[-1]
    )
    prepared._plans.clear()
    graphs = []
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    for n in (1, 64, 4096, 3):
        x = torch.randn(n, 256) if layout is Layout.BATCH_FIRST else torch.randn(256, n)
        # Without this, PyTorch itself makes a graph of its own for sizes of 0 and 1, whatever is called in it.
        torch._dynamo.decorators.mark_unbacked(x, 0 if layout is Layout.BATCH_FIRST else 1)
        y = compiled(x)
        rows = (x if layout is Layout.BATCH_FIRST else x.T).double()
        expected = torch.nn.functional.gelu(rows @ layer.to_dense().double().T + layer.bias.double())
        torch.testing.assert_close(
            (y if layout is Layout.BATCH_FIRST else y.T).double(), expected, atol=1e-4, rtol=1e-4
        )
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert [p.problem.n for p in chosen] == [1, 64, 4096, 3]
    assert len({tuple(shape(p)) for p in chosen[:3]}) >= 2


def test_a_layer_explains_itself():
    layer = KSLinear(Chain.butterfly(1024), backend="auto")
    assert layer.plan(4096).mode == "training"
    with torch.no_grad():
        assert layer.plan(4096).mode == "inference"
        assert "multiplied to" in layer.explain(4096)
        assert layer.explain(4096) == layer.plan(4096).explain()
    assert KSLinear(Chain.butterfly(1024), recompute=True).plan(4096).mode == "inference"
    backends = layer.resolved_backends(4096)
    assert len(backends) == 10
    assert backends == layer.plan(4096, "inference").backends


# ---- what a frozen chain holds


def test_forms_respect_the_limit():
    chain = Chain.butterfly(64)
    problem = on_cpu(chain, 1, dtype=torch.float32)
    for limit in (0, 1000, 4000, 8000, 16_384, 10**6):
        first, *others = choose_forms(problem, limit)
        assert not first.derived
        derived = frozenset().union(*(form.derived for form in others))
        assert sum(operand.pattern.nnz * 4 for operand in derived) <= limit
    assert choose_forms(problem, 0)[1:] == ()
    assert choose_forms(problem, 16_384)[1:] != ()


def test_forms_follow_the_batches(gpu):
    problem = on_gpu(Chain.butterfly(1024), 1)
    limit = 2 * 1024**2
    (_, dense) = choose_forms(problem, limit, [1])
    assert dense.chain == Chain.dense(1024, 1024)
    (_, halves) = choose_forms(problem, limit, [25_088])
    assert len(halves.chain) == 2
    assert halves.derived == set(halves.operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_frozen_chain_is_never_expected_to_be_slower_than_dense(gpu, dtype):
    for width_in, width_out, blocks in itertools.product((256, 768, 4096), (256, 1280, 8192), (2, 8, 64)):
        try:
            chain = Chain.monarch(width_in, width_out, blocks)
        except ValueError:
            continue
        for make in (on_gpu, on_cpu):
            problem = make(chain, 1, dtype=dtype)
            forms = choose_forms(problem, chain.dense_params * dtype.itemsize)
            dense = Pattern(1, width_out, width_in, 1)
            for n in (1, 64, 1024, 16_384):
                at = dataclasses.replace(problem, n=n)
                time = min(plan_problem(dataclasses.replace(at, chain=form.chain)).cost_s for form in forms)
                limit = auto.cost_s("dense", at.single(dense))
                assert time <= max(1.05 * limit, limit + 0.5e-6), (chain, n)
