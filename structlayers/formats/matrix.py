"""A chain with its weights between two permutations: what importers return, and the layer that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structlayers.errors import ShapeError
from structlayers.factorize import to_dense
from structlayers.nn import KSLinear
from structlayers.patterns import Chain
from structlayers.problem import Layout
from structlayers.reference import reference


class PermutedLinear(nn.Module):
    """A :class:`KSLinear` that reads and writes its features in another order.

    ``y = linear(x[..., input_permutation])[..., output_permutation]``, batch-last on the first dimension.
    ``input_permutation``: ``(linear.in_features,)``, a permutation. ``output_permutation``: ``(out_features,)``, one
    different row of ``linear`` per output; the rows that it leaves out are computed and dropped. Either may be None.
    Parameters are those of ``linear``, its bias in the order of ``linear``; the permutations are int64 buffers, saved.
    Raises :class:`ShapeError` if a permutation is none.
    """

    input_permutation: Tensor | None
    output_permutation: Tensor | None

    def __init__(
        self,
        linear: KSLinear,
        input_permutation: Tensor | None = None,
        output_permutation: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        device = linear.factors[0].device
        sizes = (
            ("input_permutation", input_permutation, linear.in_features, True),
            ("output_permutation", output_permutation, linear.out_features, False),
        )
        for name, permutation, size, complete in sizes:
            checked = check_permutation(name, permutation, size, complete)
            self.register_buffer(name, None if checked is None else checked.to(device))

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features if self.output_permutation is None else self.output_permutation.numel()

    @property
    def bias(self) -> Tensor | None:
        """The bias in the order of the outputs, ``(out_features,)``: a copy unless there is nothing to permute."""
        if self.linear.bias is None or self.output_permutation is None:
            return self.linear.bias
        return self.linear.bias[self.output_permutation]

    def forward(self, x: Tensor) -> Tensor:
        axis = -1 if self.linear.layout == Layout.BATCH_FIRST.value else 0
        if self.input_permutation is not None:
            x = x.index_select(axis, self.input_permutation)
        y = self.linear(x)
        return y if self.output_permutation is None else y.index_select(axis, self.output_permutation)

    def to_dense(self) -> Tensor:
        """The weight as a dense ``(out_features, in_features)`` matrix; differentiable."""
        return _permute(self.linear.to_dense(), self.input_permutation, self.output_permutation)


@dataclass(frozen=True, eq=False)
class FactoredMatrix:
    """A matrix ``W = P_out K_1 ... K_L P_in`` as its chain, its weights and two permutations.

    ``y = (x[..., input_permutation] @ (K_1 ... K_L).T)[..., output_permutation]``. ``weights``: one ``(a, d, b, c)``
    per factor, written order. ``input_permutation``: ``(in_features,)``; ``output_permutation``: ``(out_features,)``,
    the row of the chain that each output reads; None stands for the identity, which is stored as None.
    Raises :class:`ShapeError` if weights and chain disagree, dtypes or devices are mixed, or a permutation is none.
    """

    chain: Chain
    weights: tuple[Tensor, ...]
    input_permutation: Tensor | None = None
    output_permutation: Tensor | None = None

    def __post_init__(self) -> None:
        weights = tuple(weight.contiguous() for weight in self.weights)
        shapes = tuple(tuple(weight.shape) for weight in weights)
        if shapes != self.chain.weight_shapes:
            raise ShapeError(f"weights of shapes {list(shapes)}: expected {list(self.chain.weight_shapes)}")
        check_alike({f"weight {q}": weight for q, weight in enumerate(weights, start=1)})
        inputs = check_permutation("input_permutation", self.input_permutation, self.chain.in_features)
        outputs = check_permutation("output_permutation", self.output_permutation, self.chain.out_features, False)
        for name, value in (("weights", weights), ("input_permutation", inputs), ("output_permutation", outputs)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, source: FactoredMatrix | KSLinear | PermutedLinear) -> FactoredMatrix:
        """The matrix of a layer, without its bias and activation; its weights share the layer's memory."""
        if isinstance(source, FactoredMatrix):
            return source
        if isinstance(source, KSLinear):
            return cls(source.chain, tuple(factor.detach() for factor in source.factors))
        if isinstance(source, PermutedLinear):
            weights = tuple(factor.detach() for factor in source.linear.factors)
            return cls(source.linear.chain, weights, source.input_permutation, source.output_permutation)
        raise ShapeError(f"{type(source).__name__}: expected a FactoredMatrix, a KSLinear or a PermutedLinear")

    @property
    def in_features(self) -> int:
        return self.chain.in_features

    @property
    def out_features(self) -> int:
        return self.chain.out_features if self.output_permutation is None else self.output_permutation.numel()

    def to_dense(self) -> Tensor:
        """The dense ``(out_features, in_features)`` matrix, complex ones too; differentiable."""
        chain = self.chain
        if self.weights[0].is_complex():
            # The operators, which to_dense goes through, are for real numbers.
            columns = torch.eye(chain.padded_in_features, dtype=self.weights[0].dtype, device=self.weights[0].device)
            for weight in reversed(self.weights):
                columns = reference(columns, weight)
            dense = columns.T[: chain.out_features, : chain.in_features]
        else:
            dense = to_dense(self.weights, chain.in_features, chain.out_features)
        return _permute(dense, self.input_permutation, self.output_permutation)

    def layer(self, bias: Tensor | None = None, **options: Any) -> KSLinear | PermutedLinear:
        """A layer with a copy of these weights and of ``bias`` ``(out_features,)``: a plain :class:`KSLinear` where no
        permutation is left, else a :class:`PermutedLinear`; ``options`` are those of :class:`KSLinear`.

        Raises :class:`ShapeError` for complex weights, which no layer computes, and for a bias of another size, dtype
        or device.
        """
        first = self.weights[0]
        if not first.dtype.is_floating_point:
            raise ShapeError(f"weights of {first.dtype}: expected a floating-point dtype, the only ones of KSLinear")
        if bias is not None:
            check_alike({"weight 1": first, "bias": bias})
            if tuple(bias.shape) != (self.out_features,):
                raise ShapeError(f"bias of shape {tuple(bias.shape)}: expected ({self.out_features},)")
        # On the meta device nothing is drawn: the values follow.
        linear = KSLinear(self.chain, bias=bias is not None, device="meta", dtype=first.dtype, **options)
        linear.factors = nn.ParameterList(nn.Parameter(weight.detach().clone()) for weight in self.weights)
        if bias is not None:
            rows = bias.detach().clone()
            if self.output_permutation is not None:
                # A row that no output reads has no bias.
                rows = first.new_zeros(self.chain.out_features)
                rows[self.output_permutation.to(first.device)] = bias.detach()
            linear.bias = nn.Parameter(rows)
        if self.input_permutation is None and self.output_permutation is None:
            return linear
        return PermutedLinear(linear, self.input_permutation, self.output_permutation)


