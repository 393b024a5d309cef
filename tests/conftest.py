"""What every test runs under: one thread, and the same hypothesis examples every time in CI."""

import os

# For the processes that tests start; this one has read it by now if torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

# The products here are tiny: threads that wait for each other on a busy machine make them up to 100 times slower.
torch.set_num_threads(1)

# A first example compiles and allocates, so a deadline would measure the machine.
settings.register_profile("structlayers", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("structlayers")
