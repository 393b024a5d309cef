"""Initial values of a chain's factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structlayers.patterns import Chain

RULES = ("variance", "structure")


def factor_std(chain: Chain, rule: str = "variance", gain: float = 1.0) -> list[float]:
    """Standard deviation of the entries of every factor, in written order.

    ``"variance"``: ``1/sqrt(c)`` a factor, so that a unit-variance input keeps unit variance through any number of
    factors, as through a dense layer of standard deviation ``1/sqrt(in_features)``; logical zeros of a padded input
    are made up for. ``"structure"``: ``sqrt(min(b, c))/c`` a factor, the scale of arXiv:2406.06248 for
    structure-aware learning rates. ``gain`` is the standard deviation of the whole product's output.
    Raises ``ValueError`` on an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"init rule = {rule!r}: expected one of {list(RULES)}")
    share = gain ** (1 / len(chain))
    if rule == "variance":
        stds = [share / math.sqrt(p.c) for p in chain]
        stds[-1] *= math.sqrt(chain.padded_in_features / chain.in_features)
        return stds
    return [share * math.sqrt(min(p.b, p.c)) / p.c for p in chain]


@torch.no_grad()
def init_factors_(
    weights: Sequence[Tensor],  # one (a, d, b, c) per factor
    chain: Chain,
    rule: str = "variance",
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Fill the factors in place with zero-mean uniform values of the rule's standard deviation."""
    for weight, std in zip(weights, factor_std(chain, rule, gain), strict=True):
        bound = math.sqrt(3) * std
        weight.uniform_(-bound, bound, generator=generator)
