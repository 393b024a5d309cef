"""The built-in models: shapes, names that swap rules see, argument checks, and what each one promises."""

import pytest
import torch
from torch import nn

from structlayers.errors import ConfigError, ShapeError
from structlayers.models import GPT, MLP, ViT
from structlayers.models.transformer import Attention, Rotary


def small_gpt(**options):
    torch.manual_seed(0)
    return GPT(**{"vocab_size": 11, "context_length": 8, "dim": 16, "depth": 2, "heads": 2, **options})


def small_vit(**options):
    torch.manual_seed(0)
    return ViT(**{"input_shape": (2, 4, 6), "num_classes": 3, "dim": 16, "depth": 2, "heads": 2, **options})


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


BLOCK = {
    *(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"feed_forward.{name}" for name in ("up", "down")),
}


def block_linears(depth):
    return {f"blocks.{i}.{name}" for i in range(depth) for name in BLOCK}


def test_mlp_shapes_and_names():
    model = MLP((1, 4, 5), 3, width=16, depth=2)
    assert model(torch.randn(7, 1, 4, 5)).shape == (7, 3)
    assert linears(model) == {"hidden.0", "hidden.1", "head"}
    assert [(h.in_features, h.out_features) for h in model.hidden] == [(20, 16), (16, 16)]


def test_vit_shapes_and_names():
    model = small_vit()
    assert model(torch.randn(5, 2, 4, 6)).shape == (5, 3)
    assert linears(model) == block_linears(2) | {"patch_embed", "head"}
    assert model.blocks[0].feed_forward.up.out_features == 64


def test_vit_patches_are_row_major_squares():
    image = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    patches = small_vit().patches(image)
    assert patches.shape == (1, 6, 8)
    for n in range(6):
        row, column = 2 * (n // 3), 2 * (n % 3)
        assert torch.equal(patches[0, n], image[0, :, row : row + 2, column : column + 2].flatten())


def test_vit_sees_positions():
    image = torch.randn(1, 2, 4, 6)
    model = small_vit().eval()
    assert not torch.allclose(model(image), model(image.flip(-1).flip(-2)))


def test_vit_refuses_another_image():
    with pytest.raises(ShapeError, match=r"\(1, 2, 6, 4\): expected \(B, 2, 4, 6\)"):
        small_vit()(torch.randn(1, 2, 6, 4))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_gpt_shapes_and_names(positions):
    model = small_gpt(positions=positions)
    assert model(torch.randint(11, (3, 8))).shape == (3, 8, 11)
    assert model(torch.randint(11, (3, 5))).shape == (3, 5, 11)
    assert linears(model) == block_linears(2) | {"head"}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_gpt_is_causal(positions):
    model = small_gpt(positions=positions).eval()
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert all(not torch.allclose(before[:, t], after[:, t], atol=1e-6) for t in (5, 6, 7))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_gpt_sees_the_order_of_earlier_tokens(positions):
    model = small_gpt(positions=positions).eval()
    a, b = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    assert not torch.allclose(a[:, -1], b[:, -1], atol=1e-5)


def test_attention_agrees_with_its_formula():
    torch.manual_seed(0)
    layer = Attention(6, heads=2, causal=True).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    want = torch.empty_like(x)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        q, k, v = (p(x)[..., part] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        scores = q @ k.transpose(1, 2) / 3**0.5
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
        want[..., part] = scores.softmax(-1) @ v
    assert torch.allclose(layer(x), layer.out_proj(want), atol=1e-12)


def test_rotary_products_depend_on_the_distance_only():
    rotary = Rotary(6, length=16)
    q, k = (torch.randn(6).expand(1, 1, 16, 6) for _ in range(2))
    scores = (rotary(q) @ rotary(k).transpose(-1, -2))[0, 0]
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 3], atol=1e-3)
    assert torch.allclose(rotary(q).norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    assert not list(rotary.state_dict())


def test_gpt_tied_head_is_the_embedding():
    tied, untied = small_gpt(tie_weights=True), small_gpt()
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 11 * 16


@pytest.mark.parametrize("tie_weights", [False, True])
def test_gpt_starts_near_the_uniform_distribution(tie_weights):
    model = small_gpt(dim=64, tie_weights=tie_weights)
    tokens = torch.randint(11, (32, 8))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), torch.randint(11, (256,)))
    # ln 11 = 2.4, and half the variance of logits of variance 1; the logits of a head scaled as an embedding have 64.
    assert 2.3 < loss < 3.5


