"""Which dimension of a parameter FSDP2 divides."""

from __future__ import annotations

import math

import pytest
import torch

from structlayers import Chain, KSLinear
from structlayers.sharding import shard_placement_fn


def largest_share(shape: tuple[int, ...], world_size: int) -> float:
    """Of the elements of a parameter, what the process with the most of them holds."""
    dimension = shard_placement_fn(torch.empty(shape, device="meta"), world_size).dim
    return math.ceil(shape[dimension] / world_size) / shape[dimension]


@pytest.mark.parametrize(
    ("shape", "world_size", "dimension"),
    [
        ((4, 1, 8, 8), 2, 0),
        ((1, 4, 8, 8), 2, 1),
        ((1, 3, 8, 5), 2, 2),
        ((1, 3, 5, 8), 2, 3),
        ((1, 6, 5, 4), 4, 3),
        ((1, 3, 5, 7), 2, 0),
        ((1, 4, 8, 8), 1, 0),
        ((768,), 2, 0),
        ((5,), 2, 0),
        ((10, 64), 4, 1),
        ((), 2, 0),
        ((0, 4), 2, 1),
    ],
)
def test_the_first_dimension_that_is_divisible(shape, world_size, dimension):
    assert shard_placement_fn(torch.empty(shape, device="meta"), world_size).dim == dimension


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
def test_factors_of_usual_chains_are_divided_evenly(world_size):
    width = 256 * world_size
    chains = (
        Chain.monarch(width, 4 * width, blocks=4),
        Chain.monarch(4 * width, width, blocks=16),
        Chain.low_rank(width, width, rank=8),
        Chain.block_diagonal(width, width, blocks=4),
        Chain.btt((4 * world_size) ** 2, (4 * world_size) ** 2, rank=2),
    )
    for chain in chains:
        layer = KSLinear(chain, device="meta")
        assert [largest_share(tuple(w.shape), world_size) for w in layer.factors] == [1 / world_size] * len(chain)


def test_a_world_size_that_does_not_exist():
    with pytest.raises(ValueError, match="world_size = 0: expected at least 1"):
        shard_placement_fn(torch.empty(4, 4), 0)


def test_without_a_process_group_the_number_of_processes_is_asked_for():
    with pytest.raises(ValueError, match="process group"):
        shard_placement_fn(torch.empty(4, 4))
