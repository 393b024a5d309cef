"""Linear layers whose weight is a product of Kronecker-sparse factors."""

from structlayers.checkpoint import load, save
from structlayers.formats import FactoredMatrix, export_weights, import_weights, layers_from_state_dict
from structlayers.nn import KSLinear, StructuredMLP, freeze, unfreeze
from structlayers.ops import ks_chain, ks_linear
from structlayers.optim import param_groups
from structlayers.patterns import Chain, Pattern
from structlayers.problem import Layout
from structlayers.surgery import SwapReport, densify, swap_linears
from structlayers.swap_rules import SwapRule

__all__ = [
    "Chain",
    "FactoredMatrix",
    "KSLinear",
    "Layout",
    "Pattern",
    "StructuredMLP",
    "SwapReport",
    "SwapRule",
    "densify",
    "export_weights",
    "freeze",
    "import_weights",
    "ks_chain",
    "ks_linear",
    "layers_from_state_dict",
    "load",
    "param_groups",
    "save",
    "swap_linears",
    "unfreeze",
]
