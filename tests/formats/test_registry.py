"""Layouts by name: every bit through every round trip, what is refused, and whole state dicts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from structlayers import KSLinear, export_weights, import_weights, layers_from_state_dict
from structlayers.errors import ChainError, CheckpointError, ConfigError, ShapeError
from structlayers.formats import FORMATS, from_butterfly, from_monarch
from structlayers.surgery import install

EXAMPLES = {
    "monarch": [(4, 6, 3), (3, 5, 8)],
    "btt": [(3, 5, 6), (2, 9, 7)],
    "butterfly": [(3, 2, 3, 4, 2, 2)],
    "ksmm": [(3, 4, 2, 1), (1, 3, 6, 2)],
    "blast": [(2, 3, 4), (2, 5, 4), (5, 4, 3)],
}


def test_every_format_has_an_example():
    assert set(EXAMPLES) == set(FORMATS)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit: NaN equals itself and -0 differs from 0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.flatten().clone().view(torch.uint8), right.flatten().clone().view(torch.uint8))


SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, 6e4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trips_keep_every_bit(name, dtype):
    """Through a layer too; NaN, infinities and signed zeros included, from strided memory."""
    tensors = []
    for shape in EXAMPLES[name]:
        tensor = torch.randn(*shape, 2, dtype=torch.float64).to(dtype)
        tensor.view(-1, 2)[:8, 0] = torch.tensor(SPECIAL).to(dtype)
        tensors.append(tensor[..., 0])
    assert not tensors[0].is_contiguous()
    matrix = import_weights(name, tensors)
    assert {weight.dtype for weight in matrix.weights} == {dtype}
    assert all(same_bits(a, b) for a, b in zip(export_weights(name, matrix), tensors, strict=False))
    if dtype.is_floating_point:
        back = export_weights(name, matrix.layer(torch.zeros(matrix.out_features, dtype=dtype)))
        assert all(same_bits(a, b) for a, b in zip(back, tensors, strict=False))


@pytest.mark.parametrize("name", EXAMPLES)
def test_wrong_shapes_are_named(name):
    """One axis more, one less, one empty, one size off, an integer, two dtypes."""
    tensors = [draw(*shape) for shape in EXAMPLES[name]]
    first = tensors[0]
    shape = tuple(first.shape)
    wrong = [first[..., None], first[0], first[:0], first.to(torch.int32), first.numpy()]
    for bad in wrong:
        with pytest.raises(ShapeError, match=r"expected .*(each at least 1|a tensor|dtype|\()"):
            import_weights(name, [bad, *tensors[1:]])
    if len(tensors) > 1:
        with pytest.raises((ShapeError, ChainError), match=rf"{shape[0] + 1}"):
            import_weights(name, [torch.cat([first, first[:1]]), *tensors[1:]])
        with pytest.raises(
            ShapeError, match=r"torch.float32 on cpu but .* is torch.float64 on cpu: expected one dtype"
        ):
            import_weights(name, [*tensors[:-1], tensors[-1].float()])


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("monarch", [(4, 6, 3), (3, 5, 7)], r"writes 4\*6 = 24 .* reads 3\*7 = 21: expected k\*q == l\*r"),
        ("btt", [(3, 5, 7), (2, 9, 7)], r"\(3, 5, 7\) .* 7 / 2 and 9 / 3 are not one integer rank"),
        ("btt", [(3, 5, 6), (2, 2, 7)], r"6 / 2 and 2 / 3 are not one integer rank"),
        ("butterfly", [(1, 1, 3, 3, 2, 2)], r"with n/2 = 4 for log n = 3"),
        ("butterfly", [(1, 1, 3, 4, 2, 3)], r"\(1, 1, 3, 4, 2, 3\): expected \(nstacks"),
        ("blast", [(2, 3, 4), (2, 5, 4), (5, 6, 4)], r"C seems to be \(b2, q, r\): transpose its last two axes"),
        ("blast", [(2, 3, 4), (3, 5, 4), (5, 4, 6)], r"\(3, 5, 4\), \(5, 4, 6\): expected \(b1, p, r\)"),
        ("monarch", [(4, 6, 3)], r"monarch of 1 tensors: expected blkdiag1, blkdiag2, .* missing"),
        ("blast", [(2, 3, 4)] * 4, r"blast of 4 tensors: expected B, D, C; too many"),
        ("ksmm", [], "a list of at least one tensor"),
    ],
)
def test_sizes_that_do_not_fit(name, shapes, message):
    with pytest.raises(ShapeError, match=message):
        import_weights(name, [draw(*shape) for shape in shapes])


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match="format = 'monrach': expected one of monarch, btt, butterfly, ksmm, blast"):
        import_weights("monrach", [])
    with pytest.raises(ConfigError, match="format = 'tt': expected one of"):
        export_weights("tt", KSLinear("(1,4,4,1)"))
    with pytest.raises(ShapeError, match="blast of 3 tensors and in_features: expected B, D, C; got an unexpected"):
        import_weights("blast", [draw(1, 1, 1)] * 3, in_features=1)
    with pytest.raises(ShapeError, match="Linear: expected a FactoredMatrix"):
        export_weights("monarch", torch.nn.Linear(4, 4))
    with pytest.raises(ChainError, match="in_features = 13: expected 1 to 12"):
        from_monarch(draw(4, 6, 3), draw(3, 5, 8), in_features=13)
    with pytest.raises(ChainError, match="out_features = 25: expected 1 to 24"):
        from_butterfly(draw(3, 1, 3, 4, 2, 2), out_features=25)


# ---- state dicts


def foreign_state(name: str) -> dict[str, Tensor]:
    """Two layers as the other project keeps them, one of them without a bias, beside tensors of other kinds."""
    state: dict[str, Tensor] = {"embed.weight": draw(5, 5), "norm.bias": draw(5)}
    keys = {
        "monarch": ["blkdiag1", "blkdiag2"],
        "btt": ["op_params.0", "op_params.1"],
        "butterfly": ["twiddle"],
        "ksmm": ["factors.0", "factors.1"],
        "blast": ["B", "D", "C"],
    }[name]
    for layer in ("blocks.0.up", "blocks.10.up"):
        # In another order than the importer's.
        for key, shape in reversed(list(zip(keys, EXAMPLES[name], strict=True))):
            state[f"{layer}.{key}"] = draw(*shape)
    rows = import_weights(name, [state[f"blocks.0.up.{key}"] for key in keys]).out_features
    state["blocks.0.up.b" if name == "btt" else "blocks.0.up.bias"] = draw(rows)
    return state


@pytest.mark.parametrize("name", EXAMPLES)
def test_layers_of_a_state_dict(name):
    state = foreign_state(name)
    layers = layers_from_state_dict(state, name, backend="bmm")
    assert sorted(layers) == ["blocks.0.up", "blocks.10.up"]
    keys = [key.removeprefix("blocks.10.up.") for key in state if key.startswith("blocks.10.up.")]
    order = ["B", "D", "C"].index if name == "blast" else None
    exported = dict(zip(sorted(keys, key=order), export_weights(name, layers["blocks.10.up"]), strict=False))
    assert all(same_bits(exported[key], state[f"blocks.10.up.{key}"]) for key in keys)
    first = layers["blocks.0.up"]
    assert torch.equal(first.bias, state["blocks.0.up.b" if name == "btt" else "blocks.0.up.bias"])
    assert layers["blocks.10.up"].bias is None


def test_sizes_and_options_of_a_state_dict():
    state = {"blkdiag1": draw(4, 6, 3), "blkdiag2": draw(3, 5, 8), "bias": draw(13)}
    with pytest.raises(CheckpointError, match=r"monarch layer '': bias of shape \(13,\): expected \(15,\)"):
        layers_from_state_dict(state, "monarch")
    (layer,) = layers_from_state_dict(state, "monarch", {"": (11, 13)}).values()
    whole = from_monarch(state["blkdiag1"], state["blkdiag2"])
    torch.testing.assert_close(layer.to_dense(), whole.to_dense()[:13, :11])
    twiddle = draw(1, 1, 3, 4, 2, 2)
    (layer,) = layers_from_state_dict({"x.twiddle": twiddle}, "butterfly", increasing_stride=False).values()
    assert torch.equal(layer.to_dense(), from_butterfly(twiddle, increasing_stride=False).to_dense())
    # A bias kept as a column, where the batch is last.
    column = {"factors.0": draw(3, 4, 2, 1), "bias": draw(12, 1)}
    (layer,) = layers_from_state_dict(column, "ksmm", layout="batch_last").values()
    assert torch.equal(layer.bias, column["bias"][:, 0]) and layer.layout == "batch_last"


def test_a_foreign_checkpoint_into_a_dense_model():
    """The README's recipe: layers from the state dict, into the dense model, and the rest of the state as usual."""
    model = torch.nn.Sequential(torch.nn.Linear(11, 13), torch.nn.ReLU(), torch.nn.Linear(13, 2)).double()
    state = {"0.blkdiag1": draw(4, 6, 3), "0.blkdiag2": draw(3, 5, 8), "0.bias": draw(13)}
    state |= {"2.weight": draw(2, 13), "2.bias": draw(2)}
    sizes = {"0": (model[0].in_features, model[0].out_features)}
    layers = layers_from_state_dict(state, "monarch", sizes)
    install(model, layers)
    unread = model.load_state_dict(state, strict=False).unexpected_keys
    assert unread == ["0.blkdiag1", "0.blkdiag2"]
    weight = from_monarch(state["0.blkdiag1"], state["0.blkdiag2"], 11, 13).to_dense()
    x = draw(5, 11)
    hidden = torch.relu(x @ weight.T + state["0.bias"])
    torch.testing.assert_close(model(x), hidden @ state["2.weight"].T + state["2.bias"])


