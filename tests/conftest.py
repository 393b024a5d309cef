"""What every test runs under: one thread, and the same hypothesis examples every time in CI."""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

# For the processes that tests start; this one has read it by now if torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# The products here are tiny: threads that wait for each other on a busy machine make them up to 100 times slower.
torch.set_num_threads(1)

# A first example compiles and allocates, so a deadline would measure the machine.
settings.register_profile("structlayers", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("structlayers")


@pytest.fixture(scope="session")
def script():
    """A command at the project's root as a module, by its name: ``script("train")``."""

    @cache
    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # Where the dataclasses of a script look for its names.
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load
