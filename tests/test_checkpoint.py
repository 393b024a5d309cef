"""Checkpoints: a round trip, what is refused and how it is said, and files that survive a failed write."""

import copy
import json
import os
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from structlayers import Chain, KSLinear, checkpoint, files
from structlayers.checkpoint import load, save
from structlayers.errors import CheckpointError
from structlayers.surgery import swap_linears

MONARCH = {"structure": "monarch", "options": {"blocks": 4}, "exclude": "head"}


class Net(nn.Module):
    def __init__(self, dim: int = 32, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.BatchNorm1d(2 * dim), nn.Linear(2 * dim, dim, bias=False))
        self.register_buffer("scale", torch.full((dim,), 2.0), persistent=False)
        self.head = nn.Linear(dim, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mlp(self.embed(x)) * self.scale)


def swapped(**options) -> Net:
    torch.manual_seed(0)
    model = Net()
    swap_linears(model, MONARCH, **options)
    model(torch.arange(10))  # moves the running statistics
    return model


def snapshot(model: nn.Module):
    return dict(model.named_modules()), copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]


def assert_unchanged(model: nn.Module, before) -> None:
    modules, state, ids = before
    assert dict(model.named_modules()) == modules
    assert [id(p) for p in model.parameters()] == ids
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], state[key]) and now[key].dtype == state[key].dtype for key in state)


def rewrite(path, **metadata) -> None:
    """The same tensors under other metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    found.update({key.replace("_", "."): value for key, value in metadata.items()})
    save_file(load_file(path), path, metadata={key: value for key, value in found.items() if value is not None})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_into_a_dense_model(tmp_path, dtype):
    model = swapped(backend="einsum").to(dtype)
    assert save(model, tmp_path / "model.safetensors") == tmp_path / "model.safetensors"
    other = Net().eval()
    other.mlp[0].weight.requires_grad_(False)
    assert load(tmp_path / "model.safetensors", other) is other
    state, expected = other.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key
    assert other.mlp[0].chain == model.mlp[0].chain and other.mlp[0].backend == "einsum"
    assert other.head.weight is other.embed.weight
    assert not other.training and not other.mlp[0].training
    assert [p.requires_grad for p in (*other.mlp[0].factors, other.mlp[0].bias)] == [False, False, True]
    torch.testing.assert_close(other.float()(torch.arange(10)), model.float().eval()(torch.arange(10)))


def test_into_a_swapped_model_a_factory_and_another_backend(tmp_path):
    model, path = swapped(), tmp_path / "m.safetensors"
    save(model, path)
    parameters = list(model.parameters())
    values = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in parameters:
            p.zero_()
    load(path, model)
    # In place: an optimizer that holds the parameters still does.
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    for found in (model, load(path, Net), load(path, Net, backend="bmm")):
        assert all(torch.equal(value, values[key]) for key, value in found.state_dict().items())
    assert load(path, Net, backend="bmm").mlp[0].backend == "bmm"


def test_nothing_is_drawn_on_loading(tmp_path):
    save(swapped(), tmp_path / "m.safetensors")
    other = Net()
    before = torch.get_rng_state()
    load(tmp_path / "m.safetensors", other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_single_layer_needs_no_model(tmp_path):
    layer = KSLinear(
        Chain.monarch(30, 50, blocks=4, rank=1), bias=False, layout="batch_last", activation="relu", dtype=torch.float64
    )
    save(layer, tmp_path / "layer.safetensors")
    other = load(tmp_path / "layer.safetensors")
    assert isinstance(other, KSLinear)
    x = torch.randn(30, 3, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))


def test_meta_models_get_memory_and_keep_their_ties(tmp_path):
    model = swapped()
    save(model, tmp_path / "m.safetensors")

    def on_meta() -> Net:
        with torch.device("meta"):
            return Net()

    with pytest.raises(CheckpointError, match="lacks scale, which no state dict holds"):
        load(tmp_path / "m.safetensors", on_meta)
    other = on_meta()
    other.scale = torch.full((32,), 2.0)
    load(tmp_path / "m.safetensors", other)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.eval()(torch.arange(10)), model.eval()(torch.arange(10)))
    with pytest.raises(CheckpointError, match=r"embed.weight is on the meta device"):
        save(on_meta(), tmp_path / "n.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_compiled_models_have_the_names_of_plain_ones(tmp_path):
    model = swapped()
    save(torch.compile(model, backend="eager"), tmp_path / "m.safetensors")
    assert set(load_file(tmp_path / "m.safetensors")) == set(model.state_dict()) - {"head.weight"}
    other = torch.compile(Net(), backend="eager")
    assert load(tmp_path / "m.safetensors", other) is other
    assert torch.equal(other._orig_mod.mlp[0].factors[0], model.mlp[0].factors[0])


def test_shared_modules_are_written_once_and_stay_shared(tmp_path):
    def build() -> nn.Sequential:
        layer = nn.Linear(32, 32)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = build()
    model[0] = model[2] = KSLinear(Chain.monarch(32, 32))
    save(model, tmp_path / "m.safetensors")
    assert set(load_file(tmp_path / "m.safetensors")) == {"0.factors.0", "0.factors.1", "0.bias"}
    other = load(tmp_path / "m.safetensors", build())
    assert other[0] is other[2]
    assert torch.equal(other(torch.ones(32)), model(torch.ones(32)))


class Conv1D(nn.Module):
    """A stand-in for the transposed linear of Hugging Face's GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 64
        self.weight, self.bias = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(64))


