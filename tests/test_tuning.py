"""The tuning cache: its keys, its file, and those who share it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings

import pytest
import torch

from structlayers import Layout, Pattern, ks_linear
from structlayers.backends import auto, cuda, resolve, tuning
from structlayers.backends.tuning import Entry
from structlayers.bench import products
from structlayers.bench.results import Result
from structlayers.bench.timing import TimingPlan
from structlayers.bench.tune import fastest, problems_of, tune
from structlayers.errors import BackendError, ConfigError
from structlayers.problem import Problem

PROBLEM = Problem(Pattern(1, 48, 48, 4), 100, torch.float16, "cpu", Layout.BATCH_FIRST)


@pytest.fixture(autouse=True)
def cache_file(tmp_path, monkeypatch):
    """A cache of the test's own, and a CPU that counts as a GPU."""
    path = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv(tuning.ENVIRONMENT, str(path))
    monkeypatch.setattr(tuning, "device_name", lambda problem: "Test GPU")
    monkeypatch.setattr(tuning, "_entries", None)
    yield path
    tuning.generation += 1


def on_disk(path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text())["entries"]


# ---- where it is, and what it is keyed by


def test_the_file_is_named_by_argument_environment_or_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "named.json"))
    assert tuning.cache_path(tmp_path / "argument.json") == tmp_path / "argument.json"
    assert tuning.cache_path() == tmp_path / "named.json"
    monkeypatch.delenv(tuning.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "structlayers" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.cache_path() == tmp_path / "home" / ".cache" / "structlayers" / "tuning.json"


def test_batches_share_buckets():
    assert [tuning.batch_bucket(n) for n in (0, 1, 2, 3, 4, 5, 4096, 4097, 25_088)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        4096,
        8192,
        32768,
    ]


def test_everything_that_matters_is_in_the_key(monkeypatch):
    variants = [
        PROBLEM,
        dataclasses.replace(PROBLEM, pattern=Pattern(4, 48, 48, 1)),
        dataclasses.replace(PROBLEM, n=129),
        dataclasses.replace(PROBLEM, dtype=torch.bfloat16),
        dataclasses.replace(PROBLEM, dtype=torch.float32),
        dataclasses.replace(PROBLEM, dtype=torch.float32, tf32=True),
        dataclasses.replace(PROBLEM, layout=Layout.BATCH_LAST),
    ]
    keys = {tuning.key(problem) for problem in variants}
    monkeypatch.setattr(tuning, "device_name", lambda problem: "Other GPU")
    keys.add(tuning.key(PROBLEM))
    monkeypatch.setattr(tuning, "_version", lambda: "99.0")
    keys.add(tuning.key(PROBLEM))
    assert len(keys) == len(variants) + 2
    assert tuning.key(dataclasses.replace(PROBLEM, n=65)) == tuning.key(dataclasses.replace(PROBLEM, n=128))
    assert tuning.key(dataclasses.replace(PROBLEM, n=0)) is None


def test_nothing_is_tuned_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    assert tuning.device_name(PROBLEM) is None
    assert tuning.key(PROBLEM) is None
    with pytest.raises(BackendError, match=r"cannot tune \(1, 48, 48, 4\), n=100.*CUDA device"):
        tune([PROBLEM])


# ---- the file


def test_entries_come_back(cache_file):
    assert tuning.lookup(PROBLEM) is None
    tuning.store({tuning.key(PROBLEM): Entry("cuda", "run4")})
    assert tuning.lookup(PROBLEM) == Entry("cuda", "run4")
    tuning.load()
    assert tuning.lookup(dataclasses.replace(PROBLEM, n=128)) == Entry("cuda", "run4")
    assert tuning.lookup(dataclasses.replace(PROBLEM, n=129)) is None
    files = {file.name for file in cache_file.parent.iterdir()}
    assert files == {"tuning.json", "tuning.json.lock"}, "no partial file is left"


def test_the_file_is_read_once(cache_file):
    assert tuning.lookup(PROBLEM) is None
    cache_file.parent.mkdir()
    tuning._replace(cache_file, {tuning.key(PROBLEM): Entry("bmm")})
    assert tuning.lookup(PROBLEM) is None
    tuning.load()
    assert tuning.lookup(PROBLEM) == Entry("bmm")


def test_another_version_does_not_read_the_entries_but_keeps_them(cache_file, monkeypatch):
    tuning.store({tuning.key(PROBLEM): Entry("bmm")})
    monkeypatch.setattr(tuning, "_version", lambda: "99.0")
    assert tuning.lookup(PROBLEM) is None
    tuning.store({tuning.key(PROBLEM): Entry("cuda", "run8")})
    assert tuning.lookup(PROBLEM) == Entry("cuda", "run8")
    assert len(on_disk(cache_file)) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format": 1}',
        b'{"format": 0, "entries": {}}',
        b'{"format": 1, "entries": []}',
        b'{"format": 1, "entries": {"x": "bmm"}}',
        b'{"format": 1, "entries": {"x": {"tile": "run4"}}}',
        b'{"format": 1, "entries": {"x": {"backend": 3}}}',
        b'{"format": 1, "entries": {"x": {"backend": "bmm", "tile": ["run4"]}}}',
        b'{"format": 1, "entries": {"x": {"backend": "bmm", "time_ms": "soon"}}}',
        b'{"format": 1, "entries": {"x": {"backend": "bmm", "time_ms": NaN}}}',
        b'{"format": 1, "entries": {"x": {"backend": "bmm", "time_ms": Infinity}}}',
        b'{"format": 1, "entries": {"x": {"backend": "bmm", "time_ms": -0.5}}}',
    ],
)
def test_a_corrupt_file_is_ignored_with_a_warning_and_rebuilt(cache_file, content):
    cache_file.parent.mkdir()
    cache_file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"tuning cache .*tuning.json is ignored"):
        assert tuning.lookup(PROBLEM) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.lookup(PROBLEM) is None, "one warning is enough"
    with pytest.warns(UserWarning, match="is ignored"):
        tuning.store({tuning.key(PROBLEM): Entry("bmm")})
    assert on_disk(cache_file) == {tuning.key(PROBLEM): {"backend": "bmm", "tile": None}}


