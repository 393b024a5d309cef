"""A plain multi-layer perceptron for images and vectors."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from structlayers.errors import ConfigError
from structlayers.models._validate import positive, probability


class MLP(nn.Module):
    """Multi-layer perceptron: ``depth`` hidden layers of ``width``, then a linear head.

    A hidden layer is linear, layer norm, GELU, dropout. Linears: ``hidden.0`` ... ``hidden.{depth-1}`` and ``head``.
    Raises ``ConfigError`` for sizes below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, width: int = 512, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        if not self.input_shape or any(not isinstance(n, int) or n < 1 for n in self.input_shape):
            raise ConfigError(f"input_shape={self.input_shape}: expected at least one size, each at least 1")
        positive(num_classes=num_classes, width=width, depth=depth)
        probability(dropout=dropout)
        widths = [math.prod(self.input_shape)] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, *input_shape) to logits (B, num_classes)."""
        x = x.flatten(1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = self.dropout(self.activation(norm(linear(x))))
        return self.head(x)
