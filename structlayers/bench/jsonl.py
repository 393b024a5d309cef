"""JSON lines that a kill cannot spoil: append-only, a last line cut short is nobody's."""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from structlayers.errors import DataError

Entry = TypeVar("Entry")
# What the name of a file compressed by gzip ends with.
COMPRESSED = ".gz"


def compact(value: object) -> object:
    """A row without what is None or empty, and numbers to five digits: a sweep has thousands of rows."""
    if isinstance(value, dict):
        return {name: compact(entry) for name, entry in value.items() if entry not in (None, "")}
    if isinstance(value, list | tuple):
        return [compact(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def check_appendable(path: Path) -> None:
    """Raises ``DataError`` for a compressed file: those are for keeping."""
    if path.suffix == COMPRESSED:
        raise DataError(f"{path}: rows are not added to a compressed file: expected another name than *{COMPRESSED}")


def append_lines(path: Path, values: Sequence[object]) -> None:
    """Append JSON lines, on disk at once, after cutting off a last line that a killed run left unfinished.

    Raises as :func:`check_appendable`, and ``DataError`` where the file cannot be written.
    """
    check_appendable(path)
    lines = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            # A line that another process has half written is no line cut short. Closing the file releases it.
            _lock(file)
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from error


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:
        # Not a POSIX system: one process at a time.
        return
    with contextlib.suppress(OSError):
        # Some network file systems know no locks.
        fcntl.flock(file, fcntl.LOCK_EX)


def read_lines(
    path: Path, parse: Callable[[dict[str, Any]], Entry], what: str, broken: list[str] | None = None
) -> list[Entry]:
    """Entries of a JSON-lines file, plain or ``*.gz``, without a last line cut short; none if there is no file.

    A line that is no ``what`` raises ``DataError``, which names file and line; with ``broken`` its message is added
    there instead, and the others are read.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        if path.suffix == COMPRESSED:
            content = gzip.decompress(content)
        text = content.decode("utf-8", errors="strict" if broken is None else "replace")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], start=1):
        try:
            entries.append(parse(json.loads(line)))
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            message = f"{path}, line {number}: not a {what}: {error}"
            if broken is None:
                raise DataError(message) from error
            broken.append(message)
    return entries
