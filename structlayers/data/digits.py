"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, shipped with scikit-learn."""

from typing import Any

import torch

from structlayers.data.base import ImageDataModule, Split
from structlayers.data.loader import Batch
from structlayers.errors import ConfigError, DataError
from structlayers.values import FRACTION, SEED, check


class DigitsDataModule(ImageDataModule):
    """The digits in a stratified split that only ``split_seed`` changes.

    ``val_fraction`` and ``test_fraction`` are parts of the whole. Batches: x (B, 1, 8, 8) float32, y (B,) int64.
    Raises ``ConfigError`` for fractions that leave a split empty, ``DataError`` if scikit-learn is absent.
    """

    input_shape = (1, 8, 8)
    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        shift: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, shift, flip=False)
        check(locals(), {"split_seed": SEED, "val_fraction": FRACTION, "test_fraction": FRACTION})
        if val_fraction + test_fraction >= 1:
            raise ConfigError(
                f"val_fraction={val_fraction}, test_fraction={test_fraction}: expected both above 0, together below 1"
            )
        self.split_seed = split_seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def _load(self) -> dict[Split, Batch]:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise DataError(f"the digits come with scikit-learn: pip install scikit-learn ({error})") from error
        digits = load_digits()
        labels = digits.target

        def split(indices: Any, option: str, share: float) -> Any:
            try:
                return train_test_split(
                    indices, test_size=share, stratify=labels[indices], random_state=self.split_seed
                )
            except ValueError as error:
                raise ConfigError(
                    f"{option} = {getattr(self, option)!r}: expected all classes in each part ({error})"
                ) from error

        rest, test = split(range(len(labels)), "test_fraction", self.test_fraction)
        train, val = split(rest, "val_fraction", self.val_fraction / (1 - self.test_fraction))
        x = torch.from_numpy(digits.images)[:, None]
        y = torch.from_numpy(labels).long()
        return {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": (x[test], y[test])}
