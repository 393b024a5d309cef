"""Every way to compute one chain, ready to be called; its copies have weights of their own."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers.bench.case_rows import DENSE
from structlayers.errors import ConfigError
from structlayers.factorize import to_dense
from structlayers.frozen import FrozenFactors
from structlayers.nn import KSLinear
from structlayers.ops import ks_chain, ks_linear
from structlayers.patterns import Chain
from structlayers.plans import Plan
from structlayers.problem import Layout

PLANNED, FROZEN, UNFUSED, EINSUM_COMPILED, DENSE_FACTOR = (
    "planned",
    "frozen",
    "unfused",
    "einsum, compiled",
    "dense factor",
)
# What each of them is, for the reader of a report.
MEANING = {
    DENSE: "one cuBLAS product with the whole weight (torch.nn.functional.linear)",
    "bmm": "permute and torch.bmm for each factor",
    "einsum": "one torch.einsum for each factor",
    EINSUM_COMPILED: "the same through torch.compile",
    UNFUSED: "one kernel of this project for each factor",
    PLANNED: "KSLinear as it is, backend auto",
    FROZEN: "KSLinear after freeze()",
    DENSE_FACTOR: "this project's kernel on the whole weight as one factor (1, m, n, 1)",
}
CONTENDERS = tuple(MEANING)


@dataclass(frozen=True)
class ChainCall:
    """One contender: ``call(x)``, and ``copy()``, which has weights of its own."""

    call: Callable[[Tensor], Tensor]
    copy: Callable[[], "ChainCall"]
    weight_bytes: int
    resolved: str
    plan: str | None = None
    # The longest sum in it: a plan may multiply factors into one.
    reduction: int = 1
    # What one call reads of the weights, where it is not all of them.
    read_bytes: int | None = None


def build(name: str, chain: Chain, weights: Sequence[Tensor], layout: Layout, n: int) -> ChainCall:
    """The contender ``name`` of a product with ``weights``, one (a, d, b, c) per factor.

    Raises ``ConfigError`` for a name that is none.
    """
    if name == DENSE:
        return _dense(chain, weights, layout)
    if name in (PLANNED, FROZEN):
        return _module(chain, weights, layout, n, name == FROZEN)
    if name == DENSE_FACTOR:
        whole = _whole(chain, weights)
        return _factors(Chain.dense(chain.in_features, chain.out_features), [whole[None, None]], layout, _kernel(whole))
    if name == UNFUSED:
        return _factors(chain, weights, layout, _kernel(weights[0]))
    if name == "bmm":
        return _factors(chain, weights, layout, "bmm")
    if name in ("einsum", EINSUM_COMPILED):
        return _einsum(chain, weights, layout, name == EINSUM_COMPILED)
    raise ConfigError(f"contender {name!r}: expected one of {list(CONTENDERS)}")


def oracle(chain: Chain, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The float64 product of rows ``x`` (R, in_features) with the chain, (R, out_features)."""
    return ks_chain(
        x.double(),
        [weight.double() for weight in weights],
        backend="reference",
        in_features=chain.in_features,
        out_features=chain.out_features,
    )


def _kernel(weight: Tensor) -> str:
    """The project's own kernels where they run; elsewhere the best that there is."""
    return "cuda" if weight.device.type == "cuda" else "auto"


def _whole(chain: Chain, weights: Sequence[Tensor]) -> Tensor:
    # Multiplied out in float64 and rounded once.
    whole = to_dense([weight.double() for weight in weights], chain.in_features, chain.out_features)
    return whole.to(weights[0].dtype)


def _dense(chain: Chain, weights: Sequence[Tensor], layout: Layout) -> ChainCall:
    def of(matrix: Tensor) -> ChainCall:
        def call(x: Tensor) -> Tensor:
            return F.linear(x, matrix) if layout is Layout.BATCH_FIRST else torch.mm(matrix, x)

        return ChainCall(call, lambda: of(matrix.clone()), matrix.nbytes, "torch", reduction=chain.in_features)

    return of(_whole(chain, weights))


