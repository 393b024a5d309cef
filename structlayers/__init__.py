"""Linear layers whose weight is a product of Kronecker-sparse factors."""

from structlayers.checkpoint import load, save
from structlayers.nn import KSLinear
from structlayers.ops import ks_chain, ks_linear
from structlayers.optim import param_groups
from structlayers.patterns import Chain, Pattern
from structlayers.problem import Layout
from structlayers.surgery import SwapReport, swap_linears
from structlayers.swap_rules import SwapRule

__all__ = [
    "Chain",
    "KSLinear",
    "Layout",
    "Pattern",
    "SwapReport",
    "SwapRule",
    "ks_chain",
    "ks_linear",
    "load",
    "param_groups",
    "save",
    "swap_linears",
]
