"""What exporters share: why a matrix has no form in another project's layout."""

from __future__ import annotations

from typing import NoReturn, TypeAlias

from structlayers.errors import ChainError
from structlayers.formats.matrix import FactoredMatrix, PermutedLinear
from structlayers.nn import KSLinear

Source: TypeAlias = FactoredMatrix | KSLinear | PermutedLinear


def refuse(layout: str, matrix: FactoredMatrix, reason: str) -> NoReturn:
    """Raise :class:`ChainError` with the chain, the layout's name and the reason."""
    raise ChainError(f"{matrix.chain.spec} has no {layout} form: {reason}")


def without_permutations(layout: str, matrix: FactoredMatrix) -> None:
    """Raise :class:`ChainError` where features are permuted, for a layout that cannot say so."""
    for name in ("input_permutation", "output_permutation"):
        permutation = getattr(matrix, name)
        if permutation is not None:
            first = ", ".join(str(int(index)) for index in permutation[:8])
            dots = ", ..." if permutation.numel() > 8 else ""
            refuse(layout, matrix, f"expected features in the chain's order, found {name} = [{first}{dots}]")


def without_padding(layout: str, matrix: FactoredMatrix) -> None:
    """Raise :class:`ChainError` where the chain is cropped, for a layout that cannot say so."""
    chain = matrix.chain
    if chain.is_padded:
        sizes = f"{chain.padded_in_features} -> {chain.padded_out_features}"
        refuse(layout, matrix, f"expected no padding, found {chain.in_features} -> {chain.out_features} of {sizes}")
