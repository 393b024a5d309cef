"""``torch.export`` of a structured model: saved, and read by another Python process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from structlayers.models import GPT, MLP
from structlayers.surgery import swap_linears

# What another program needs: torch, and our import, which registers the operators.
READER = """
import sys
import torch
import structlayers

program = torch.export.load(sys.argv[1])
with torch.no_grad():
    outputs = [program.module()(x) for x in torch.load(sys.argv[2])]
torch.save(outputs, sys.argv[3])
"""


def gpt() -> nn.Module:
    torch.manual_seed(0)
    model = GPT(256, 16, dim=32, depth=2, heads=2)
    swap_linears(model, {"structure": "monarch", "options": {"blocks": 4}, "include": ["blocks.*"]})
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10, width=50, depth=2)
    # Padded, three factors and more, one of the two recomputing.
    swap_linears(model, {"structure": "butterfly", "options": {"radix": 4}, "include": ["hidden.*"], "max_kept": 2.0})
    model.hidden[1].recompute = True
    return model.eval()


def tokens(n: int) -> Tensor:
    return torch.randint(256, (n, 16), generator=torch.Generator().manual_seed(n))


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))


def export(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    # For inference: with gradients recorded, the intermediates of a chain would be outputs of operators of their own.
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))


@pytest.mark.parametrize(
    ("build", "draw"),
    [pytest.param(gpt, tokens, id="gpt"), pytest.param(mlp, images, id="mlp", marks=pytest.mark.slow)],
)
def test_another_process_gives_the_same_outputs(build, draw, tmp_path):
    model = build()
    program = export(model, draw(3))
    # Chains as wholes: how they are computed is decided where the program runs, from the batch that it gets.
    assert any(str(node.target).startswith("structlayers.ks_chain") for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = [draw(n) for n in (1, 3, 4, 64)]
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    done = subprocess.run([sys.executable, "-c", READER, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        for x, found in zip(inputs, outputs, strict=True):
            assert torch.equal(found, model(x))


def test_the_exported_weights_are_the_factors():
    model = gpt()
    program = export(model, tokens(3))
    assert set(program.state_dict) == set(model.state_dict())


def test_an_exported_model_can_be_trained():
    model = mlp()
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
    twin = program.module()
    for run in (model, twin):
        run(images(7)).square().sum().backward()
    found = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_beyond_the_exported_range_is_refused():
    program = export(mlp(), images(3))
    with pytest.raises(Exception, match="64"):
        program.module()(images(65))
