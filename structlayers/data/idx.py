"""The IDX file format of the MNIST family: big-endian header, then unsigned bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from structlayers.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped (told by its content), as a uint8 tensor of ``ndim`` axes.

    Raises ``DataError``, naming the file and the value, for a wrong magic number, type, number of axes or size, and for
    a truncated gzip stream.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: damaged or truncated gzip file ({error})") from error
    header_bytes = 4 + 4 * ndim
    if len(content) < header_bytes:
        raise DataError(f"{path}: {len(content)} bytes, too short for an IDX header of {header_bytes}")
    magic = int.from_bytes(content[:4], "big")
    expected = _UNSIGNED_BYTE << 8 | ndim
    if magic != expected:
        raise DataError(f"{path}: magic number {magic:#010x}, expected {expected:#010x} (unsigned bytes, {ndim} axes)")
    shape = struct.unpack(f">{ndim}I", content[4:header_bytes])
    if len(content) - header_bytes != math.prod(shape):
        raise DataError(
            f"{path}: {len(content) - header_bytes} bytes of values, expected {math.prod(shape)} for shape {shape}"
        )
    if 0 in shape:
        raise DataError(f"{path}: empty, shape {shape}")
    # bytearray: torch warns about tensors over memory that may not be written
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_bytes).view(shape)


def find_idx(folder: Path, stem: str, ndim: int) -> Path | None:
    """Return the file of an IDX set, such as ``train-images``, under any of its usual names, or None."""
    names = [f"{stem}{separator}idx{ndim}-ubyte{suffix}" for separator in "-." for suffix in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)
