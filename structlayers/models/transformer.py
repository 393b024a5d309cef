"""The pre-norm transformer block that ViT and GPT share.

Linears of a block, the names that swap rules see: ``attention.q_proj``, ``attention.k_proj``, ``attention.v_proj``,
``attention.out_proj``, ``feed_forward.up``, ``feed_forward.down``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structlayers.epilogues import linear_activation
from structlayers.errors import ConfigError
from structlayers.models._validate import divides, hidden_width, positive, probability


class Rotary(nn.Module):
    """Rotary positions: turns each pair (i, i + head_dim/2) of a query or key by an angle linear in its position.

    Source: Su et al., RoFormer, arXiv:2104.09864.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ConfigError(f"head_dim={head_dim}: rotary positions need an even dim / heads")
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)  # (length, head_dim/2)
        # Constants of the architecture, not weights: kept out of the state dict.
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (B, heads, T, head_dim) for positions 0 ... T-1, T <= length; same shape and dtype."""
        cos = self.cos[: x.shape[-2]].to(x.dtype)  # (T, head_dim/2)
        sin = self.sin[: x.shape[-2]].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with separate projections, causal or not."""

    def __init__(self, dim: int, heads: int, causal: bool = False, rotary: Rotary | None = None) -> None:
        super().__init__()
        positive(dim=dim, heads=heads)
        divides("heads", heads, "dim", dim)
        self.heads = heads
        self.causal = causal
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, dim) to (B, T, dim)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, dim/heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Two linears with a GELU between them, one op with the first where that is a structured layer."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim) to (..., dim)."""
        return self.down(linear_activation(self.up, self.activation, x))


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        causal: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        probability(dropout=dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal, rotary)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden_width(dim, mlp_ratio))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, dim) to (B, T, dim)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
