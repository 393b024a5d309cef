"""Forward and backward passes of whole chains beside dense, every gradient checked before anything is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers.bench.case_rows import DENSE
from structlayers.bench.chain_calls import einsum_chain, plan_text
from structlayers.bench.chain_cases import ChainCase
from structlayers.bench.compare import describe_error, room_to_compile
from structlayers.bench.cost import peak_memory
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.machine import Roofline
from structlayers.bench.products import fill_timings, float32_precision, rows_to_check, without_oracle
from structlayers.bench.results import Result
from structlayers.bench.rows import DISAGREES, FAILED, TIMED
from structlayers.bench.timing import TimingPlan, in_turn, wall_time_ms
from structlayers.bench.tune import DTYPES
from structlayers.bench.verify import agreement
from structlayers.errors import ConfigError
from structlayers.factorize import to_dense
from structlayers.nn import KSLinear
from structlayers.ops import ks_chain
from structlayers.patterns import Chain
from structlayers.problem import Layout
from structlayers.reference import reference
from structlayers.tolerances import tolerance

STRUCTURED, RECOMPUTED, EINSUM_COMPILED = "structured", "recomputed", "einsum, compiled"
MEANING = {
    DENSE: "torch.nn.functional.linear and its autograd",
    "bmm": "permute and torch.bmm for each factor, by this project's autograd",
    EINSUM_COMPILED: "torch.einsum for each factor through torch.compile, by torch's autograd",
    STRUCTURED: "KSLinear as it is, backend auto: the intermediates are kept for the backward pass",
    RECOMPUTED: "KSLinear with recompute=True: they are computed again",
}
CONTENDERS = tuple(MEANING)
CAPTURED, EAGER = "captured step, L2 flushed", "eager step"


@dataclass(frozen=True)
class Step:
    """One forward and backward pass: ``run()`` gives the output, the input gradient and the weight gradients."""

    run: Callable[[], tuple[Tensor, ...]]
    weight_bytes: int
    resolved: str
    plan: str | None = None


def time_training(
    case: ChainCase,
    contenders: Sequence[str],
    device: torch.device,
    plan: TimingPlan,
    energy: EnergyColumn | None = None,
    seed: int = 0,
) -> list[Result]:
    """Check and time a forward and backward pass of ``contenders`` on random data, in their order.

    On CUDA the time is that of a captured step, and ``wall_ms`` that of an eager one; on a CPU both are eager. One
    that fails, or whose output or any gradient disagrees with the float64 oracle, gets no time.
    """
    compiles = room_to_compile(EINSUM_COMPILED in contenders)
    with float32_precision(case.dtype == "tf32"), torch.enable_grad(), compiles:
        return _time_training(case, contenders, device, plan, energy, seed)


def _time_training(
    case: ChainCase,
    contenders: Sequence[str],
    device: torch.device,
    plan: TimingPlan,
    energy: EnergyColumn | None,
    seed: int,
) -> list[Result]:
    layout, chain, n = Layout(case.layout), case.chain, case.n
    first = layout is Layout.BATCH_FIRST
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=DTYPES[case.dtype], device=device)
    try:
        x = draw(n, chain.in_features) if first else draw(chain.in_features, n)
        dy = draw(n, chain.out_features) if first else draw(chain.out_features, n)
        weights = [draw(pattern.weight_shape).mul_(pattern.c**-0.5) for pattern in chain]
        expected = oracle_gradients(chain, weights, x if first else x.T, dy if first else dy.T)
    except Exception as error:  # out of memory: the rows say so, and the next case may be smaller
        return without_oracle(contenders, error, device)

    results: list[Result] = []
    steps: dict[str, Step] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in contenders:
        results.append(result := Result(name))
        try:
            steps[name] = step = build(name, chain, weights, x, dy, layout)
            result.resolved, result.plan, result.weight_bytes = step.resolved, step.plan, step.weight_bytes
            result.error, result.reason = check(step.run(), expected, chain, case, name == DENSE)
            result.status = DISAGREES if result.reason else TIMED
            if result.status == TIMED:
                result.peak_memory_bytes, _ = peak_memory(step.run, device)
                calls[name] = in_turn([step.run], device)
        except Exception as error:  # out of memory, no kernels, a step that cannot be captured: the row says which
            result.status, result.reason = FAILED, describe_error(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    fill_timings(results, calls, device, plan)
    for result in results:
        if result.p50_ms is None:
            continue
        result.wall_ms = wall_time_ms(steps[result.contender].run, device, plan)
        if energy is not None:
            energy.fill(result, calls[result.contender], n, calls=1)
    return results


def build(name: str, chain: Chain, weights: Sequence[Tensor], x: Tensor, dy: Tensor, layout: Layout) -> Step:
    """The step of a contender; raises ``ConfigError`` for a name that is none."""
    own = x.detach().requires_grad_()
    if name == DENSE:
        whole = to_dense([w.double() for w in weights], chain.in_features, chain.out_features).to(x.dtype)
        matrix = whole.requires_grad_()

        def dense(x: Tensor) -> Tensor:
            return F.linear(x, matrix) if layout is Layout.BATCH_FIRST else torch.mm(matrix, x)

        return _step(dense, own, [matrix], dy, "torch")
    if name in (STRUCTURED, RECOMPUTED):
        layer = KSLinear(chain, bias=False, layout=layout, recompute=name == RECOMPUTED, device=x.device, dtype=x.dtype)
        with torch.no_grad():
            for factor, weight in zip(layer.factors, weights, strict=True):
                factor.copy_(weight)
        n = x.shape[0 if layout is Layout.BATCH_FIRST else 1]
        chosen = layer.plan(n)
        resolved = ", ".join(dict.fromkeys(chosen.backends))
        return _step(layer, own, list(layer.factors), dy, resolved, plan_text(chosen))
    factors = [weight.detach().clone().requires_grad_() for weight in weights]
    sizes = (chain.in_features, chain.out_features)
    if name == "bmm":

        def bmm(x: Tensor) -> Tensor:
            columns, rows = sizes
            return ks_chain(x, factors, layout=layout, backend="bmm", in_features=columns, out_features=rows)

        return _step(bmm, own, factors, dy, "bmm")
    if name == EINSUM_COMPILED:
        product = torch.compile(einsum_chain, dynamic=False)
        first = layout is Layout.BATCH_FIRST
        return _step(lambda x: product(x, factors, first, *sizes), own, factors, dy, "einsum")
    raise ConfigError(f"contender {name!r}: expected one of {list(CONTENDERS)}")


def _step(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: list[Tensor],
    dy: Tensor,
    resolved: str,
    plan: str | None = None,
) -> Step:
    def run() -> tuple[Tensor, ...]:
        y = forward(x)
        return (y.detach(), *torch.autograd.grad(y, [x, *parameters], dy))

    return Step(run, sum(p.nbytes for p in parameters), resolved, plan)


@dataclass(frozen=True)
class Gradients:
    """Of one chain in float64: output and input gradient on the rows compared, every weight gradient as a whole."""

    rows: list[int]
    y: Tensor  # (rows, out_features)
    dx: Tensor  # (rows, in_features)
    dweights: list[Tensor]  # each (a, d, b, c)
    ddense: Tensor  # (out_features, in_features), of the product


@torch.no_grad()
def oracle_gradients(chain: Chain, weights: Sequence[Tensor], x: Tensor, dy: Tensor) -> Gradients:
    """The definition of every gradient, block by block in float64; ``x`` (N, in), ``dy`` (N, out)."""
    rows = rows_to_check(x.shape[0])
    factors = [weight.double() for weight in weights]
    inputs = [F.pad(x.double(), (0, chain.padded_in_features - chain.in_features))]
    for factor in reversed(factors):
        inputs.append(reference(inputs[-1], factor))
    y = inputs.pop()[rows, : chain.out_features]
    dense = dy.double().T @ x.double()
    gradient = F.pad(dy.double(), (0, chain.padded_out_features - chain.out_features))
    dweights = []
    for factor in factors:
        dweights.append(_weight_gradient(gradient, inputs.pop(), factor))
        gradient = reference(gradient, factor.transpose(2, 3))
    return Gradients(rows, y, gradient[rows, : chain.in_features], dweights, dense)


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``dw[i, l] = dy[:, block (i, l)].T @ x[:, block (i, l)]``."""
    a, d, b, c = weight.shape
    dw = torch.empty_like(weight)
    for i in range(a):
        for l in range(d):
            dw[i, l] = dy[:, i * b * d + l : (i + 1) * b * d : d].T @ x[:, i * c * d + l : (i + 1) * c * d : d]
    return dw


