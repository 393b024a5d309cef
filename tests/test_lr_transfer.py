"""The best learning rate carries over from dense to structured and from width 64 to width 512 (slow: a minute or two).

A rate found by the "mup" rule at the base width is the one that the "structure" rule finds there.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from structlayers import Chain, KSLinear
from structlayers.optim import param_groups

pytestmark = pytest.mark.slow

D_IN, CLASSES, BASE_WIDTH, WIDTH = 32, 10, 64, 512
STEPS, BATCH, SEEDS = 100, 128, 2
RATES = [2.0**-k for k in range(10, 3, -1)]

CHAINS = {
    "monarch": lambda width: Chain.monarch(width, width, blocks=4),
    # Two factors at width 64, three at width 512.
    "butterfly": lambda width: Chain.butterfly(width, radix=8),
    "low_rank": lambda width: Chain.low_rank(width, width, rank=width // 4),
}


@pytest.fixture(scope="module")
def task() -> tuple[Tensor, Tensor]:
    """Classes that a fixed random tanh network gives to 2,048 points."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, D_IN, generator=generator)
    hidden = torch.tanh(x @ torch.randn(D_IN, 64, generator=generator) * (2 / D_IN**0.5))
    return x, (hidden @ torch.randn(64, CLASSES, generator=generator)).argmax(1)


def mlp(structure: str, width: int) -> nn.Sequential:
    first, last = nn.Linear(D_IN, width), nn.Linear(width, CLASSES)
    nn.init.normal_(first.weight, std=D_IN**-0.5)
    # The output starts at zero, as muP wants it.
    nn.init.zeros_(last.weight)
    layers = [first, nn.ReLU()]
    for _ in range(2):
        if structure == "dense":
            hidden = nn.Linear(width, width, bias=False)
            nn.init.normal_(hidden.weight, std=width**-0.5)
        else:
            hidden = KSLinear(CHAINS[structure](width), bias=False)
        layers += [hidden, nn.ReLU()]
    return nn.Sequential(*layers, last)


def final_loss(task: tuple[Tensor, Tensor], structure: str, width: int, rule: str, lr: float, seed: int) -> float:
    """Training loss over the whole set after ``STEPS`` steps of AdamW."""
    x, y = task
    torch.manual_seed(seed)
    model = mlp(structure, width)
    options = {"base_width": BASE_WIDTH, "input_layers": ["0"]} if rule == "mup" else {}
    optimizer = torch.optim.AdamW(param_groups(model, lr, rule, **options))
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return cross_entropy(model(x), y).item()


_losses: dict[tuple[str, int, str], Tensor] = {}


def losses(task: tuple[Tensor, Tensor], structure: str, width: int, rule: str) -> Tensor:
    """Final loss at every rate of ``RATES``, mean over seeds; computed once for all tests."""
    key = (structure, width, rule)
    if key not in _losses:
        runs = [[final_loss(task, *key, lr, seed) for lr in RATES] for seed in range(SEEDS)]
        _losses[key] = torch.tensor(runs).mean(0)
        print(f"{structure} {rule} width {width}: " + ", ".join(f"{value:.3f}" for value in _losses[key]))
    return _losses[key]


def best_rate(losses: Tensor) -> float:
    """Where the parabola through the least loss and its neighbours, over the rate's logarithm, is least.

    A change in the last digit that swaps two near-equal neighbours then moves the answer little.
    """
    i = int(losses.argmin())
    assert 0 < i < len(RATES) - 1, f"the best rate is at the end of the grid: {losses}"
    left, least, right = losses[i - 1 : i + 2].tolist()
    return RATES[i] * 2 ** ((left - right) / (2 * (left - 2 * least + right)))


@pytest.mark.parametrize("structure", [*CHAINS, "dense"])
def test_best_rate_carries_over_across_widths(task, structure):
    narrow = best_rate(losses(task, structure, BASE_WIDTH, "mup"))
    wide = best_rate(losses(task, structure, WIDTH, "mup"))
    assert 0.5 <= wide / narrow <= 2


@pytest.mark.parametrize("structure", CHAINS)
def test_best_rate_carries_over_from_dense(task, structure):
    dense = best_rate(losses(task, "dense", BASE_WIDTH, "mup"))
    chain = best_rate(losses(task, structure, BASE_WIDTH, "mup"))
    assert 0.5 <= chain / dense <= 2


def test_without_the_rule_it_does_not(task):
    """With one rate for all, the best of width 64 leaves a Monarch MLP of width 512 far above its own best loss."""
    assert best_rate(losses(task, "monarch", WIDTH, "none")) < 0.5 * best_rate(
        losses(task, "monarch", BASE_WIDTH, "none")
    )
    wide = losses(task, "monarch", WIDTH, "none")
    at_best_of_narrow = wide[losses(task, "monarch", BASE_WIDTH, "none").argmin()]
    assert at_best_of_narrow > 1.3 * wide.min()
    with_rule = losses(task, "monarch", WIDTH, "mup")
    assert with_rule[losses(task, "monarch", BASE_WIDTH, "mup").argmin()] < 1.3 * with_rule.min()
