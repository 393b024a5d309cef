"""The rules of the house that a machine can check: who imports whom, what an import costs, what files may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "structlayers"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = [*SOURCES, *sorted(ROOT.glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]

# Imports point down only: a module imports from its own line or from one above it.
LAYERS = (
    {"errors", "values", "files", "tolerances"},
    {"sizes"},
    {"patterns"},
    {"problem"},
    {"reference", "_extension", "block_svd", "factorize"},
    {"backends"},
    {"plans"},
    {"prepared", "transformed", "flops"},
    {"ops"},
    {"init", "refine", "data_aware", "transforms"},
    {"frozen"},
    {"nn"},
    {"formats", "epilogues"},
    {"swap_rules", "surgery"},
    {"optim", "checkpoint", "calibrate", "models", "sharding"},
    {"build"},
    {"lit", "data", "bench", "cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".cfg", ".txt", ".cu", ".cuh", ".cpp", ".h"}
# Besides hidden folders, such as .git and .venv.
SKIPPED = {"build", "dist", "outputs", "multirun", "wandb", "venv", "__pycache__"}


def module_of(path: Path) -> str:
    """The line of LAYERS: the first name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, lazy: bool = True) -> set[str]:
    """Dotted names that a file imports; with ``lazy=False`` only those of the module's own body."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if not lazy and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add(node.module)
            if node.module == "structlayers":
                names.update(f"structlayers.{a.name}" for a in node.names if a.name in RANK)
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_every_module_has_a_layer():
    found = {module_of(path) for path in SOURCES} - {"__init__"}
    assert found <= set(RANK), "give a new module its line in LAYERS"
    assert set(RANK) - {"_extension"} <= found, "LAYERS names a module that is gone"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = RANK.get(module_of(path), len(LAYERS))
    # Chain.plan asks the planner when it is called; importing the formulas of patterns.py loads nothing above them.
    up = {"structlayers.plans", "structlayers.problem"} if path.name == "patterns.py" else set()
    for name in imports(path) - up:
        parts = name.split(".")
        if parts[0] == "structlayers" and len(parts) > 1:
            assert RANK[parts[1]] <= own, f"{path.name} imports {name}, which is above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_frameworks_stay_where_they_belong(path):
    used = top_level(imports(path))
    module = module_of(path)
    if module != "cli":
        assert not used & {"hydra", "omegaconf"}, "Hydra belongs to the entry points"
    if module not in {"lit", "data", "cli"}:
        assert not used & {"lightning", "pytorch_lightning", "torchmetrics"}, "Lightning belongs to lit/ and data/"
    if module != "bench":
        assert not used & {"matplotlib", "pynvml"}, "plots and energy belong to bench/"


def test_import_is_light():
    """``import structlayers`` loads no framework and does not wake CUDA."""
    code = """
import sys
import structlayers, torch
heavy = {"lightning", "hydra", "omegaconf", "matplotlib", "sklearn", "rich", "timm", "transformers", "wandb"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not torch.cuda.is_initialized()
assert set(structlayers.__all__) <= set(dir(structlayers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def text_files() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file()
        and path.suffix in TEXT
        and not any(
            part in SKIPPED or part.startswith(".") or part.endswith(".egg-info")
            for part in path.relative_to(ROOT).parts
        )
    ]


def test_no_file_names_a_machine():
    """No absolute path of one machine, no package index: where those are is the user's business."""
    machine = re.compile(r"(?<![\w.}/])/(?:home|root|work|Users|mnt|opt|tmp)/\w+")
    index = re.compile(r"https?://[^\s\"']*(?:simple/?\b|/pypi\b|index-url)|--(?:extra-)?index-url|--trusted-host")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if machine.search(line) or index.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 500
    if path.is_relative_to(PACKAGE) and path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "a module says what it is for"


def test_the_package_prints_nothing():
    for path in SOURCES:
        if module_of(path) in {"lit", "cli", "bench"}:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path.name
