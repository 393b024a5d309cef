"""Models built from ``nn.Linear``, so that surgery can swap every linear by its dotted name."""

from structlayers.models.gpt import GPT
from structlayers.models.hub import timm_model, transformers_model
from structlayers.models.mlp import MLP
from structlayers.models.vit import ViT

__all__ = ["GPT", "MLP", "ViT", "timm_model", "transformers_model"]
