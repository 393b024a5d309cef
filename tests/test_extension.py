"""The compiled kernels without a GPU: why they are missing, how they are built, and what is registered for them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from structlayers import Layout, Pattern, _extension
from structlayers.backends import BACKENDS, available_backends, cuda, resolve
from structlayers.errors import BackendError
from structlayers.problem import ACTIVATIONS, Problem

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = Problem(Pattern(2, 3, 4, 5), 6, torch.float16, "cuda", Layout.BATCH_FIRST)


@pytest.fixture
def setup_script() -> ModuleType:
    """setup.py as a module; it builds nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("structlayers_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def forgets_the_library():
    for function in (_extension.why_missing, _extension.built_for_sm90a):
        function.cache_clear()
    yield
    for function in (_extension.why_missing, _extension.built_for_sm90a):
        function.cache_clear()


# ---- finding the library


def test_a_library_that_is_not_built_is_named_with_the_command(tmp_path, monkeypatch, forgets_the_library):
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "_kernels.so")
    reason = _extension.why_missing()
    assert "_kernels.so is absent" in reason
    assert "pip install -e . --no-build-isolation" in reason
    with pytest.raises(BackendError, match=r"'cuda' cannot compute \(2, 3, 4, 5\), n=6, float16.*are not built"):
        resolve("cuda", PROBLEM)
    assert "cuda" not in available_backends(PROBLEM)
    assert resolve("auto", PROBLEM).name in ("bmm", "dense")


def test_a_library_that_does_not_load_says_why(tmp_path, monkeypatch, forgets_the_library):
    library = tmp_path / "_kernels.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(_extension, "LIBRARY", library)
    reason = _extension.why_missing()
    assert "_kernels.so do not load" in reason
    assert "build them again with: pip install" in reason
    with pytest.raises(BackendError, match="do not load"):
        resolve("cuda", PROBLEM)


def test_a_library_without_the_operators_is_no_whole_build(tmp_path, monkeypatch, forgets_the_library):
    # A shared library that loads, as a build without csrc/register.cpp does.
    torch_library = next(Path(torch.__file__).parent.glob("lib/libc10.*"))
    monkeypatch.setattr(_extension, "LIBRARY", torch_library)
    reason = _extension.why_missing()
    assert "structlayers_built_for_sm90a" in reason
    assert _extension.BUILD_COMMAND in reason
    assert not _extension.built_for_sm90a()


def test_the_reason_is_found_once(tmp_path, monkeypatch, forgets_the_library):
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "_kernels.so")
    reason = _extension.why_missing()
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    assert _extension.why_missing() == reason


def test_other_reasons_come_before_the_library(monkeypatch):
    monkeypatch.setattr(cuda, "why_missing", lambda: "not built")
    reason_against = BACKENDS["cuda"].reason_against
    assert reason_against(PROBLEM) == "not built"
    double = Problem(PROBLEM.pattern, 6, torch.float64, "cuda", Layout.BATCH_FIRST)
    assert "no torch.float64: expected one of [torch.float32" in reason_against(double)
    on_cpu = Problem(PROBLEM.pattern, 6, torch.float16, "cpu", Layout.BATCH_FIRST)
    assert reason_against(on_cpu) == "the tensors are on cpu: expected cuda"


def test_a_gpu_too_old_is_named(monkeypatch):
    monkeypatch.setattr(cuda, "why_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (8, 0), 1: (7, 5)}[device])
    cuda.why_device_does_not_serve.cache_clear()
    try:
        assert BACKENDS["cuda"].reason_against(PROBLEM) is None
        on_second = Problem(PROBLEM.pattern, 6, torch.float16, "cuda", Layout.BATCH_FIRST, device_index=1)
        assert BACKENDS["cuda"].reason_against(on_second) == "compute capability 7.5: expected at least 8.0"
    finally:
        cuda.why_device_does_not_serve.cache_clear()


# ---- the operator


def test_the_operator_has_one_schema_for_python_and_the_kernels():
    schema = torch.ops.structlayers.cuda_product.default._schema
    assert str(schema) == (
        "structlayers::cuda_product(Tensor x, Tensor weight, Tensor? bias, int out_features, bool batch_last, "
        "int activation, bool split, int tile) -> Tensor"
    )
    assert not schema.is_mutable
    registration = (ROOT / "csrc" / "register.cpp").read_text()
    assert 'library.impl("cuda_product"' in registration
    arguments = registration.split("Tensor cuda_product(")[1].split(")")[0]
    assert [argument.split()[-1] for argument in arguments.split(",")] == [a.name for a in schema.arguments]


def test_the_operator_has_no_kernel_for_a_cpu():
    x, w = torch.randn(2, 12), torch.randn(1, 3, 4, 4)
    with pytest.raises(NotImplementedError, match="cuda_product"):
        torch.ops.structlayers.cuda_product(x, w, None, 12, False, 0, True, 1)


def test_the_activations_are_numbered_as_in_the_kernels():
    header = (ROOT / "csrc" / "product.h").read_text()
    names = re.findall(r"k(\w+) = (\d+)", header.split("enum Activation")[1].split("}")[0])
    numbers = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): int(number) for name, number in names}
    assert numbers == {name: number for number, name in enumerate(ACTIVATIONS)}


