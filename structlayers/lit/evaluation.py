"""Test metrics of a model that is not being trained."""

import lightning.pytorch as pl
import torch
from torch import nn

from structlayers.lit.module import LitModule


def evaluate(model: nn.Module, task: str, data: pl.LightningDataModule, device: torch.device) -> dict[str, float]:
    """Test metrics of ``model`` on the test split of ``data``, by their names in ``LitModule``; float32."""
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    [metrics] = trainer.test(LitModule(model, task, lr=1.0), datamodule=data, verbose=False)
    return {name.removeprefix("test/"): float(value) for name, value in metrics.items()}
