"""Models built from ``nn.Linear``, so that surgery can swap every linear by its dotted name."""

from structlayers.models.gpt import GPT
from structlayers.models.hub import passage_matcher, timm_model, transformers_model
from structlayers.models.mlp import MLP
from structlayers.models.vit import ViT

__all__ = ["GPT", "MLP", "ViT", "passage_matcher", "timm_model", "transformers_model"]
