"""Surgery: what is swapped, what is skipped and why, what is kept, and what a bad rule says."""

import copy

import pytest
import torch
from torch import Tensor, nn

from structlayers import Chain, KSLinear
from structlayers.errors import ChainError, ConfigError
from structlayers.surgery import SwapRule, swap_linears

MONARCH = {"structure": "monarch", "options": {"blocks": 4}}


class Conv1D(nn.Module):
    """A stand-in for the transposed linear of Hugging Face's GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Net(nn.Module):
    def __init__(self, dim: int = 32, head: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(head, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim, bias=False))
        self.conv = Conv1D(dim, dim)
        self.head = nn.Linear(dim, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.mlp(self.embed(x))))


def reasons(report) -> dict[str, str]:
    return dict(report.skipped)


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state)


def test_swaps_by_name_and_reports():
    model = Net()
    bias = model.mlp[0].bias.detach().clone()
    report = swap_linears(model, {**MONARCH, "exclude": "head"})
    assert [layer.name for layer in report.swapped] == ["mlp.0", "mlp.2", "conv"]
    assert reasons(report) == {"head": "excluded by 'head'"}
    first = report.swapped[0]
    assert first.chain == Chain.monarch(32, 64, blocks=4) == model.mlp[0].chain
    assert (first.params_before, first.params_after) == (32 * 64, 4 * 16 * 8 + 4 * 8 * 8)
    assert (first.flops_before, first.flops_after) == (2 * 32 * 64, 2 * first.params_after)
    assert report.kept == sum(x.params_after for x in report.swapped) / (32 * 64 + 64 * 32 + 32 * 32)
    assert torch.equal(model.mlp[0].bias, bias)
    assert model.mlp[2].bias is None
    assert isinstance(model.head, nn.Linear)
    assert model(torch.arange(10)).shape == (10, 10)
    # A second pass finds the rest only.
    assert [layer.name for layer in swap_linears(model, {"structure": "low_rank", "options": {"rank": 2}}).swapped] == [
        "head"
    ]


def test_table_names_layers_chains_and_reasons():
    report = swap_linears(Net(), {**MONARCH, "exclude": ["head"]})
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "chain", "params", "FLOPs", "per", "row", "kept"]
    assert lines[1].split()[:2] == ["mlp.0", "(1,16,8,4)(4,8,8,1)"]
    assert "2,048 -> 768" in lines[1] and "4,096 -> 1,536" in lines[1] and "37.5%" in lines[1]
    assert lines[4].startswith("total of 3") and f"{report.kept:.1%}" in lines[4]
    assert lines[5] == "skipped: head: excluded by 'head'"


def test_first_matching_rule_wins():
    model = Net()
    rules = [SwapRule("low_rank", {"rank": 2}, include=("mlp.*",)), {**MONARCH, "exclude": ("head",)}]
    report = swap_linears(model, rules)
    assert [layer.chain for layer in report.swapped] == [
        Chain.low_rank(32, 64, 2),
        Chain.low_rank(64, 32, 2),
        Chain.monarch(32, 32),
    ]


def test_callable_rule():
    model = Net()
    report = swap_linears(model, lambda name, i, o: Chain.low_rank(i, o, 3) if name != "head" else None)
    assert {layer.chain for layer in report.swapped} == {Chain.low_rank(32, 64, 3), Chain.low_rank(64, 32, 3)} | {
        Chain.low_rank(32, 32, 3)
    }
    assert reasons(report) == {"head": "the rule chose no chain"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda name, i, o: "monarch", "'monarch' for mlp.0: expected a Chain or None"),
        ({"include": "mpl.*"}, "'mpl.*' matches no linear layer: expected some of mlp.0, mlp.2, conv, head"),
        ({"exclude": "*"}, "'*' without '*' matches no linear layer"),
        ([MONARCH, {"include": ["x", "y"]}], "'x', 'y' matches no linear layer"),
        ({"structure": "monark"}, "'monark': expected one of monarch, butterfly"),
        ({"options": {"block": 4}}, "no option block: expected blocks, rank"),
        ({"structure": "low_rank"}, "needs the option rank"),
        ({"structure": "(1,2,3,4)", "options": {"rank": 1}}, "expected none"),
        ({"blocks": 4}, "'blocks': expected only structure, options, include, exclude, max_kept"),
        ({"max_kept": 0.0}, "max_kept = 0.0"),
        ({"max_kept": "0.5"}, "max_kept = '0.5': expected a fraction"),
        ({"structure": "low_rank", "budget": "0.5"}, "budget = '0.5': expected a fraction"),
        ({"structure": 4}, "structure = 4: expected a name or a chain's text"),
        ({"options": 5}, "options = 5: expected a mapping"),
        ({"include": 5}, "include = 5: expected a pattern or a list of patterns"),
        ({"exclude": [5]}, "exclude = [5]: expected a pattern"),
        ({"max_kept": None}, "max_kept = None: expected a fraction"),
        ([], "empty list of rules"),
        ({}, "an empty rule"),
        (3, "rule 3: expected a SwapRule"),
    ],
)
def test_bad_rules_are_named_and_change_nothing(rule, message):
    model = Net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as error:
        swap_linears(model, rule)
    assert message in str(error.value)
    assert same_state(model, state)


def test_bad_spec_and_bad_init():
    with pytest.raises(ChainError, match=r"\(1,2,3\)"):
        SwapRule("(1,2,3)")
    with pytest.raises(ConfigError, match="init = 'svd': expected one of random, project, project_data"):
        swap_linears(Net(), MONARCH, init="svd")
    with pytest.raises(ConfigError, match="scale = 'large': expected one of variance, structure"):
        swap_linears(Net(), MONARCH, scale="large")


def test_the_model_itself_and_a_model_without_linears():
    with pytest.raises(ConfigError, match="no parent"):
        swap_linears(nn.Linear(8, 8), MONARCH)
    with pytest.raises(ConfigError, match="no linear layer"):
        swap_linears(nn.Sequential(nn.ReLU()), MONARCH)


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    model = Net()
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    made = []

    def third_fails(linear, chain, **options):
        made.append(chain)
        if len(made) == 3:
            raise RuntimeError("out of memory")
        return KSLinear(chain, bias=linear.bias is not None)

    monkeypatch.setattr(KSLinear, "from_linear", third_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        swap_linears(model, MONARCH, init="project")
    assert dict(model.named_modules()) == modules
    assert same_state(model, state)


def test_chains_that_gain_nothing_are_skipped_with_the_reason():
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(64, 6), nn.Linear(16, 16))
    report = swap_linears(model, {**MONARCH, "max_kept": 0.5})
    assert [layer.name for layer in report.swapped] == ["0"]
    # 16 -> 16 with 4 blocks keeps exactly half.
    with pytest.raises(ChainError) as refusal:
        Chain.monarch(64, 6, blocks=4)
    assert reasons(report) == {
        "1": str(refusal.value),
        "2": "(1,4,4,4)(4,4,4,1) keeps 50.0% of the parameters: expected less than 50.0%",
    }


@pytest.mark.parametrize("rule", [{"structure": "low_rank", "options": {"rank": 16}, "max_kept": 9.0}, "(1,32,32,1)"])
def test_dense_in_disguise_is_never_installed(rule):
    rule = SwapRule(rule) if isinstance(rule, str) else rule
    model = nn.Sequential(nn.Linear(32, 32))
    report = swap_linears(model, rule)
    assert not report.swapped and report.kept == 1.0
    assert "keeps 100.0% of the parameters" in reasons(report)["0"]
    callable_report = swap_linears(model, lambda name, i, o: Chain.dense(i, o))
    assert "keeps 100.0%" in reasons(callable_report)["0"]


def test_dense_on_request():
    model = nn.Sequential(nn.Linear(32, 16))
    x = torch.randn(3, 32)
    expected = model(x)
    assert swap_linears(model, "dense", init="project").kept == 1.0
    assert isinstance(model[0], KSLinear)
    torch.testing.assert_close(model(x), expected)


def test_a_spec_swaps_the_layers_that_it_fits():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64))
    report = swap_linears(model, {"structure": "(1,8,8,4)(4,8,8,1)"})
    assert [layer.name for layer in report.swapped] == ["0"]
    assert reasons(report) == {"1": "(1,8,8,4)(4,8,8,1) maps 32 -> 32 features: expected 32 -> 64"}


def test_rounding_is_noted_in_the_report(recwarn):
    report = swap_linears(nn.Sequential(nn.Linear(72, 72)), MONARCH)
    assert "rounded up from 18 to 20" in report.swapped[0].note
    assert "note: 0: " in str(report)
    assert not recwarn


@pytest.mark.parametrize("init", ["random", "project"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_mode_and_requires_grad(init, dtype):
    model = Net().to(dtype).eval()
    model.mlp[0].train()
    model.mlp[0].weight.requires_grad_(False)
    model.conv.bias.requires_grad_(False)
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    swap_linears(model, {**MONARCH, "exclude": "head"}, init=init, backend="einsum")
    up, down, conv = model.mlp[0], model.mlp[2], model.conv
    assert all(p.dtype == dtype for p in model.parameters())
    assert (up.training, up.factors.training, down.training, conv.training) == (True, True, False, False)
    assert [p.requires_grad for p in (*up.factors, up.bias)] == [False, False, True]
    assert [p.requires_grad for p in (*conv.factors, conv.bias)] == [True, True, False]
    assert up.backend == "einsum"
    assert all(torch.equal(p, biases[name]) for name, p in model.named_parameters() if name in biases)


def test_project_is_near_the_weight_that_was_there():
    """A weight that a chain expresses exactly comes back, through a Conv1D's transposed storage too."""
    torch.manual_seed(0)
    model = Net().double()
    chain = Chain.monarch(32, 32)
    source = KSLinear(chain, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.conv.weight.copy_(source.to_dense().T)
    before = model(torch.arange(10))
    report = swap_linears(model, {**MONARCH, "include": "conv"}, init="project")
    assert [layer.chain for layer in report.swapped] == [chain]
    torch.testing.assert_close(model(torch.arange(10)), before)


def test_meta_device():
    with torch.device("meta"):
        model = Net()
    report = swap_linears(model, {**MONARCH, "exclude": "head"})
    assert len(report.swapped) == 3
    assert all(p.is_meta for p in model.parameters())
    with torch.device("meta"):
        other = Net()
    with pytest.raises(ConfigError, match="meta device"):
        swap_linears(other, MONARCH, init="project")
    assert isinstance(other.mlp[0], nn.Linear)


def test_scale_follows_the_initial_rule():
    torch.manual_seed(0)
    rule = {"structure": "low_rank", "options": {"rank": 4}}
    stds = {}
    for scale in ("variance", "structure"):
        model = nn.Sequential(nn.Linear(512, 512))
        swap_linears(model, rule, scale=scale)
        stds[scale] = model[0].factors[1].std().item()
    assert stds["variance"] == pytest.approx(512**-0.5, rel=0.1)
    assert stds["structure"] == pytest.approx(4**0.5 / 512, rel=0.1)


def test_tied_weights_and_shared_modules_are_skipped():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embed.weight
            self.a = nn.Linear(32, 32)
            self.again = self.a
            block = nn.Sequential(nn.Linear(32, 32))
            self.shared = nn.ModuleList([block, block])

    model = Tied()
    report = swap_linears(model, MONARCH)
    assert reasons(report) == {
        "head": "its weight is tied to embed.weight",
        "a": "the same module is registered in 2 places",
    }
    # A linear inside a shared block has one holder: it stays shared.
    assert [layer.name for layer in report.swapped] == ["shared.0.0"]
    assert model.shared[0][0] is model.shared[1][0] and isinstance(model.shared[0][0], KSLinear)


def test_weights_tied_by_their_memory_are_skipped():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64), "free": nn.Linear(32, 64)})
    model["head"].weight = nn.Parameter(model["embed"].weight)
    report = swap_linears(model, MONARCH)
    assert reasons(report) == {"head": "its weight is tied to embed.weight"}
    assert model["head"].weight.data_ptr() == model["embed"].weight.data_ptr()


