"""How a chain is executed: factor by factor, neighbours multiplied into one, fused pairs, or one dense matrix.

A plan is a pure function of the problem, the tuning cache and what this machine can run: a dynamic programme over the
chain finds the cheapest cut into steps by the costs of :mod:`structlayers.backends.auto`. Sub-chains of chainable
neighbours multiply to exact factors: arXiv:2411.04506.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, pairwise

import torch
from torch import Tensor

from structlayers.backends import auto, cuda, fused, merging, resolve, tuning
from structlayers.backends.fused import PairProblem
from structlayers.backends.prepare import prepare as prepare_factor
from structlayers.backends.tiles import SMALL_BATCH_ROWS
from structlayers.factorize import to_dense
from structlayers.patterns import Chain, Pattern
from structlayers.problem import Layout, Problem

FUSED = "fused"
# Neighbours are multiplied into one factor at every call, at none, or once before.
_MERGING = {"inference": "each call", "training": "never", "frozen": "once"}
MODES = tuple(_MERGING)
# Frozen, a plan on a GPU is to be no slower than the dense layer, so that what is not it must be expected to take at
# most this share of its time, by the costs' errors over 1,780 Monarch layers.
DENSE_PREFERENCE = 0.97

# (x, weights, bias) to the output; x is two-dimensional, weights are those of the whole chain in written order.
ChainProduct = Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]


@dataclass(frozen=True)
class ChainProblem:
    """One product with a chain: all that its plan may depend on."""

    chain: Chain
    n: int
    dtype: torch.dtype
    device_type: str
    layout: Layout
    tf32: bool = False
    device_index: int = 0
    capability: tuple[int, int] = (8, 0)

    @classmethod
    def on(cls, device: torch.device, chain: Chain, n: int, dtype: torch.dtype, layout: Layout) -> ChainProblem:
        """The problem of tensors on ``device``, under the present ``torch.get_float32_matmul_precision()``."""
        single = Problem.on(device, chain[0], n, dtype, layout)
        return cls(chain, n, dtype, device.type, layout, single.tf32, single.device_index, single.capability)

    def single(self, pattern: Pattern) -> Problem:
        """The product with one factor under the same circumstances."""
        return Problem(
            pattern,
            self.n,
            self.dtype,
            self.device_type,
            self.layout,
            self.tf32,
            self.device_index,
            self.capability,
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.chain.spec}, n={self.n}, {dtype}, {self.layout.value}, {self.device_type}"


@dataclass(frozen=True)
class Operand:
    """Factors ``start`` to ``stop - 1`` of a chain as one factor of ``pattern``.

    ``written_out``: the whole chain as one dense block of its logical size, chainable or not.
    """

    start: int
    stop: int
    pattern: Pattern
    written_out: bool = False

    @property
    def is_derived(self) -> bool:
        return self.written_out or self.stop - self.start > 1

    def __str__(self) -> str:
        name = f"factor {self.start + 1}" if self.stop - self.start == 1 else f"factors {self.start + 1}-{self.stop}"
        entries = "({},{},{},{})".format(*self.pattern)
        if self.written_out:
            return f"{name} as one dense {self.pattern.b} x {self.pattern.c} matrix"
        return f"{name} multiplied to {entries}" if self.is_derived else f"{name} {entries}"


def hold(operands: Sequence[Operand], weights: Sequence[Tensor], in_features: int, out_features: int) -> list[Tensor]:
    """What each operand of a chain's weights holds: a weight itself, or a product of several; differentiable."""
    merged = [operand for operand in operands if operand.is_derived and not operand.written_out]
    products = iter(merging.merge([weights[operand.start : operand.stop] for operand in merged]) if merged else ())
    held = []
    for operand in operands:
        if operand.written_out:
            held.append(to_dense(weights, in_features, out_features)[None, None])
        else:
            held.append(next(products) if operand.is_derived else weights[operand.start])
    return held


