"""Builds the CUDA kernels where torch and nvcc are present; everything else is in pyproject.toml.

``STRUCTLAYERS_CUDA=auto|1|0`` decides whether (auto: if torch and nvcc are found; 1: fail if they are not), and
``STRUCTLAYERS_CUDA_ARCHS`` for which architectures, such as ``8.0;9.0a``. torch must be importable, so install
it first and build with ``--no-build-isolation``. The kernels use PyTorch's stable ABI: one build loads in torch 2.11
and later.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.c*") if path.suffix in (".cu", ".cpp"))
# The oldest torch that the library loads in, and its name as an ABI target.
OLDEST_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"
# 9.0a holds the kernels for Hopper's own matrix instructions; the PTX of 8.0 serves every later GPU.
DEFAULT_ARCHS = "8.0+PTX;9.0a"


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME if that is set, else the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return str(candidate) if candidate.exists() else None
    return shutil.which("nvcc")


def why_not() -> str | None:
    """None if the kernels can be built here, else the reason."""
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build; install torch first and use --no-build-isolation"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old; expected {'.'.join(map(str, OLDEST_TORCH))} or later"
    if find_nvcc() is None:
        return "nvcc was not found; put it on the PATH or set CUDA_HOME to the toolkit's folder"
    return None


def wants_kernels() -> bool:
    """What STRUCTLAYERS_CUDA asks for; exits with the reason where it cannot be had."""
    choice = os.environ.get("STRUCTLAYERS_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"STRUCTLAYERS_CUDA = {choice!r}: expected auto, 1 or 0")
    if choice == "0":
        return False
    reason = why_not()
    if choice == "1" and reason is not None:
        sys.exit(f"STRUCTLAYERS_CUDA=1, but {reason}")
    if reason is not None:
        print(f"structlayers: installing without CUDA kernels: {reason}", file=sys.stderr)
    return reason is None


def arch_flags(archs: str) -> list[str]:
    """nvcc flags for a list such as ``8.0+PTX;9.0a``."""
    flags = []
    for arch in archs.replace(",", ";").split(";"):
        number = arch.strip().removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            sys.exit(f"STRUCTLAYERS_CUDA_ARCHS = {archs!r}: expected entries such as 8.0, 9.0a or 9.0+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.strip().endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_flags(torch_package: Path, archs: str) -> list[str]:
    """nvcc flags for one source file."""
    # Compressed, machine code takes a third of the bytes.
    language = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-Xfatbin", "-compress-all", *arch_flags(archs)]
    # However the list spells it.
    if "-gencode=arch=compute_90a,code=sm_90a" in language:
        language.append("-DSTRUCTLAYERS_SM90A")
    return [*language, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA", f"-I{torch_package / 'include'}"]


class BuildKernels(build_ext):
    """Compiles every source with nvcc, a few at a time, and links one library that is no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        nvcc, package = find_nvcc(), Path(torch.__file__).parent
        flags = compile_flags(package, os.environ.get("STRUCTLAYERS_CUDA_ARCHS", DEFAULT_ARCHS))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            objects = [str(Path(folder) / (Path(source).name + ".o")) for source in ext.sources]

            def compile_one(source: str, output: str) -> None:
                subprocess.run([nvcc, *flags, "-c", source, "-o", output], check=True, cwd=ROOT)

            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                list(pool.map(compile_one, ext.sources, objects))
            # Linked beside the target and moved there whole: a killed build leaves no half library.
            partial = target.with_suffix(".partial")
            subprocess.run(
                [nvcc, "-shared", *objects, "-o", str(partial), f"-L{package / 'lib'}", "-ltorch_cpu", "-ldl"],
                check=True,
                cwd=ROOT,
            )
            partial.replace(target)


# Not when the tests import this file.
if __name__ == "__main__":
    kernels = [Extension("structlayers._kernels", SOURCES)] if wants_kernels() else []
    setup(ext_modules=kernels, cmdclass={"build_ext": BuildKernels})