# ---- the build switch


def test_the_switch_is_auto_1_or_0(setup_script, monkeypatch, capsys):
    monkeypatch.setattr(setup_script, "why_not", lambda: None)
    for choice, wanted in (("auto", True), ("1", True), ("0", False)):
        monkeypatch.setenv("STRUCTLAYERS_CUDA", choice)
        assert setup_script.wants_kernels() is wanted
    monkeypatch.delenv("STRUCTLAYERS_CUDA")
    assert setup_script.wants_kernels() is True
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("STRUCTLAYERS_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"STRUCTLAYERS_CUDA = 'yes': expected auto, 1 or 0"):
        setup_script.wants_kernels()


def test_without_a_compiler_auto_says_so_and_1_fails(setup_script, monkeypatch, capsys):
    monkeypatch.setattr(setup_script, "why_not", lambda: "nvcc was not found")
    monkeypatch.setenv("STRUCTLAYERS_CUDA", "auto")
    assert setup_script.wants_kernels() is False
    assert "installing without CUDA kernels: nvcc was not found" in capsys.readouterr().err
    monkeypatch.setenv("STRUCTLAYERS_CUDA", "0")
    assert setup_script.wants_kernels() is False
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("STRUCTLAYERS_CUDA", "1")
    with pytest.raises(SystemExit, match="STRUCTLAYERS_CUDA=1, but nvcc was not found"):
        setup_script.wants_kernels()


def test_the_compiler_is_that_of_cuda_home_or_of_the_path(setup_script, monkeypatch, tmp_path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert setup_script.find_nvcc() == str(compiler)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    assert setup_script.find_nvcc() is None
    assert "set CUDA_HOME" in setup_script.why_not()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script.find_nvcc() == str(compiler)
    assert setup_script.why_not() is None


def test_a_torch_that_is_absent_or_too_old_is_a_reason(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    assert setup_script.why_not() == "torch 2.10.1+cu128 is too old; expected 2.11 or later"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "install torch first and use --no-build-isolation" in setup_script.why_not()


def test_architectures(setup_script):
    assert setup_script.arch_flags("8.0;9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert setup_script.arch_flags(" 9.0a, 12.0 ") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    for wrong in ("", "hopper", "8.0;;9.0", "sm_90"):
        with pytest.raises(SystemExit, match=r"STRUCTLAYERS_CUDA_ARCHS = .*: expected entries such as 8.0"):
            setup_script.arch_flags(wrong)


def test_code_for_hopper_is_named_however_its_architecture_is_spelt(setup_script):
    for archs, expected in (("8.0;9.0a", True), ("90a", True), ("9.0a+PTX", True), ("9.0", False), ("8.0+PTX", False)):
        assert ("-DSTRUCTLAYERS_SM90A" in setup_script.compile_flags(Path("torch"), archs)) is expected, archs


def test_every_source_is_compiled(setup_script):
    names = {Path(source).name for source in setup_script.SOURCES}
    assert "register.cpp" in names
    assert {path.name for path in (ROOT / "csrc").glob("*.cu")} <= names
    assert not any(Path(source).is_absolute() for source in setup_script.SOURCES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("source", ["register.cpp", "bfloat16.cu"])
def test_the_sources_compile(setup_script, source, tmp_path):
    target = tmp_path / "object.o"
    flags = setup_script.compile_flags(Path(torch.__file__).parent, "9.0")
    command = [setup_script.find_nvcc(), *flags, "-c", f"csrc/{source}", "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 1000


def test_a_source_distribution_has_what_the_kernels_are_compiled_from(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "structlayers").mkdir()
    (tree / "structlayers" / "__init__.py").touch()
    # Whether or not there was a compiler where it was made.
    monkeypatch.setenv("STRUCTLAYERS_CUDA", "0")
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as files:
        found = {Path(name).name for name in files.getnames() if "/csrc/" in name}
    assert found >= {path.name for path in (ROOT / "csrc").iterdir()}