@dataclass(frozen=True)
class Step:
    """One product of a plan: with one operand, or with two in one kernel. ``cost_s``: estimated or measured seconds."""

    operands: tuple[Operand, ...]
    backend: str
    cost_s: float | None

    @property
    def start(self) -> int:
        return self.operands[0].start

    @property
    def stop(self) -> int:
        return self.operands[-1].stop

    def __str__(self) -> str:
        time = "" if self.cost_s is None else f", about {_time(self.cost_s)}"
        return f"{' and '.join(map(str, self.operands))}: {self.backend}{time}"


@dataclass(frozen=True)
class Plan:
    """The steps that compute one product with a chain, in written order: the last one reads the input.

    ``notes``: why neighbouring steps are not one kernel.
    """

    problem: ChainProblem
    mode: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def cost_s(self) -> float | None:
        """Estimated seconds of all steps; None where a backend was asked for by name."""
        costs = [step.cost_s for step in self.steps]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(operand for step in self.steps for operand in step.operands)

    @property
    def backends(self) -> list[str]:
        """What computes each factor of the chain, in written order."""
        return [step.backend for step in self.steps for _ in range(step.start, step.stop)]

    def explain(self) -> str:
        """The steps in the order in which they run, with what each is expected to take, as text."""
        total = "" if self.cost_s is None else f": about {_time(self.cost_s)}"
        lines = [f"{self.problem}, {self.mode}{total}"]
        lines += [f"  {number}. {step}" for number, step in enumerate(reversed(self.steps), start=1)]
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    __str__ = explain


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


# ---- choosing