def test_lists_are_sorted_by_number():
    weights = [draw(1, 2, 2, 1) for _ in range(12)]
    state = {f"a.factors.{q}": weights[q] for q in sorted(range(12), key=str)}
    (layer,) = layers_from_state_dict(state, "ksmm").values()
    assert all(same_bits(a, b) for a, b in zip(export_weights("ksmm", layer), weights, strict=True))


@pytest.mark.parametrize(
    ("name", "change", "sizes", "message"),
    [
        ("monarch", {"blocks.0.up.blkdiag2": None}, None, "monarch layer 'blocks.0.up': monarch of 1 tensors"),
        ("btt", {"blocks.0.up.op_params.2": draw(1).squeeze()}, None, "btt layer 'blocks.0.up': .*expected"),
        ("blast", {}, {"blocks.0.up": (15, 7)}, r"15 -> 6 features: expected \(15, 7\)"),
        ("blast", {}, {"blocks.1.up": (15, 7)}, r"sizes for blocks.1.up: expected some of blocks"),
        ("ksmm", {"blocks.10.up.factors.1": draw(1, 1, 1, 1)}, None, "'blocks.10.up': factors 1 and 2 do not compose"),
    ],
)
def test_state_dicts_that_do_not_fit(name, change, sizes, message):
    state = {key: tensor for key, tensor in {**foreign_state(name), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        layers_from_state_dict(state, name, sizes)


def test_a_state_dict_without_such_layers():
    with pytest.raises(CheckpointError, match="no blast layer: expected keys that end in B, D, C, found embed"):
        layers_from_state_dict({"embed.weight": draw(3, 3), "mixer.D": draw(3)}, "blast")
    with pytest.raises(ConfigError, match="expected one of"):
        layers_from_state_dict({}, "blaster")