def check_tensors(**tensors: tuple[Tensor, str]) -> None:
    """Raise :class:`ShapeError` unless each is a tensor of the dimensions spelt out in its text, all of one dtype and
    device: ``check_tensors(blkdiag1=(blkdiag1, "(k, q, p)"))``."""
    for name, (tensor, dimensions) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"{name} is a {type(tensor).__name__}: expected a tensor {dimensions}")
        if tensor.dim() != dimensions.count(",") + 1 or 0 in tensor.shape:
            raise ShapeError(f"{name} of shape {tuple(tensor.shape)}: expected {dimensions}, each at least 1")
    check_alike({name: tensor for name, (tensor, _) in tensors.items()})


def check_alike(tensors: dict[str, Tensor]) -> None:
    """Raise :class:`ShapeError` unless the tensors have one floating-point or complex dtype and one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            raise ShapeError(f"{name} has dtype {tensor.dtype}: expected a floating-point or complex dtype")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ShapeError(
                f"{name} is {tensor.dtype} on {tensor.device} but {first_name} is {first.dtype} on {first.device}: "
                f"expected one dtype and one device"
            )


def check_permutation(
    name: str, permutation: Tensor | Sequence[int] | None, size: int, complete: bool = True
) -> Tensor | None:
    """The permutation as int64, None for the identity.

    Raises :class:`ShapeError` unless it holds all of 0 to ``size - 1``, or, where it need not be ``complete``,
    different ones of them.
    """
    if permutation is None:
        return None
    indices = torch.as_tensor(permutation)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool or indices.dim() != 1:
        raise ShapeError(
            f"{name} of {indices.dtype} and shape {tuple(indices.shape)}: expected a vector of integers below {size}"
        )
    if indices.is_meta:
        # Without values there is nothing to check, and no identity to recognise.
        return indices
    indices = indices.to(torch.int64)
    length = indices.numel()
    if length > size or length < (size if complete else 1):
        raise ShapeError(f"{name} of length {length}: expected {size if complete else f'1 to {size}'}")
    ordered = indices.sort().values
    if ordered[0] < 0 or ordered[-1] >= size or bool((ordered[1:] == ordered[:-1]).any()):
        raise ShapeError(
            f"{name} has {indices.unique().numel()} different entries from {int(ordered[0])} to {int(ordered[-1])}: "
            f"expected {length} different ones from 0 to {size - 1}"
        )
    if length == size and bool((indices == torch.arange(size, device=indices.device)).all()):
        return None
    return indices


def _permute(dense: Tensor, input_permutation: Tensor | None, output_permutation: Tensor | None) -> Tensor:
    if output_permutation is not None:
        dense = dense[output_permutation.to(dense.device)]
    if input_permutation is not None:
        # Column i of the chain reads input_permutation[i].
        dense = dense[:, input_permutation.to(dense.device).argsort()]
    return dense
