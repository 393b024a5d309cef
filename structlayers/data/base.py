"""What the data modules share: sharded loaders, and images kept raw in memory."""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from structlayers.data.loader import Batch, BatchLoader, Fetch
from structlayers.errors import DataError
from structlayers.values import FLAG, check, integer

Split = Literal["train", "val", "test"]


class MemoryDataModule(L.LightningDataModule):
    """Data kept in memory and served in batches (x, y) by ``BatchLoader``.

    ``seed`` fixes shuffling and augmentation, together with the epoch and the batch index. Batch sizes are per process.
    """

    task: ClassVar[str]

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        check(locals(), {"batch_size": integer(1), "eval_batch_size": integer(1), "seed": integer(0)})
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed

    @abstractmethod
    def model_args(self) -> dict[str, Any]:
        """Return the model arguments that the data fix; reads nothing from disk."""

    @abstractmethod
    def _source(self, split: Split) -> tuple[Fetch, int]:
        """Return how to fetch a batch of a split, and its number of examples; called after ``setup``."""

    def _loader(self, split: Split) -> BatchLoader:
        fetch, size = self._source(split)
        training = split == "train"
        trainer = self.trainer
        return BatchLoader(
            fetch,
            size,
            self.batch_size if training else self.eval_batch_size,
            shuffle=training,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            # Not Lightning's set_epoch: it is one too high after a resume at the end of an epoch under max_steps.
            epoch=(lambda: trainer.current_epoch) if trainer else None,
        )

    def train_dataloader(self) -> BatchLoader:
        """Return a new loader over the shuffled training split."""
        return self._loader("train")

    def val_dataloader(self) -> BatchLoader:
        """Return a new loader over the validation split, in order."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Return a new loader over the test split, in order."""
        return self._loader("test")


class ImageDataModule(MemoryDataModule):
    """Labelled grey images, kept raw, normalised per batch to the training split's mean 0 and standard deviation 1.

    Augmentation of the training batches: ``shift`` moves each image by up to that many pixels in both directions, and
    ``flip`` mirrors it left to right with probability 1/2.
    """

    task = "classification"
    input_shape: ClassVar[tuple[int, int, int]]
    num_classes: ClassVar[int]

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int, shift: int, flip: bool) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check(locals(), {"shift": integer(0, min(self.input_shape[1:]) - 1), "flip": FLAG})
        self.shift = shift
        self.flip = flip
        self.splits: dict[Split, Batch] = {}
        self.mean = 0.0
        self.std = 1.0

    @abstractmethod
    def _load(self) -> dict[Split, Batch]:
        """Return images (n, 1, H, W), any number type, and labels (n,) int64 of each split; raises ``DataError``."""

    def model_args(self) -> dict[str, Any]:
        return {"input_shape": self.input_shape, "num_classes": self.num_classes}

    def setup(self, stage: str | None = None) -> None:
        """Read the data once; raises ``DataError`` if they are absent or unreadable."""
        if self.splits:
            return
        splits = self._load()
        for split, (images, labels) in splits.items():
            if tuple(images.shape[1:]) != self.input_shape:
                raise DataError(f"{split} images of shape {tuple(images.shape[1:])}: expected {self.input_shape}")
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise DataError(f"{split} label {int(labels.max())}: expected 0 to {self.num_classes - 1}")
        pixels = splits["train"][0].double()
        self.mean, self.std = pixels.mean().item(), pixels.std().item()
        self.splits = splits

    def _source(self, split: Split) -> tuple[Fetch, int]:
        images, labels = self.splits[split]
        augmented = split == "train"

        def fetch(indices: Tensor, generator: torch.Generator) -> Batch:
            x = images[indices].float()
            if augmented and self.shift:
                x = random_shift(x, self.shift, generator)
            if augmented and self.flip:
                x = random_flip(x, generator)
            return (x - self.mean) / self.std, labels[indices]

        return fetch, len(labels)


def random_shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image of x (B, C, H, W) by -most ... most pixels in both directions, filling with zeros."""
    batch, _, height, width = x.shape
    windows = F.pad(x, (most,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2*most+1, 2*most+1, H, W)
    offsets = torch.randint(0, 2 * most + 1, (2, batch), generator=generator)
    return windows[torch.arange(batch), :, offsets[0], offsets[1]]


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of x (B, C, H, W) left to right with probability 1/2."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)
