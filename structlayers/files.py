"""Writing files so that a kill, an error or a full disk leaves what was there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place in one step.

    A reader sees the old file or the new one; whatever ``write`` raises is passed on, and the old file stays.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        # Some writers make their files private to the user; an ordinary file has the mode that the umask gives.
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The file is in place; the rename itself survives a power cut once the folder is on disk too.
    with contextlib.suppress(OSError):
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