def plan(
    chain: Chain,
    n: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layout: str | Layout = "batch_first",
    mode: str = "inference",
    backend: str = "auto",
) -> Plan:
    """How a product of ``chain`` with a batch of ``n`` rows is executed.

    ``mode``: "inference", where neighbours may be multiplied into one factor at every call; "training", where every
    factor is a step, since its input is kept for its weight gradient; "frozen", where neighbours were multiplied into
    one factor before.
    A ``backend`` asked for by name computes every factor. Raises ``ValueError`` for an unknown mode or layout,
    :class:`BackendError` for a backend that is unknown or cannot compute a factor.
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: expected one of {list(MODES)}")
    return plan_problem(ChainProblem.on(torch.device(device), chain, n, dtype, Layout(layout)), mode, backend)


def plan_problem(problem: ChainProblem, mode: str = "inference", backend: str = "auto") -> Plan:
    """:func:`plan` of a problem on any device, present or not."""
    return _cached_plan(problem, mode, backend, tuning.generation)


@lru_cache(maxsize=4096)
def _cached_plan(problem: ChainProblem, mode: str, backend: str, generation: int) -> Plan:
    if backend != "auto":
        steps = [
            Step((Operand(q, q + 1, pattern),), resolve(backend, problem.single(pattern)).name, None)
            for q, pattern in enumerate(problem.chain)
        ]
        return Plan(problem, mode, tuple(steps))
    steps = _cheapest(_steps(problem, _MERGING[mode], fuse=mode != "training"), len(problem.chain))
    return Plan(problem, mode, tuple(steps), tuple(_notes(problem, steps, mode)))


def _cheapest(candidates: Iterator[Step], length: int) -> list[Step]:
    """The steps that cover factors 0 to ``length - 1`` at least cost."""
    ending_at: dict[int, list[Step]] = {}
    for step in candidates:
        ending_at.setdefault(step.stop, []).append(step)
    # The cheapest cover of the first factors, with its cost.
    best: list[tuple[float, list[Step]]] = [(0.0, [])]
    for stop in range(1, length + 1):
        last = min(ending_at[stop], key=lambda step: best[step.start][0] + (step.cost_s or 0.0))
        cost_s, steps = best[last.start]
        best.append((cost_s + (last.cost_s or 0.0), [*steps, last]))
    return best[length][1]


def _steps(problem: ChainProblem, when: str, fuse: bool, most_bytes: float = float("inf")) -> Iterator[Step]:
    """Every step that may be part of a plan; ``when`` neighbours are merged, ``most_bytes`` bounds a derived weight."""
    chain, itemsize = problem.chain, problem.dtype.itemsize
    merged: dict[tuple[int, int], tuple[Operand, float]] = {}
    for operand, merge_s in _operands(problem, when):
        if operand.is_derived and operand.pattern.nnz * itemsize > most_bytes:
            continue
        if not operand.written_out:
            merged[operand.start, operand.stop] = operand, merge_s
        single = problem.single(operand.pattern)
        tuned = tuning.lookup(single)
        alone = (operand.start, operand.stop) == (0, len(chain))
        name = _written_out_backend(single) if operand.written_out else _factor_backend(single, alone)
        cost_s = auto.cost_s(name, single, tuned) + (0.0 if alone else auto.neighbours_lose_s(name, single))
        if operand.written_out and when == "once" and problem.device_type == "cuda":
            cost_s *= DENSE_PREFERENCE
        yield Step((operand,), name, merge_s + cost_s)
    if not fuse:
        return
    for (_, middle), (left, left_s) in merged.items():
        for stop in range(middle + 1, len(chain) + 1):
            if (middle, stop) not in merged:
                continue
            right, right_s = merged[middle, stop]
            pair = _pair(problem, left, right)
            if pair is None or fused.reason_against(pair) is not None:
                continue
            tuned = tuning.lookup(pair)
            if tuned is None or tuned.backend == FUSED:
                yield Step((left, right), FUSED, left_s + right_s + auto.pair_cost_s(pair, tuned))


def _factor_backend(single: Problem, alone: bool) -> str:
    """What ``backend="auto"`` takes, unless by estimate the neighbours lose more by it than it gains on the kernel."""
    name = resolve("auto", single).name
    lost_s = 0.0 if alone else auto.neighbours_lose_s(name, single)
    if lost_s == 0 or tuning.lookup(single) is not None or cuda.reason_against(single) is not None:
        return name
    return "cuda" if auto.cost_s("cuda", single) < auto.cost_s(name, single) + lost_s else name


def _written_out_backend(single: Problem) -> str:
    """One dense matrix is cuBLAS's, but for few rows, where a launch of this project's kernel costs less."""
    few = single.device_type == "cuda" and 0 < single.n <= SMALL_BATCH_ROWS
    if not few or resolve("auto", single).name != "cuda":
        return "dense"
    tuned = tuning.lookup(single)
    cheaper = auto.cost_s("cuda", single, tuned) < DENSE_PREFERENCE * auto.cost_s("dense", single, tuned)
    return "cuda" if cheaper else "dense"


def _operands(problem: ChainProblem, when: str) -> Iterator[tuple[Operand, float]]:
    """The factors and their products, with the seconds that making each takes at a call."""
    chain = problem.chain
    for start, pattern in enumerate(chain):
        yield Operand(start, start + 1, pattern), 0.0
        by_torch_s = 0.0
        for stop in range(start + 2, len(chain) + 1 if when != "never" else 0):
            link = pattern.link(chain[stop - 1])
            if link is None:
                break
            pattern = link.product
            merge_s = 0.0
            if when == "each call":
                by_torch_s += auto.merge_cost_s(link, problem.dtype, problem.device_type)
                n_products = merging.n_products(chain.patterns[start:stop])
                compiled = n_products is not None and cuda.reason_against(problem.single(pattern)) is None
                merge_s = auto.compiled_merge_cost_s(n_products or 0) if compiled else by_torch_s
            yield Operand(start, stop, pattern), merge_s
    if when == "never" or (when == "each call" and chain.is_chainable):
        # Unfrozen, the product of all factors and the dense backend are the same, and cheaper.
        return
    seconds = 0.0
    if when == "each call":
        # As many products as factors, each with as many columns as the input has features.
        columns = ChainProblem(chain, chain.in_features, problem.dtype, problem.device_type, problem.layout)
        seconds = sum(auto.cost_s("bmm", columns.single(pattern)) for pattern in chain)
    yield Operand(0, len(chain), Pattern(1, chain.out_features, chain.in_features, 1), written_out=True), seconds


def _pair(problem: ChainProblem, left: Operand, right: Operand) -> PairProblem | None:
    """Two neighbouring operands as one product; None where they are not chainable."""
    link, chain = left.pattern.link(right.pattern), problem.chain
    if link is None:
        return None
    return PairProblem.of(
        link,
        problem.single(right.pattern),
        in_features=chain.in_features if right.stop == len(chain) else None,
        out_features=chain.out_features if left.start == 0 else None,
    )


def _notes(problem: ChainProblem, steps: Sequence[Step], mode: str) -> Iterator[str]:
    if mode == "training" and len(steps) > 1:
        yield "not fused: the input of every factor is kept for its weight gradient"
        return
    for left, right in pairwise(steps):
        pair = _pair(problem, left.operands[-1], right.operands[0])
        between = f"factors {left.stop} and {right.start + 1}"
        if pair is None:
            yield f"not fused: {between} are not chainable"
        elif reason := fused.reason_against(pair):
            yield f"not fused: {between}: {reason}"
        else:
            yield f"not fused: {between}: separate kernels are expected to be faster"


# ---- executing


def prepare(chosen: Plan, activation: str = "none") -> ChainProduct:
    """The product that a plan describes, bias and activation included, as a function."""
    problem, operands = chosen.problem, chosen.operands
    sizes = problem.chain.in_features, problem.chain.out_features
    products = []
    for step in chosen.steps:
        product = _prepare_step(problem, step, activation if step.start == 0 else "none", sizes[1])
        products.append((product, operands.index(step.operands[0]), operands.index(step.operands[-1]) + 1))
    derives = any(operand.is_derived for operand in operands)
    if len(products) == 1 and not derives:
        # What most calls are; nothing is looked up in them.
        whole = products[0][0]
        return lambda x, weights, bias: whole(x, *weights, bias)

    def multiply(
        x: Tensor,  # (N, in_features), batch-last (in_features, N)
        weights: Sequence[Tensor],  # one (a, d, b, c) per factor, written order
        bias: Tensor | None,  # (out_features,)
    ) -> Tensor:  # (N, out_features), batch-last (out_features, N)
        held = hold(operands, weights, *sizes) if derives else weights
        for product, start, stop in products[:0:-1]:
            x = product(x, *held[start:stop], None)
        product, start, stop = products[0]
        return product(x, *held[start:stop], bias)

    return multiply


def _prepare_step(problem: ChainProblem, step: Step, activation: str, out_features: int) -> Callable[..., Tensor]:
    """The product of a step as a function of x, the weights of its operands, and a bias or None."""
    if step.backend == FUSED:
        pair = _pair(problem, *step.operands)
        assert pair is not None
        return fused.prepare(pair, activation)
    (operand,) = step.operands
    rows = out_features if step.start == 0 else operand.pattern.out_features
    return prepare_factor(problem.single(operand.pattern), activation, rows, step.backend)


# ---- what a frozen chain holds


@dataclass(frozen=True)
class Form:
    """One way to hold a frozen chain: its factors, some of them multiplied into one, or all written out."""

    operands: tuple[Operand, ...]
    chain: Chain

    @classmethod
    def of(cls, chain: Chain, operands: Sequence[Operand]) -> Form:
        held = Chain([operand.pattern for operand in operands], chain.in_features, chain.out_features)
        return cls(tuple(operands), held)

    @property
    def derived(self) -> frozenset[Operand]:
        return frozenset(operand for operand in self.operands if operand.is_derived)

    def __str__(self) -> str:
        return ", ".join(map(str, self.operands)) if self.derived else "the factors"


# The batches that a choice of forms looks at where none are named.
BATCHES = tuple(2**q for q in range(17))
# A frozen layer may be slower than dense by this share or these seconds before that weighs more than anything else.
_SLOWER_SHARE, _SLOWER_S = 0.05, 0.5e-6
# Subsets of more candidates are not tried.
_MOST_CANDIDATES = 10


def choose_forms(problem: ChainProblem, max_bytes: int, batches: Sequence[int] = BATCHES) -> tuple[Form, ...]:
    """What to hold of a frozen chain, so that derived weights take at most ``max_bytes``: the factors, then the rest.

    First no batch of ``batches`` shall be slower than the dense layer, then the mean time over them, each relative to
    that of its best form, shall be least; both by estimate. ``problem.n`` does not matter.
    """
    return _cached_forms(replace(problem, n=1), max_bytes, tuple(dict.fromkeys(batches)), tuning.generation)


@lru_cache(maxsize=1024)
def _cached_forms(problem: ChainProblem, max_bytes: int, batches: tuple[int, ...], generation: int) -> tuple[Form, ...]:
    chain, itemsize = problem.chain, problem.dtype.itemsize
    factors = Form.of(chain, [Operand(q, q + 1, pattern) for q, pattern in enumerate(chain)])
    problems = [replace(problem, n=n) for n in batches]
    candidates = list(dict.fromkeys(_candidate_forms(problems, max_bytes)))[:_MOST_CANDIDATES]
    candidates = [form for form in candidates if form != factors]
    costs = {form: [form_cost_s(form, p) for p in problems] for form in (factors, *candidates)}
    dense = [auto.cost_s("dense", p.single(Pattern(1, chain.out_features, chain.in_features, 1))) for p in problems]
    least = [min(column) for column in zip(*costs.values(), strict=True)]

    def n_bytes(forms: Sequence[Form]) -> int:
        return sum(operand.pattern.nnz for operand in frozenset().union(*(f.derived for f in forms))) * itemsize

    def badness(forms: Sequence[Form]) -> tuple[float, float]:
        times = [min(costs[form][q] for form in (factors, *forms)) for q in range(len(problems))]
        slower = sum(
            max(0.0, time / max(limit * (1 + _SLOWER_SHARE), limit + _SLOWER_S) - 1)
            for time, limit in zip(times, dense, strict=True)
        )
        relative = sum(time / best for time, best in zip(times, least, strict=True)) / len(problems)
        # What gains nothing is not held.
        return slower, relative + 1e-3 * n_bytes(forms) / (chain.dense_params * itemsize)

    subsets = [s for size in range(len(candidates) + 1) for s in combinations(candidates, size)]
    return (factors, *min((s for s in subsets if n_bytes(s) <= max_bytes), key=badness))


def form_cost_s(form: Form, problem: ChainProblem) -> float:
    """Estimated seconds of a product with what a form holds."""
    return plan_problem(replace(problem, chain=form.chain)).cost_s or 0.0


def choose_form(chains: Sequence[Chain], problem: ChainProblem, backend: str = "auto") -> tuple[int, Plan]:
    """Which of the held ``chains`` computes a product soonest, and how; the first where a backend is named."""
    plans = [plan_problem(replace(problem, chain=chain), backend=backend) for chain in chains]
    if backend != "auto":
        return 0, plans[0]
    best = min(range(len(plans)), key=lambda q: plans[q].cost_s or 0.0)
    return best, plans[best]


def _candidate_forms(problems: Sequence[ChainProblem], max_bytes: int) -> Iterator[Form]:
    """The best form of every batch, and of those with derived weights at most a half, a quarter ... as large."""
    for problem in problems:
        most = float(max_bytes)
        while True:
            steps = _cheapest(_steps(problem, "once", True, most), len(problem.chain))
            operands = [operand for step in steps for operand in step.operands]
            yield (form := Form.of(problem.chain, operands))
            if not form.derived:
                break
            # Below the largest weight of this form, so that the next one differs.
            most = max(operand.pattern.nnz for operand in form.derived) * problem.dtype.itemsize / 2