def test_parents_that_read_the_weight_are_skipped():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.read = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.to(self.read.weight.dtype))

    class Heir(Reader):
        pass

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "reader": Reader(), "heir": Heir()})
    report = swap_linears(model, MONARCH)
    assert [layer.name for layer in report.swapped] == ["reader.fc", "heir.fc"]
    assert reasons(report) == {
        "attention.out_proj": "its parent MultiheadAttention reads out_proj.weight instead of calling it",
        "reader.read": "its parent Reader reads read.weight instead of calling it",
        "heir.read": "its parent Heir reads read.weight instead of calling it",
    }


def test_layers_with_behaviour_of_their_own_are_skipped():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {name: nn.Linear(32, 32) for name in ("plain", "hook", "prehook", "param", "norm", "patched")}
    )
    model["special"] = Special(32, 32)
    model["hook"].register_forward_hook(lambda *_: None)
    model["prehook"].register_forward_pre_hook(lambda *_: None)
    nn.utils.parametrizations.orthogonal(model["param"])
    nn.utils.parametrizations.weight_norm(model["norm"])
    model["patched"].forward = model["patched"].forward
    model["buffer"] = nn.Linear(32, 32)
    model["buffer"].register_buffer("mask", torch.ones(32, 32))
    model["complex"] = nn.Linear(32, 32, dtype=torch.complex64)
    report = swap_linears(model, MONARCH)
    assert [layer.name for layer in report.swapped] == ["plain"]
    found = reasons(report)
    assert "subclass of Linear" in found["special"]
    assert "subclass of Linear" in found["param"] and "subclass of Linear" in found["norm"]
    assert all("hooks" in found[name] for name in ("hook", "prehook", "patched"))
    assert "more than weight and bias: mask" in found["buffer"]
    assert "torch.complex64" in found["complex"]


def test_transformer_encoder_layers_leave_their_fused_path():
    """The fused inference path reads linear1.weight; after a swap the layers must still run, in both modes alike."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    assert model.use_nested_tensor
    report = swap_linears(model, MONARCH)
    assert [layer.name for layer in report.swapped] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=padding).detach()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.train()(x))
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=padding), expected)
        copy.deepcopy(model)(x, src_key_padding_mask=padding)


def test_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(10)[None]
    before = model(tokens).logits
    report = swap_linears(model, MONARCH, init="project")
    assert len(report.swapped) == 8
    assert reasons(report) == {"lm_head": "its weight is tied to transformer.wte.weight"}
    after = model(tokens, labels=tokens)
    assert after.logits.shape == before.shape
    after.loss.backward()
