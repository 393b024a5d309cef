"""IDX files, made in a temporary folder: names, gzip, and every kind of damage."""

import gzip
import struct

import pytest
import torch

from structlayers.data import FashionMNISTDataModule
from structlayers.data.idx import read_idx
from structlayers.errors import ConfigError, DataError


def idx(values):
    values = torch.as_tensor(values, dtype=torch.uint8)
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.numpy().tobytes()


def write_set(folder, separator="-", compress=False, n_train=40, n_test=20, **replace):
    generator = torch.Generator().manual_seed(0)
    for name, n in (("train", n_train), ("t10k", n_test)):
        files = {
            f"{name}-images{separator}idx3-ubyte": torch.randint(0, 256, (n, 28, 28), generator=generator),
            f"{name}-labels{separator}idx1-ubyte": torch.arange(n) % 10,
        }
        for stem, values in files.items():
            content = idx(replace.get(stem.split(separator + "idx")[0].replace("-", "_"), values))
            path = folder / (stem + ".gz" * compress)
            path.write_bytes(gzip.compress(content) if compress else content)
    return FashionMNISTDataModule(str(folder), batch_size=8, val_size=10)


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("compress", [False, True])
def test_reads_every_usual_name(tmp_path, separator, compress):
    data = write_set(tmp_path, separator, compress)
    data.setup()
    assert {split: tuple(images.shape) for split, (images, _) in data.splits.items()} == {
        "train": (30, 1, 28, 28),
        "val": (10, 1, 28, 28),
        "test": (20, 1, 28, 28),
    }
    assert data.splits["test"][1].tolist() == [i % 10 for i in range(20)]
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((8, 1, 28, 28), torch.float32, (8,), torch.int64)
    assert data.model_args() == {"input_shape": (1, 28, 28), "num_classes": 10}


def test_train_and_val_part_the_training_file(tmp_path):
    data = write_set(tmp_path, train_images=torch.arange(40)[:, None, None].expand(40, 28, 28))
    data.setup()
    number = {split: images[:, 0, 0, 0].tolist() for split, (images, _) in data.splits.items()}
    assert sorted(number["train"] + number["val"]) == list(range(40))
    assert data.splits["val"][1].tolist() == [n % 10 for n in number["val"]]
    again = FashionMNISTDataModule(str(tmp_path), seed=3, val_size=10)
    again.setup()
    assert again.splits["val"][0][:, 0, 0, 0].tolist() == number["val"]


def test_values_survive(tmp_path):
    values = torch.arange(24).view(2, 3, 4)
    path = tmp_path / "a"
    path.write_bytes(idx(values))
    assert torch.equal(read_idx(path, ndim=3), values.to(torch.uint8))
    # Gzip is told by content: some tools unpack, some pack, without touching the name.
    path.write_bytes(gzip.compress(idx(values)))
    assert torch.equal(read_idx(path, ndim=3), values.to(torch.uint8))


def damaged():
    good = idx(torch.arange(24).view(2, 3, 4))
    packed = gzip.compress(good)
    return {
        "empty": (b"", "0 bytes, too short"),
        "header cut": (good[:10], "10 bytes, too short for an IDX header of 16"),
        "values cut": (good[:-1], r"23 bytes of values, expected 24 for shape \(2, 3, 4\)"),
        "values too many": (good + b"x", "25 bytes of values, expected 24"),
        "labels for images": (idx(torch.arange(24)), "magic number 0x00000801, expected 0x00000803"),
        "floats": (b"\0\0\x0d\x03" + good[4:], "magic number 0x00000d03, expected 0x00000803"),
        "text": (b"<html>not found</html>", "magic number 0x3c68746d"),
        "no images": (idx(torch.empty(0, 3, 4)), r"empty, shape \(0, 3, 4\)"),
        "gzip cut": (packed[: len(packed) // 2], "damaged or truncated gzip"),
        "gzip header cut": (packed[:5], "damaged or truncated gzip"),
        "gzip checksum": (packed[:-8] + b"\0" * 8, "damaged or truncated gzip"),
        "gzip stream": (packed[:12] + b"\xff" * 6 + packed[18:], "damaged or truncated gzip"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_damage_is_named_with_the_file(tmp_path, kind):
    content, message = damaged()[kind]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte: .*{message}"):
        read_idx(path, ndim=3)


def test_absent_set_says_what_to_install_and_where_to_put_it(tmp_path):
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*data\.data_dir") as caught:
        FashionMNISTDataModule(str(tmp_path / "nowhere")).setup()
    assert "no train-images-idx3-ubyte[.gz]" in str(caught.value) and str(tmp_path / "nowhere") in str(caught.value)


def test_one_absent_file_is_named(tmp_path):
    data = write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no t10k-labels-idx1-ubyte"):
        data.setup()


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"train_labels": torch.zeros(39)}, "40 train images and 39 labels"),
        ({"t10k_labels": torch.full((20,), 10)}, "test label 10: expected 0 to 9"),
        ({"t10k_images": torch.zeros(20, 28, 27)}, r"test images of shape \(1, 28, 27\)"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, replace, message):
    data = write_set(tmp_path, **replace)
    with pytest.raises(DataError, match=message):
        data.setup()
    assert not data.splits


def test_impossible_val_size(tmp_path):
    write_set(tmp_path)
    with pytest.raises(ConfigError, match="val_size = 0"):
        FashionMNISTDataModule(str(tmp_path), val_size=0)
    with pytest.raises(ConfigError, match="val_size=40: leaves none of the 40 training images"):
        FashionMNISTDataModule(str(tmp_path), val_size=40).setup()
