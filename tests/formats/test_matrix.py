"""A chain between two permutations, as a value and as a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structlayers import Chain, FactoredMatrix, KSLinear
from structlayers import load as load_checkpoint
from structlayers import save as save_checkpoint
from structlayers.errors import ShapeError
from structlayers.formats import PermutedLinear, from_btt, from_monarch


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([0, 1, 2], None, "input_permutation of length 3: expected 4"),
        ([0, 1, 2, 2], None, "input_permutation has 3 different entries from 0 to 2: expected 4 different ones from 0"),
        ([1, 2, 3, 4], None, "from 1 to 4: expected 4 different ones from 0 to 3"),
        ([0.0, 1.0, 2.0, 3.0], None, "expected a vector of integers below 4"),
        ([[0, 1], [2, 3]], None, r"shape \(2, 2\): expected a vector"),
        (None, [0, 1, 2, 3, 4, 5, 1], "output_permutation of length 7: expected 1 to 6"),
        (None, [5, -1], "from -1 to 5: expected 2 different ones from 0 to 5"),
        (None, [], "output_permutation of"),
    ],
)
def test_permutations_are_checked(inputs, outputs, message):
    chain = Chain.parse("(1,6,4,1)")
    permutations = [None if p is None else torch.tensor(p) for p in (inputs, outputs)]
    with pytest.raises(ShapeError, match=message):
        FactoredMatrix(chain, (draw(1, 1, 6, 4),), *permutations)
    with pytest.raises(ShapeError, match=message):
        PermutedLinear(KSLinear(chain), *permutations)


def test_a_matrix_checks_its_weights_and_bias():
    chain = Chain.parse("(1,6,4,1)")
    with pytest.raises(ShapeError, match=r"\[\(1, 1, 4, 6\)\]: expected \[\(1, 1, 6, 4\)\]"):
        FactoredMatrix(chain, (draw(1, 1, 4, 6),))
    matrix = FactoredMatrix(chain, (draw(1, 1, 6, 4),))
    with pytest.raises(ShapeError, match=r"bias of shape \(4,\): expected \(6,\)"):
        matrix.layer(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"bias is torch\.float32 on cpu"):
        matrix.layer(torch.zeros(6))


def test_an_imported_layer_owns_its_weights_and_draws_nothing():
    w1, w2, bias = draw(4, 8, 3), draw(4, 5, 8), draw(20)
    state = torch.get_rng_state()
    layer = from_monarch(w1, w2).layer(bias, backend="einsum")
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.backend == "einsum" and layer.training
    with torch.no_grad():
        layer.factors[0].zero_()
    assert w2.abs().min() > 0
    layer(torch.randn(2, 12, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_permuted_layer_is_saved_loaded_compiled_and_batched(tmp_path):
    matrix = from_btt(draw(3, 5, 4), draw(2, 6, 7), torch.randperm(15))
    layer = matrix.layer(draw(14))
    assert isinstance(layer, PermutedLinear)
    x = torch.randn(2, 0, 15, dtype=torch.float64)
    assert layer(x).shape == (2, 0, 14)
    x = torch.randn(2, 3, 15, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    assert layer.to(torch.float32).input_permutation.dtype == torch.int64

    def build() -> torch.nn.Module:
        other = from_btt(draw(3, 5, 4), draw(2, 6, 7), torch.randperm(15)).layer(draw(14))
        return torch.nn.Sequential(other)

    model = torch.nn.Sequential(layer)
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "model.safetensors"), build)
    assert torch.equal(loaded(x.float()), model(x.float()))
