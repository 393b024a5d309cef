"""Checkpoints: written whole or not at all, read with errors that say what is wrong."""

import os

import pytest
import torch

from structlayers.errors import CheckpointError
from structlayers.lit import AtomicCheckpointIO, check_matches, find_checkpoint, read_checkpoint
from structlayers.models import MLP
from structlayers.surgery import swap_linears


def model(blocks=None, width=64):
    found = MLP((1, 8, 8), 10, width=width, depth=2)
    if blocks:
        swap_linears(found, {"structure": "monarch", "options": {"blocks": blocks}, "exclude": ["head"]})
    return found


CONFIG = {"model": {}, "structure": {}, "data": {}}


def checkpoint_of(found):
    return {
        "state_dict": {f"model.{name}": value for name, value in found.state_dict().items()},
        "hyper_parameters": {"task": "classification", "model_args": {}, "config": CONFIG},
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint_of(model(4)), path)
    return path


def test_round_trip(path):
    found = model(4)
    checkpoint = read_checkpoint(path)
    check_matches(checkpoint, found, path)
    assert checkpoint["hyper_parameters"]["config"] == CONFIG
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_run_folder_stands_for_its_checkpoint(tmp_path):
    assert find_checkpoint(str(tmp_path), "last.ckpt") == tmp_path / "checkpoints" / "last.ckpt"
    for file in (tmp_path / "other.ckpt", tmp_path / "absent" / "other.ckpt"):
        assert find_checkpoint(file, "last.ckpt") == file


@pytest.mark.parametrize("fails", ["torch.save", "os.replace", "os.fsync"])
def test_a_failed_write_leaves_the_previous_checkpoint(path, monkeypatch, fails):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch if fails.startswith("torch") else os, fails.split(".")[1], fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint(checkpoint_of(model(8)), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_torch_says_about_a_full_disk_names_the_file(path, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 173760 vs 173648")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: not written, with [\d,]+ bytes free on its disk: "):
        AtomicCheckpointIO().save_checkpoint(checkpoint_of(model(8)), path)
    assert path.read_bytes() == before


def test_the_new_checkpoint_appears_in_one_move(path, monkeypatch):
    """A kill before the move leaves the old file; the move itself is atomic within a folder."""
    moves = []
    before = path.read_bytes()

    def replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        assert path.read_bytes() == before
        torch.load(source, weights_only=True)
        moves.append(target)

    monkeypatch.setattr(os, "replace", replace)
    AtomicCheckpointIO().save_checkpoint(checkpoint_of(model(8)), path)
    assert moves == [path]


@pytest.mark.parametrize("keep", [0, 10, 1000, -1000, -1])
def test_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"last\.ckpt.*truncated or another kind of file"):
        read_checkpoint(path)


def test_absent_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"best\.ckpt: no such file; expected"):
        read_checkpoint(tmp_path / "best.ckpt")


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(2)},
        torch.zeros(2),
        [1],
        {},
        *({"state_dict": {}, "hyper_parameters": stored} for stored in (None, [], {"lr": 1}, {"config": {}})),
        {"state_dict": {}, "hyper_parameters": {"task": "classification", "model_args": {}, "config": None}},
        {"state_dict": {}, "hyper_parameters": {"task": "classification", "model_args": {}, "config": {"model": {}}}},
        {"state_dict": {}, "hyper_parameters": {"task": "classification", "model_args": 5, "config": CONFIG}},
        {"state_dict": 5, "hyper_parameters": {"task": "classification", "model_args": {}, "config": CONFIG}},
    ],
)
def test_foreign_file(tmp_path, content):
    path = tmp_path / "foreign.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"foreign\.ckpt: not a checkpoint of train\.py"):
        read_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "code.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"config": {}, "model": model()}}, path)
    with pytest.raises(CheckpointError, match=r"code\.ckpt"):
        read_checkpoint(path)


def test_other_structure_is_named_by_its_chains():
    with pytest.raises(CheckpointError) as caught:
        check_matches(checkpoint_of(model(4)), model(8), "last.ckpt")
    message = str(caught.value)
    assert message.startswith("last.ckpt: belongs to another model or structure")
    assert "hidden.1 chain: (1,16,16,4)(4,16,16,1) in the checkpoint, (1,8,8,8)(8,8,8,1) in the model" in message
    assert "\n" not in message


def test_structured_against_dense():
    with pytest.raises(CheckpointError, match=r"hidden\.0 chain: \(1,16,16,4\).*, absent in the model"):
        check_matches(checkpoint_of(model(4)), model(), "last.ckpt")


def test_other_width_shows_the_first_three_differences():
    with pytest.raises(CheckpointError, match=r"\(64, 64\) in the checkpoint.*and \d+ more\)$"):
        check_matches(checkpoint_of(model(width=64)), model(width=32), "last.ckpt")