def test_a_folder_that_cannot_be_written_leaves_this_process_its_entries(cache_file):
    cache_file.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"tuning cache .* (is ignored|is not written)"):
        tuning.store({tuning.key(PROBLEM): Entry("bmm")})
    assert tuning.lookup(PROBLEM) == Entry("bmm")
    assert cache_file.parent.read_text() == "a file where the folder should be"


def test_a_user_without_a_home_has_no_file(monkeypatch):
    for name in (tuning.ENVIRONMENT, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.warns(UserWarning, match=r"tuning cache is ignored: .* STRUCTLAYERS_TUNING_CACHE"):
        assert tuning.lookup(PROBLEM) is None
    with pytest.warns(UserWarning, match=r"tuning cache of this user is not written"):
        tuning.store({tuning.key(PROBLEM): Entry("bmm")})
    assert tuning.lookup(PROBLEM) == Entry("bmm")


WRITER = """
import sys
from structlayers.backends.tuning import Entry, store
for q in range(40):
    store({f"{sys.argv[1]} {q}": Entry("bmm", sys.argv[1])})
"""


def test_two_processes_writing_lose_nothing(cache_file):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in ("one", "two")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert sorted(on_disk(cache_file)) == sorted(f"{name} {q}" for name in ("one", "two") for q in range(40))


# ---- those who read it


def test_auto_and_the_tile_choice_follow_it(monkeypatch):
    problem = dataclasses.replace(PROBLEM, device_type="cuda", capability=(10, 0))
    monkeypatch.setattr(cuda, "reason_against", lambda problem: None)
    assert (resolve("auto", problem).name, cuda.tile_of(problem).name) == ("cuda", "run4_tall")
    tuning.store({tuning.key(problem): Entry("dense", "run2")})
    assert (resolve("auto", problem).name, cuda.tile_of(problem).name) == ("dense", "run2")
    monkeypatch.setattr(cuda, "reason_against", lambda problem: "not built")
    tuning.store({tuning.key(problem): Entry("cuda", "run2")})
    assert resolve("auto", problem).name == auto.choose(problem)


def test_a_call_after_tuning_chooses_anew(monkeypatch):
    chosen = []
    monkeypatch.setattr("structlayers.backends.choose", lambda *arguments: chosen.append(arguments[2]) or "bmm")
    x, w = torch.randn(100, 192), torch.randn(1, 4, 48, 48)
    problem = dataclasses.replace(PROBLEM, dtype=torch.float32)
    for _ in range(3):
        ks_linear(x, w)
    tuning.store({tuning.key(problem): Entry("einsum")})
    for _ in range(3):
        ks_linear(x, w)
    assert chosen == [None, Entry("einsum")]


# ---- tune


def test_problems_are_all_combinations():
    problems = problems_of([Pattern(1, 2, 3, 4)], [1, 5], ["float32", "tf32"], ["batch_first", "batch_last"], "cpu")
    assert len(set(problems)) == 8
    assert [problem.tf32 for problem in problems] == [False] * 4 + [True] * 4
    with pytest.raises(ConfigError, match=r"dtype = 'int8': expected one of float32, tf32"):
        problems_of([Pattern(1, 2, 3, 4)], [1], ["int8"], device="cpu")


def test_tune_stores_the_fastest(cache_file):
    problem = dataclasses.replace(PROBLEM, pattern=Pattern(2, 16, 16, 2), dtype=torch.float32)
    plan = TimingPlan(warmup=1, budget_s=0.0, min_samples=3, max_samples=3)
    ((tuned, entry),) = tune([problem], plan=plan).items()
    assert tuned == problem
    assert entry.backend in ("einsum", "bmm", "dense")
    assert entry.time_ms > 0
    stored = {"backend": entry.backend, "tile": None, "time_ms": entry.time_ms}
    assert on_disk(cache_file) == {tuning.key(problem): stored}


def test_the_fastest_right_result_wins():
    results = [
        Result("einsum", "timed", resolved="einsum", p50_ms=3.0),
        Result("bmm", "disagrees", "wrong", resolved="bmm"),
        Result("dense_built", "timed", resolved="dense", p50_ms=0.9),
        Result("cuda/run2", "timed", resolved="cuda", tile="run2", p50_ms=2.0),
        Result("cuda/run4", "timed", resolved="cuda", tile="run4", p50_ms=1.0),
    ]
    assert fastest(PROBLEM, results) == Entry("dense", "run4")
    assert fastest(PROBLEM, [results[4], results[3], results[0]]) == Entry("cuda", "run4")
    with pytest.raises(BackendError, match=r"no backend computed .*: bmm: wrong"):
        fastest(PROBLEM, [results[1]])


def test_a_wrong_backend_is_never_timed(monkeypatch):
    monkeypatch.setattr(products, "dense_weight", lambda weight: torch.ones(64, 64))
    problem = Problem(Pattern(2, 16, 16, 2), 10, torch.float32, "cpu", Layout.BATCH_FIRST)
    plan = TimingPlan(warmup=1, budget_s=0.0, min_samples=1, max_samples=1)
    dense, bmm, tile = products.time_product(problem, ["dense", "bmm", "cuda/run2"], plan)
    assert (dense.status, dense.p50_ms) == ("disagrees", None)
    assert "relative error" in dense.reason
    assert (bmm.status, bmm.reason) == ("timed", "")
    assert bmm.p50_ms > 0
    assert tile.status == "failed"
    assert "expected cuda" in tile.reason
