"""Fashion-MNIST (or any set in the same files, such as MNIST) from a local folder."""

from pathlib import Path

import torch
from torch import Tensor

from structlayers.data.base import ImageDataModule, Split
from structlayers.data.idx import find_idx, read_idx
from structlayers.data.loader import Batch, seeded_generator
from structlayers.errors import ConfigError, DataError
from structlayers.values import check, integer

# where Debian's package dataset-fashion-mnist puts them
DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST from the four IDX files in ``data_dir``, plain or gzipped.

    ``val_size`` training images, chosen by ``split_seed``, are held out for validation. Batches: x (B, 1, 28, 28)
    float32, y (B,) int64. Raises ``DataError`` if a file is absent, saying where to get it, or damaged, saying how.
    """

    input_shape = (1, 28, 28)
    num_classes = 10

    def __init__(
        self,
        data_dir: str = DEFAULT_FOLDER,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        seed: int = 0,
        split_seed: int = 0,
        val_size: int = 5000,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, shift, flip)
        check(locals(), {"split_seed": integer(0), "val_size": integer(1)})
        self.data_dir = Path(data_dir).expanduser()
        self.split_seed = split_seed
        self.val_size = val_size

    def _read(self, stem: str, ndim: int) -> Tensor:
        path = find_idx(self.data_dir, stem, ndim)
        if path is None:
            raise DataError(
                f"no {stem}-idx{ndim}-ubyte[.gz] in {self.data_dir}: on Debian and Ubuntu, "
                "apt-get install dataset-fashion-mnist; elsewhere put the four IDX files of "
                "https://github.com/zalandoresearch/fashion-mnist in a folder and set data.data_dir to it"
            )
        return read_idx(path, ndim)

    def _read_set(self, name: str) -> Batch:
        images = self._read(f"{name}-images", ndim=3)[:, None]
        labels = self._read(f"{name}-labels", ndim=1).long()
        if len(images) != len(labels):
            raise DataError(f"{self.data_dir}: {len(images)} {name} images and {len(labels)} labels")
        return images, labels

    def _load(self) -> dict[Split, Batch]:
        images, labels = self._read_set("train")
        test = self._read_set("t10k")
        if self.val_size >= len(labels):
            raise ConfigError(f"val_size={self.val_size}: leaves none of the {len(labels)} training images")
        order = torch.randperm(len(labels), generator=seeded_generator(self.split_seed))
        val, train = order[: self.val_size], order[self.val_size :]
        return {"train": (images[train], labels[train]), "val": (images[val], labels[val]), "test": test}
