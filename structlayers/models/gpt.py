"""A small decoder-only language model."""

import torch
from torch import Tensor, nn

from structlayers.errors import ConfigError, ShapeError
from structlayers.models._validate import divides, positive
from structlayers.models.transformer import Block, Rotary


class GPT(nn.Module):
    """Causal transformer over tokens: embedding, pre-norm blocks, norm, head.

    Linears: ``blocks.{i}.attention.{q,k,v,out}_proj``, ``blocks.{i}.feed_forward.{up,down}``, ``head``.
    ``positions`` is "rotary" or "learned". ``tie_weights`` shares the embedding's weight with ``head``, which then
    cannot be swapped. Raises ``ConfigError`` if heads does not divide dim, a size is below 1 or positions is unknown.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        positions: str = "rotary",
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        positive(vocab_size=vocab_size, context_length=context_length, dim=dim, depth=depth, heads=heads)
        divides("heads", heads, "dim", dim)
        if positions not in ("rotary", "learned"):
            raise ConfigError(f"positions={positions!r}: expected 'rotary' or 'learned'")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.embed = nn.Embedding(vocab_size, dim)
        # A tied embedding is the head's weight too, so its scale is that of a linear: logits of variance 1.
        scale = dim**-0.5 if tie_weights else 1.0
        nn.init.normal_(self.embed.weight, std=scale)
        self.positions = nn.Parameter(torch.randn(context_length, dim) * scale / 2) if positions == "learned" else None
        rotary = Rotary(dim // heads, context_length) if positions == "rotary" else None
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, dropout, causal=True, rotary=rotary) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tie_weights:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T), T <= context_length, to next-token logits (B, T, vocab_size); else ``ShapeError``."""
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ShapeError(
                f"tokens of shape {tuple(tokens.shape)}: expected (B, T) with T <= context_length={self.context_length}"
            )
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, n_tokens: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue a prompt (B, T), T >= 1, by sampling; returns (B, T + n_tokens), the prompt included.

        Each token sees the last ``context_length`` ones. Temperature 0 takes the most likely token. Dropout follows
        ``self.training``: call ``eval()`` first. Raises ``ShapeError`` for another prompt, ``ConfigError`` for a
        negative temperature. Cost: one forward pass per token.
        """
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise ShapeError(f"prompt of shape {tuple(prompt.shape)}: expected (B, T) with T >= 1")
        if temperature < 0:
            raise ConfigError(f"temperature={temperature}: expected at least 0")
        tokens = prompt
        for _ in range(n_tokens):
            logits = self(tokens[:, -self.context_length :])[:, -1].float()
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens
