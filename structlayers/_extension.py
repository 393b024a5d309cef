"""Finds the compiled kernels once, and keeps the reason when it cannot."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_kernels.so"
# What csrc/register.cpp exports beside the operators.
_SYMBOL = "structlayers_built_for_sm90a"
BUILD_COMMAND = "pip install -e . --no-build-isolation (with nvcc on the PATH and torch installed)"


@cache
def why_missing() -> str | None:
    """None once the compiled kernels are loaded, else the reason and the command that mends it."""
    if not LIBRARY.exists():
        return f"the CUDA kernels are not built ({LIBRARY.name} is absent); build them with: {BUILD_COMMAND}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CUDA kernels in {LIBRARY.name} do not load: {error}; build them again with: {BUILD_COMMAND}"
    if not hasattr(ctypes.CDLL(str(LIBRARY)), _SYMBOL):
        # A build that was cut short, or one of another project.
        return f"{LIBRARY.name} holds no {_SYMBOL}, so no whole build; build it again with: {BUILD_COMMAND}"
    return None


@cache
def built_for_sm90a() -> bool:
    """Whether the compiled kernels hold code for Hopper's own matrix instructions."""
    return why_missing() is None and bool(getattr(ctypes.CDLL(str(LIBRARY)), _SYMBOL)())
