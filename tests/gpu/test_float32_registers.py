"""The float32 tiles that take x to registers, over weights that stay, that stream, and that outgrow the L2."""

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

# Weights that stay and that stream, of whole 16-byte pieces and not, c that ends within a step of k, b beyond one tile.
FLOAT32_REGISTERS = (
    ((2, 64, 64, 4), 900, 0),
    ((2, 256, 256, 16), 1300, 0),
    ((2, 1100, 136, 64), 1100, 0),
    ((3, 768, 768, 4), 1500, 0),
    ((40, 200, 200, 8), 1100, 0),
    ((2, 96, 96, 32), 300, 1),
    ((1, 130, 40, 4), 515, 0),
    ((3, 72, 328, 4), 300, 3),
    ((2, 61, 61, 4), 259, 0),
    ((1, 68, 24, 8), 700, 5),
    ((2, 96, 200, 8), 333, 0),
    ((2, 61, 113, 8), 129, 0),
    ((1, 48, 48, 16), 9000, 0),
    ((2, 132, 72, 24), 515, 0),
    ((1, 64, 520, 64), 200, 7),
    ((2, 100, 37, 40), 193, 0),
    ((2, 72, 104, 2), 1100, 2),
    ((1, 200, 520, 2), 260, 0),
    ((3, 100, 68, 1), 1025, 4),
    ((2, 80, 260, 1), 770, 0),
    ((1, 1, 4, 8), 65, 0),
    ((1, 5, 1, 4), 1, 0),
)


@pytest.mark.parametrize("layout", ("batch_first", "batch_last"))
@pytest.mark.parametrize("precision", ("highest", "high"))
@pytest.mark.parametrize("case", FLOAT32_REGISTERS, ids=str)
def test_values(case, precision, layout):
    """Bias, activation, logical padding and rows that lie apart, on every such tile; outputs begin as NaN."""
    entries, n, pads = case
    pattern, first = Pattern(*entries), layout == "batch_first"
    problem = Problem(pattern, n, torch.float32, "cuda", Layout(layout), precision == "high", capability=CAPABILITY)
    generator = torch.Generator(DEVICE).manual_seed(n)
    ins, outs = pattern.in_features - 4 * pads, pattern.out_features - pads
    rows = torch.randn(n, ins, device=DEVICE, generator=generator)
    weight = torch.randn(*pattern.weight_shape, device=DEVICE, generator=generator) * pattern.c**-0.5
    some_bias = torch.randn(outs, device=DEVICE, generator=generator)
    product = reference(F.pad(rows, (0, 4 * pads)).double(), weight.double())[:, :outs]
    x = rows if first else rows.T.contiguous()
    around = F.pad(x, (4, 8), value=float("nan"))
    for apart, bias, activation in ((False, None, "none"), (True, some_bias, "gelu"), (True, some_bias, "none")):
        truth = product if bias is None else product + bias.double()
        truth = F.gelu(truth) if activation == "gelu" else truth
        bound = tolerance(torch.float32, pattern.c + 1, 2, float32_precision=precision)
        for tile in tiles_for(problem, built_for_sm90a()):
            if not tile.registers:
                continue
            torch.full((n, outs), float("nan"), device=DEVICE)
            y = cuda.prepare(problem, activation, outs, tile)(around[:, 4:-8] if apart else x, weight, bias)
            found = agreement(y if first else y.T, truth, bound)
            assert found.agrees, f"{tile.name}, {activation}: {found}"
