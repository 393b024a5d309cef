"""A small vision transformer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from structlayers.errors import ShapeError
from structlayers.models._validate import divides, image_shape, positive
from structlayers.models.transformer import Block


class ViT(nn.Module):
    """Vision transformer: linear patch embedding, learned positions, pre-norm blocks, mean over the patches, head.

    Linears: ``patch_embed``, ``blocks.{i}.attention.{q,k,v,out}_proj``, ``blocks.{i}.feed_forward.{up,down}`` and
    ``head``.
    Raises ``ConfigError`` if patch_size does not divide the image, heads does not divide dim, or a size is below 1.
    Source: Dosovitskiy et al., arXiv:2010.11929; mean pooling after Beyer et al., arXiv:2205.01580.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        patch_size: int = 2,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape(input_shape)
        positive(num_classes=num_classes, patch_size=patch_size, depth=depth)
        divides("patch_size", patch_size, "image height", height)
        divides("patch_size", patch_size, "image width", width)
        self.input_shape = (channels, height, width)
        self.patch_size = patch_size
        n_patches = (height // patch_size) * (width // patch_size)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.patch_embed = nn.Linear(channels * patch_size**2, dim)
        # As large as the embedded patches are: at the usual 0.02 a short training never learns where a patch was.
        self.positions = nn.Parameter(torch.randn(n_patches, dim) * 0.5)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def patches(self, x: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into row-major patches (B, H*W/p^2, C*p^2)."""
        p = self.patch_size
        return x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes); ``ShapeError`` if (C, H, W) is not ``input_shape``."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ShapeError(f"images of shape {tuple(x.shape)}: expected (B, {', '.join(map(str, self.input_shape))})")
        x = self.patch_embed(self.patches(x)) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
