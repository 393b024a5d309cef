"""The digits: split, normalisation, augmentation."""

import sys

import pytest
import torch

from structlayers.data import DigitsDataModule
from structlayers.data.base import random_flip, random_shift
from structlayers.data.loader import seeded_generator
from structlayers.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def digits():
    data = DigitsDataModule()
    data.setup()
    return data


def keys(images):
    return [image.numpy().tobytes() for image in images]


def test_sizes_and_shapes(digits):
    sizes = {split: len(labels) for split, (_, labels) in digits.splits.items()}
    assert sizes == {"train": 1257, "val": 180, "test": 360}
    x, y = next(iter(digits.train_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((64, 1, 8, 8), torch.float32, (64,), torch.int64)
    assert digits.model_args() == {"input_shape": (1, 8, 8), "num_classes": 10}
    assert digits.task == "classification"


def test_splits_are_disjoint_and_cover_the_set(digits):
    from sklearn.datasets import load_digits

    splits = [set(keys(images)) for images, _ in digits.splits.values()]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert set().union(*splits) == set(keys(torch.from_numpy(load_digits().images)[:, None]))


def test_splits_are_stratified(digits):
    whole = torch.cat([labels for _, labels in digits.splits.values()]).bincount() / 1797
    for _, labels in digits.splits.values():
        assert torch.allclose(labels.bincount() / len(labels), whole, atol=0.01)


def test_split_depends_on_split_seed_alone(digits):
    same, other = DigitsDataModule(seed=5, shift=1), DigitsDataModule(split_seed=1)
    same.setup()
    other.setup()
    assert keys(same.splits["test"][0]) == keys(digits.splits["test"][0])
    assert keys(other.splits["test"][0]) != keys(digits.splits["test"][0])


def test_training_pixels_have_mean_0_and_std_1(digits):
    fetch, size = digits._source("train")
    x, _ = fetch(torch.arange(size), torch.Generator())
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-5


def test_labels_stay_with_their_images(digits):
    images, labels = digits.splits["test"]
    x, y = next(iter(digits.test_dataloader()))
    assert torch.equal(y, labels)
    assert torch.allclose(x * digits.std + digits.mean, images.float(), atol=1e-5)


def test_only_training_is_augmented_and_repeats_by_seed_and_epoch():
    data = DigitsDataModule(shift=1)
    plain = DigitsDataModule(shift=0)
    data.setup()
    plain.setup()

    def epoch(dm, n):
        loader = dm.train_dataloader()
        loader.set_epoch(n)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(epoch(data, 0), epoch(data, 0))
    assert not torch.equal(epoch(data, 0), epoch(plain, 0))
    for a, b in zip(data.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(a[0], b[0])


def test_random_shift_moves_each_image_whole():
    x = torch.zeros(200, 1, 5, 5)
    x[:, :, 2, 2] = 1
    moved = random_shift(x, 1, seeded_generator(0))
    places = {tuple(place) for place in moved.nonzero()[:, 2:].tolist()}
    assert moved.shape == x.shape and moved.sum() == 200
    assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


def test_random_shift_fills_with_zeros_what_leaves_is_gone():
    x = torch.ones(100, 2, 3, 4)
    moved = random_shift(x, 2, seeded_generator(0))
    kept = moved[:, 0].sum((1, 2))
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert set(kept.tolist()) == {rows * columns for rows in (1.0, 2.0, 3.0) for columns in (2.0, 3.0, 4.0)}


def test_random_flip_mirrors_about_half():
    x = torch.tensor([1.0, 2.0, 3.0]).expand(400, 1, 2, 3)
    flipped = (random_flip(x, seeded_generator(0)) == x.flip(-1)).flatten(1).all(1)
    unflipped = (random_flip(x, seeded_generator(0)) == x).flatten(1).all(1)
    assert torch.equal(flipped, ~unflipped) and 150 < flipped.sum() < 250


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: expected an integer of at least 1"),
        ({"eval_batch_size": 1.5}, "eval_batch_size = 1.5"),
        ({"seed": -1}, "seed = -1: expected an integer of at least 0"),
        ({"split_seed": -1}, "split_seed = -1"),
        ({"val_fraction": "abc"}, "val_fraction = 'abc': expected a fraction"),
        ({"shift": 8}, "shift = 8: expected an integer from 0 to 7"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "val_fraction=0.5, test_fraction=0.5"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        DigitsDataModule(**options)


def test_batch_larger_than_the_set_is_named():
    data = DigitsDataModule(batch_size=2000)
    data.setup()
    with pytest.raises(ConfigError, match="batch_size=2000: 1257 training examples"):
        data.train_dataloader()


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        DigitsDataModule().setup()