def test_gpt_refuses_other_tokens():
    with pytest.raises(ShapeError, match=r"\(1, 9\): expected \(B, T\) with T <= context_length=8"):
        small_gpt()(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        small_gpt()(torch.zeros(4, dtype=torch.int64))


def test_generate_continues_the_prompt_past_the_context():
    model = small_gpt().eval()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.generate(prompt, 10, generator=torch.Generator().manual_seed(0))
    assert out.shape == (2, 13) and torch.equal(out[:, :3], prompt)
    assert torch.equal(out, model.generate(prompt, 10, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(out, model.generate(prompt, 10, generator=torch.Generator().manual_seed(1)))


def test_generate_at_temperature_0_takes_the_most_likely_token():
    model = small_gpt().eval()
    out = model.generate(torch.tensor([[1, 2, 3]]), 9, temperature=0)
    for t in range(3, 12):
        assert out[0, t] == model(out[:, max(0, t - 8) : t])[0, -1].argmax()


def test_generate_samples_from_the_model():
    model = small_gpt(depth=1).eval()
    prompt = torch.tensor([[3, 1]]).expand(20_000, 2)
    drawn = model.generate(prompt, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, -1]
    want = (model(prompt[:1])[0, -1] / 0.5).softmax(-1)
    assert torch.allclose(drawn.bincount(minlength=11) / 20_000, want, atol=0.015)


def test_generate_refuses_bad_arguments():
    with pytest.raises(ShapeError, match=r"prompt of shape \(1, 0\)"):
        small_gpt().generate(torch.zeros(1, 0, dtype=torch.int64), 1)
    with pytest.raises(ConfigError, match="temperature=-1"):
        small_gpt().generate(torch.zeros(1, 1, dtype=torch.int64), 1, temperature=-1)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (small_gpt, {"heads": 3}, "dim=16 is not a multiple of heads=3"),
        (small_gpt, {"dim": 6}, "head_dim=3: rotary positions need an even"),
        (small_gpt, {"positions": "sine"}, "positions='sine': expected 'rotary' or 'learned'"),
        (small_gpt, {"depth": 0}, "depth = 0: expected an integer of at least 1"),
        (small_gpt, {"mlp_ratio": 0.3}, "mlp_ratio=0.3: dim"),
        (small_gpt, {"dropout": 1.0}, "dropout = 1.0"),
        (small_vit, {"patch_size": 4}, "image width=6 is not a multiple of patch_size=4"),
        (small_vit, {"patch_size": 3}, "image height=4 is not a multiple of patch_size=3"),
        (small_vit, {"input_shape": (4, 6)}, r"input_shape=\(4, 6\): expected \(channels, height, width\)"),
        (small_vit, {"num_classes": 2.5}, "num_classes = 2.5"),
        (MLP, {"input_shape": (), "num_classes": 2}, r"input_shape=\(\)"),
        (MLP, {"input_shape": (4,), "num_classes": 2, "width": "wide"}, "width = 'wide'"),
    ],
)
def test_impossible_arguments_are_named(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize("model", [lambda: MLP((4,), 5, dropout=0.1), small_vit, small_gpt])
def test_every_parameter_gets_a_gradient(model):
    model = model()
    x = torch.randint(11, (3, 8)) if isinstance(model, GPT) else torch.randn(3, *model.input_shape)
    model(x).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias moves all the scores of a query alike, and softmax does not see that.
    assert all(name.endswith("k_proj.bias") for name in missing)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (lambda: MLP((6,), 3, width=32, depth=2), lambda: (torch.randn(24, 6), torch.arange(24) % 3)),
        (small_vit, lambda: (torch.randn(12, 2, 4, 6), torch.arange(12) % 3)),
        (small_gpt, lambda: (torch.randint(11, (4, 8)), torch.randint(11, (4, 8)))),
    ],
)
def test_learns_a_small_batch_by_heart(model, batch):
    torch.manual_seed(0)
    model, (x, y) = model(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
