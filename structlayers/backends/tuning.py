"""What was measured to be fastest: one cache file, written by ``structlayers.bench.tune`` and read once per process.

The file is ``$STRUCTLAYERS_TUNING_CACHE``, or ``structlayers/tuning.json`` in the user's cache folder. Ordinary calls
only look entries up; where there is none, the estimates of auto.py and tiles.py decide.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch

from structlayers.files import replace_file
from structlayers.patterns import Pattern
from structlayers.problem import Layout

ENVIRONMENT = "STRUCTLAYERS_TUNING_CACHE"
# Of the file; a file of another format is rebuilt.
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """The fastest backend of a problem, and the fastest tile of the compiled kernels whether or not they are that.

    ``time_ms``: how long that backend took, for the plans of whole chains; estimates serve where it is None. For a
    pair of factors the backend is "fused", or "unfused" where two kernels were faster.
    """

    backend: str
    tile: str | None = None
    time_ms: float | None = field(default=None, compare=False)


class Tunable(Protocol):
    """What names an entry: a :class:`Problem` or a pair of factors on some device."""

    @property
    def patterns(self) -> tuple[Pattern, ...]: ...
    @property
    def n(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def tf32(self) -> bool: ...
    @property
    def device_type(self) -> str: ...
    @property
    def device_index(self) -> int: ...


# What this process knows; None before the file is read. The generation tells those who keep choices that it changed.
_entries: dict[str, Entry] | None = None
generation = 0


def cache_path(path: str | os.PathLike[str] | None = None) -> Path:
    """The cache file: the argument, else ``$STRUCTLAYERS_TUNING_CACHE``, else the one in the user's cache folder.

    Raises ``OSError`` where that takes a home folder and there is none: without HOME, for a user the system does not
    know, as in some containers.
    """
    named, folder = path or os.environ.get(ENVIRONMENT), os.environ.get("XDG_CACHE_HOME")
    try:
        if named:
            return Path(named).expanduser()
        return (Path(folder) if folder else Path.home() / ".cache") / "structlayers" / "tuning.json"
    except RuntimeError as error:
        raise OSError(f"{error} Name a file in {ENVIRONMENT}") from error


def batch_bucket(n: int) -> int:
    """The smallest power of two that is at least ``n``: batches of one bucket share an entry."""
    return 1 << max(n - 1, 0).bit_length()


def key(problem: Tunable) -> str | None:
    """The name of a problem in the cache; None where nothing is tuned: on a CPU, or for an empty batch."""
    device = device_name(problem)
    if device is None or problem.n == 0:
        return None
    dtype = "tf32" if problem.tf32 else str(problem.dtype).removeprefix("torch.")
    patterns = "".join(f"({p.a},{p.b},{p.c},{p.d})" for p in problem.patterns)
    bucket = batch_bucket(problem.n)
    return f"{device}, structlayers {_version()}, {dtype}, {problem.layout.value}, {patterns}, n<={bucket}"


def device_name(problem: Tunable) -> str | None:
    """The GPU of a problem; None on a CPU, where nothing is tuned, and where there is no GPU."""
    return _gpu_name(problem.device_index) if problem.device_type == "cuda" else None


@cache
def _gpu_name(index: int) -> str | None:
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else None


@cache
def _version() -> str:
    try:
        return metadata.version("structlayers")
    except metadata.PackageNotFoundError:
        return "unknown"


def lookup(problem: Tunable) -> Entry | None:
    """What was measured for ``problem``, or for another batch of its bucket; the file is read at the first call."""
    global _entries
    name = key(problem)
    if name is None:
        return None
    if _entries is None:
        _entries = _read_named(None)
    return _entries.get(name)


def load(path: str | os.PathLike[str] | None = None) -> None:
    """Read the cache file again, in place of what this process knew."""
    global _entries, generation
    _entries = _read_named(path)
    generation += 1


def _read_named(path: str | os.PathLike[str] | None) -> dict[str, Entry]:
    try:
        return read(cache_path(path))
    except OSError as error:
        warnings.warn(f"tuning cache is ignored: {error}", stacklevel=3)
        return {}


def read(path: Path) -> dict[str, Entry]:
    """The entries of a cache file; none, with a warning, if it is unreadable or corrupt."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format = {content['format']!r}, expected {FORMAT}")
        entries = {name: Entry(**entry) for name, entry in content["entries"].items()}
        for name, entry in entries.items():
            if not isinstance(entry.backend, str) or not isinstance(entry.tile, str | None):
                raise ValueError(f"{entry} of {name!r}: expected names")
            if entry.time_ms is not None and not 0 < entry.time_ms < float("inf"):
                # NaN too, which no plan could be compared with.
                raise ValueError(f"{entry} of {name!r}: expected a time in milliseconds")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"tuning cache {path} is ignored: {type(error).__name__}: {error}", stacklevel=2)
        return {}
    return entries


def store(entries: Mapping[str, Entry], path: str | os.PathLike[str] | None = None) -> None:
    """Add ``entries``, by :func:`key`, to what this process knows and to the cache file.

    Entries that other processes wrote meanwhile stay. Where the file cannot be written there is a warning.
    """
    global _entries, generation
    _entries = {**(_read_named(path) if _entries is None else _entries), **entries}
    generation += 1
    target: str | Path = "of this user"
    try:
        target = cache_path(path)
        with _locked(target):
            _replace(target, {**read(target), **entries})
    except OSError as error:
        warnings.warn(f"tuning cache {target} is not written: {error}", stacklevel=2)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock file beside ``target``: the replaced file itself cannot be what is locked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        try:
            import fcntl
        except ImportError:
            # Not a POSIX system: the last of two simultaneous writers wins, and the file stays whole.
            yield
            return
        # Closing the file releases it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(target: Path, entries: Mapping[str, Entry]) -> None:
    """Write beside ``target`` and rename, so that a reader sees the old file or the new one."""
    listed = {name: asdict(entry) for name, entry in sorted(entries.items())}
    for entry in listed.values():
        if entry["time_ms"] is None:
            del entry["time_ms"]
    content = {"format": FORMAT, "entries": listed}
    text = json.dumps(content, indent=1)
    replace_file(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))