def check(
    found: tuple[Tensor, ...], expected: Gradients, chain: Chain, case: ChainCase, dense: bool
) -> tuple[float | None, str]:
    """The largest error of output and gradients, and the reason against the first that is wrong, or ""."""
    y, dx, *dweights = (tensor.detach() for tensor in found)
    first = case.layout == "batch_first"
    dtype, precision = y.dtype, torch.get_float32_matmul_precision()
    n_factors = max(len(chain), 2)
    longest = max(chain.in_features, chain.out_features)
    sums = tolerance(dtype, longest, n_factors, float32_precision=precision)
    # A weight gradient sums over the batch what up to L - 1 products have rounded.
    batch_sums = tolerance(dtype, max(case.n, longest), n_factors, float32_precision=precision)
    pairs = [
        ("output", y[expected.rows] if first else y.T[expected.rows], expected.y, sums),
        ("input gradient", dx[expected.rows] if first else dx.T[expected.rows], expected.dx, sums),
    ]
    if dense:
        pairs.append(("weight gradient", dweights[0], expected.ddense, batch_sums))
    else:
        pairs += [
            (f"gradient of factor {q}", own, right, batch_sums)
            for q, (own, right) in enumerate(zip(dweights, expected.dweights, strict=True), start=1)
        ]
    worst: float | None = None
    for name, own, right, bound in pairs:
        agreed = agreement(own, right, bound)
        if agreed.error == agreed.error:
            worst = max(worst or 0.0, agreed.error)
        if agreed.reason:
            return worst, f"{name}: {agreed.reason}"
    if not all(bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in (y, dx)):
        return worst, "an output or input gradient outside the rows compared is NaN or infinite"
    return worst, ""


def training_floor_ms(case: ChainCase, roofline: Roofline) -> float:
    """The least time of a step that keeps no intermediate: x, dy and the factors read for both passes, all results
    written once; three times the FLOPs of the forward pass.
    """
    chain, n, itemsize = case.chain, case.n, DTYPES[case.dtype].itemsize
    # y = f(x): x, y. dx = f'(dy): dy, dx. dw: x and dy once more, unless one kernel computes both.
    moved = n * (2 * chain.in_features + 2 * chain.out_features) + 3 * chain.n_params
    return roofline.floor_ms(moved * itemsize, 3 * chain.flops(n))
