"""The pieces of a model that are timed by themselves: one layer, one feed-forward, one transformer block."""

from collections.abc import Sequence

from torch import nn

from structlayers.errors import ConfigError
from structlayers.models.transformer import Block, FeedForward, Rotary

_ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def layer(input_shape: Sequence[int], out_features: int, activation: str = "gelu") -> nn.Module:
    """A linear layer with bias and the activation behind it, on inputs (B, *input_shape): ``0`` is the linear.

    Raises ``ConfigError`` for an unknown activation.
    """
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"activation = {activation!r}: expected one of {', '.join(_ACTIVATIONS)}")
    return nn.Sequential(nn.Linear(input_shape[-1], out_features), _ACTIVATIONS[activation]())


def feed_forward(input_shape: Sequence[int], hidden: int) -> nn.Module:
    """Two linears with a GELU between them, ``0.up`` and ``0.down``, on inputs (B, *input_shape)."""
    return nn.Sequential(FeedForward(input_shape[-1], hidden))


def block(
    input_shape: Sequence[int], heads: int, mlp_ratio: float = 4.0, causal: bool = False, rotary: bool = False
) -> nn.Module:
    """A pre-norm transformer block on inputs (B, T, dim) with ``input_shape`` (T, dim): ``0.attention.q_proj`` ...

    Raises ``ConfigError`` for another shape, or where ``heads`` does not divide dim.
    """
    if len(input_shape) != 2:
        raise ConfigError(f"input_shape = {list(input_shape)}: expected (tokens, dim)")
    length, dim = input_shape
    turn = Rotary(dim // heads, length) if rotary else None
    return nn.Sequential(Block(dim, heads, mlp_ratio, causal=causal, rotary=turn))
