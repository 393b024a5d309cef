"""Linear layers whose weight is a product of Kronecker-sparse factors."""

from structlayers.nn import KSLinear
from structlayers.ops import ks_chain, ks_linear
from structlayers.patterns import Chain, Pattern
from structlayers.problem import Layout

__all__ = ["Chain", "KSLinear", "Layout", "Pattern", "ks_chain", "ks_linear"]