def test_conv1d(tmp_path):
    model = nn.Sequential(Conv1D())
    swap_linears(model, MONARCH)
    save(model, tmp_path / "m.safetensors")
    x = torch.randn(3, 32)
    assert torch.equal(load(tmp_path / "m.safetensors", nn.Sequential(Conv1D()))(x), model(x))


def test_transformer_encoder_layers_leave_their_fused_path(tmp_path):
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 1).eval()

    model = build()
    swap_linears(model, MONARCH)
    save(model, tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m.safetensors", build())(x), model(x))


MISMATCHES = {
    "other width": (lambda: Net(dim=64), "'mlp.0'.*is 32 -> 64 with bias: expected 64 -> 128 with bias"),
    "no such layer": (lambda: nn.Sequential(nn.Linear(32, 32)), "'mlp.0' has the chain .*: expected a linear layer"),
    "untied": (lambda: Net(tied=False), "head.weight and embed.weight are one tensor in the file: they are two in the"),
    "a linear itself": (lambda: nn.Linear(32, 64), "'mlp.0' has the chain"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_other_models_are_refused_and_unchanged(tmp_path, case):
    build, message = MISMATCHES[case]
    path = tmp_path / "m.safetensors"
    save(swapped(), path)
    model = build()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path, model)
    assert str(path) in str(error.value)
    assert_unchanged(model, before)


def test_other_structures_keys_and_shapes_are_refused_and_unchanged(tmp_path):
    path = tmp_path / "m.safetensors"
    save(swapped(), path)

    low_rank = Net()
    swap_linears(low_rank, {"structure": "low_rank", "options": {"rank": 2}, "exclude": "head"})
    more = Net()
    swap_linears(more, {**MONARCH, "include": "mlp.0"})
    more.extra = KSLinear(Chain.monarch(32, 32))
    lacks = Net()
    lacks.bias = nn.Parameter(torch.zeros(3))
    shape = Net()
    shape.embed.weight = shape.head.weight = nn.Parameter(torch.zeros(11, 32))
    has = Net()
    has.mlp[1] = nn.BatchNorm1d(64, affine=False)
    integer = Net()
    integer.mlp[1].num_batches_tracked = torch.zeros(())
    for model, message in (
        (low_rank, r"'mlp.0' is .*\(1,16,8,4\)\(4,8,8,1\).*: expected .*\(1,64,2,1\)\(1,2,32,1\)"),
        (more, r"no chain for layer 'extra': the model has \(1,8,8,4\)\(4,8,8,1\)"),
        (lacks, "lacks bias: expected every tensor of the Net"),
        (has, r"has mlp.1.bias, mlp.1.weight: the Net has no such tensors"),
        (shape, r"embed.weight has shape \(10, 32\): expected \(11, 32\)"),
        (integer, r"mlp.1.num_batches_tracked is torch.int64: expected torch.float32"),
    ):
        before = snapshot(model)
        with pytest.raises(CheckpointError, match=message) as error:
            load(path, model)
        assert str(path) in str(error.value)
        assert_unchanged(model, before)


def test_a_tie_that_the_file_does_not_have_is_refused(tmp_path):
    untied = Net(tied=False)
    save(untied, tmp_path / "m.safetensors")
    with pytest.raises(
        CheckpointError, match=r"head.weight and embed.weight are one tensor in the model: they are two in"
    ):
        load(tmp_path / "m.safetensors", Net())


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save(swapped(), path)
    whole = path.read_bytes()
    model = Net()
    before = snapshot(model)
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load(path, model)
    path.write_bytes(b"\x80" * len(whole))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(path, model)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"expected a file that structlayers.save wrote"):
        load(path, model)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "absent.safetensors", model)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(tmp_path, model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"structlayers_version": "2"}, "format version '2': expected '1'"),
        ({"structlayers_layers": "{"}, "unreadable description"),
        ({"structlayers_layers": json.dumps({"mlp.0": {"chain": "(1,2,3)"}})}, "unreadable description"),
        ({"structlayers_tied": None}, "unreadable description"),
        ({"structlayers_tied": json.dumps({"head.weight": "gone"})}, "tied to absent tensors: gone"),
    ],
)
def test_other_descriptions_are_refused(tmp_path, metadata, message):
    path = tmp_path / "m.safetensors"
    save(swapped(), path)
    rewrite(path, **metadata)
    with pytest.raises(CheckpointError, match=message):
        load(path, Net())


def test_a_model_file_without_a_model(tmp_path):
    save(swapped(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="expected the model as well"):
        load(tmp_path / "m.safetensors")


def test_a_backend_that_cannot_be_built_is_named(tmp_path):
    save(swapped(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"'mlp.0' cannot be built: .*'bmmm'"):
        load(tmp_path / "m.safetensors", Net(), backend="bmmm")


def test_a_full_disk_leaves_the_former_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save(swapped(), path)
    former = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            save(swapped().double(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(error.value) and "not written" in str(error.value)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == former


@pytest.mark.parametrize("module, step", [(checkpoint, "save_file"), (files, "_sync")], ids=["save_file", "_sync"])
def test_an_interruption_leaves_the_former_file(tmp_path, monkeypatch, module, step):
    path = tmp_path / "m.safetensors"
    save(swapped(), path)
    former = path.read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(swapped().double(), path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == former


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        save(swapped(), tmp_path / "absent" / "m.safetensors")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}

    with pytest.raises(CheckpointError, match="_extra_state is a dict"):
        save(Extra(2, 2), tmp_path / "m.safetensors")
    assert not os.listdir(tmp_path)


def test_mode_and_symlinks_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").touch()
    (tmp_path / "link").symlink_to("m.safetensors")
    save(swapped(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