def _factors(chain: Chain, weights: Sequence[Tensor], layout: Layout, backend: str) -> ChainCall:
    sizes = [(None, None)] * len(weights)

    def of(weights: Sequence[Tensor]) -> ChainCall:
        def call(x: Tensor) -> Tensor:
            for q in range(len(weights) - 1, -1, -1):
                x = ks_linear(
                    x,
                    weights[q],
                    layout=layout,
                    backend=backend,
                    in_features=chain.in_features if q == len(sizes) - 1 else None,
                    out_features=chain.out_features if q == 0 else None,
                )
            return x

        n_bytes = sum(weight.nbytes for weight in weights)
        longest = max(pattern.c for pattern in chain)
        return ChainCall(call, lambda: of([w.clone() for w in weights]), n_bytes, backend, reduction=longest)

    return of(weights)


def _einsum(chain: Chain, weights: Sequence[Tensor], layout: Layout, compiled: bool) -> ChainCall:
    product = _compiled_einsum() if compiled else einsum_chain

    def of(weights: Sequence[Tensor]) -> ChainCall:
        def call(x: Tensor) -> Tensor:
            return product(x, list(weights), layout is Layout.BATCH_FIRST, chain.in_features, chain.out_features)

        n_bytes = sum(weight.nbytes for weight in weights)
        longest = max(pattern.c for pattern in chain)
        return ChainCall(call, lambda: of([w.clone() for w in weights]), n_bytes, "einsum", reduction=longest)

    return of(weights)


def einsum_chain(x: Tensor, weights: Sequence[Tensor], first: bool, in_features: int, out_features: int) -> Tensor:
    """A chain as a user would write it: ``x`` (N, in_features) or (in_features, N), padded and cut as it must be."""
    a, d, _, c = weights[-1].shape
    missing = a * d * c - in_features
    if missing:
        x = F.pad(x, (0, missing) if first else (0, 0, 0, missing))
    for weight in reversed(weights):
        a, d, b, c = weight.shape
        if first:
            x = torch.einsum("nikl,iljk->nijl", x.reshape(-1, a, c, d), weight).reshape(-1, a * b * d)
        else:
            x = torch.einsum("ikln,iljk->ijln", x.reshape(a, c, d, -1), weight).reshape(a * b * d, -1)
    return x[:, :out_features] if first else x[:out_features]


@cache
def _compiled_einsum() -> Callable[..., Tensor]:
    return torch.compile(einsum_chain, dynamic=False)


def _module(chain: Chain, weights: Sequence[Tensor], layout: Layout, n: int, frozen: bool) -> ChainCall:
    layer = KSLinear(chain, bias=False, layout=layout, device=weights[0].device, dtype=weights[0].dtype)
    with torch.no_grad():
        for factor, weight in zip(layer.factors, weights, strict=True):
            factor.copy_(weight)
    layer.requires_grad_(False).eval()
    if frozen:
        layer.freeze()
    return of_layer(layer, n)


def of_layer(layer: KSLinear, n: int) -> ChainCall:
    """A layer as a contender; ``copy()`` is a deep copy, frozen where the layer is."""
    chosen = layer.plan(n)
    return ChainCall(
        call=layer,
        copy=lambda: of_layer(copy.deepcopy(layer), n),
        weight_bytes=held_bytes(layer),
        resolved=", ".join(dict.fromkeys(chosen.backends)),
        plan=plan_text(chosen),
        reduction=layer.in_features,
        read_bytes=sum(operand.pattern.nnz for operand in chosen.operands) * layer.factors[0].element_size(),
    )


def held_bytes(layer: KSLinear) -> int:
    """Bytes of the weights that a layer holds, and of what was derived from them."""
    bias = 0 if layer.bias is None else layer.bias.nbytes
    if isinstance(layer.factors, FrozenFactors):
        return layer.factors.report.factor_bytes + layer.factors.report.derived_bytes + bias
    return sum(factor.nbytes for factor in layer.factors) + bias


def plan_text(chosen: Plan) -> str:
    """The steps of a plan in the order in which they run, in one line."""
    return "; ".join(f"{' and '.join(map(str, step.operands))}: {step.backend}" for step in reversed(chosen.steps))
