"""The 16-bit batch-last tiles for Hopper: rows of whole 16-byte pieces and rows that begin anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from structlayers import Layout, Pattern
from structlayers._extension import built_for_sm90a, why_missing
from structlayers.backends import cuda
from structlayers.backends.tiles import tiles_for
from structlayers.bench.verify import agreement
from structlayers.problem import Problem
from structlayers.reference import reference
from structlayers.tolerances import tolerance

NO_GPU = "no CUDA device" if not torch.cuda.is_available() else why_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]

DEVICE = torch.device("cuda")
CAPABILITY = (8, 0) if NO_GPU else torch.cuda.get_device_capability()

# Pattern, batch, features that input and output lack, elements before the input in its rows. Weights that stay, that
# stream and that outgrow the L2; b below, at and beyond a tile; c that ends within a step; batches of less than a
# piece, that end within a part, a sector and a tile, and of several tiles a unit.
CASES = (
    ((2, 48, 48, 4), 264, 0, 0),
    ((1, 64, 64, 1), 1031, 0, 3),
    ((3, 72, 136, 2), 520, 1, 0),
    ((2, 200, 41, 3), 999, 2, 1),
    ((1, 130, 265, 1), 23, 0, 0),
    ((1, 96, 329, 2), 777, 3, 5),
    ((1, 9, 25, 5), 7, 0, 0),
    ((1, 31, 24, 3), 1, 0, 0),
    ((4, 127, 61, 3), 25087, 0, 0),
    ((2, 256, 96, 8), 9000, 5, 8),
    ((1, 384, 200, 2), 4099, 0, 0),
    ((1, 300, 600, 1), 4097, 1, 7),
    ((5, 59, 251, 2), 3009, 0, 2),
    ((3, 768, 768, 4), 2304, 0, 0),
    ((3, 760, 776, 4), 2305, 0, 0),
    ((1, 33, 520, 2), 240, 0, 0),
    ((2, 128, 32, 7), 241, 0, 4),
    ((2, 128, 33, 7), 497, 0, 4),
)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype):
    """Bias, activation, logical padding and views, on every such tile; around the input, and in the output, are NaN."""
    entries, n, pads, before = case
    pattern = Pattern(*entries)
    problem = Problem(pattern, n, dtype, "cuda", Layout.BATCH_LAST, capability=CAPABILITY)
    generator = torch.Generator(DEVICE).manual_seed(n)
    ins, outs = pattern.in_features - pads, pattern.out_features - 2 * pads
    x = torch.randn(ins, n, device=DEVICE, dtype=dtype, generator=generator)
    x = F.pad(x, (before, before), value=float("nan"))[:, before : before + n]
    weight = (torch.randn(*pattern.weight_shape, device=DEVICE, generator=generator) * pattern.c**-0.5).to(dtype)
    some_bias = torch.randn(outs, device=DEVICE, dtype=dtype, generator=generator)
    product = reference(F.pad(x.T.double(), (0, pads)), weight.double())[:, :outs]
    tiles = [tile for tile in tiles_for(problem, built_for_sm90a()) if tile.wgmma]
    assert tiles or not built_for_sm90a()
    for bias, activation in ((None, "none"), (some_bias, "none"), (some_bias, "relu"), (None, "gelu")):
        truth = product if bias is None else product + bias.double()
        truth = {"none": truth, "relu": truth.relu(), "gelu": F.gelu(truth)}[activation]
        for tile in tiles:
            torch.full((outs, n), float("nan"), device=DEVICE, dtype=dtype)
            y = cuda.prepare(problem, activation, outs, tile)(x, weight, bias)
            found = agreement(y.T, truth, tolerance(dtype, pattern.c + 1, 2))
            assert found.agrees, f"{tile.name}, {activation}: {found}"
