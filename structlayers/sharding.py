"""Fully sharded training (FSDP2): which dimension of a parameter the processes divide among them.

``torch.distributed.fsdp.fully_shard`` divides dimension 0 by default. A factor is stored as ``(a, d, b, c)``, and the
left factors of most chains have ``a = 1``: the first process would hold all of them.
"""

from __future__ import annotations

import torch.distributed
from torch import Tensor
from torch.distributed.tensor import Shard


def shard_placement_fn(
    parameter: Tensor,  # any shape; a factor is (a, d, b, c)
    world_size: int | None = None,
) -> Shard:
    """Choose the first dimension that ``world_size`` divides, or dimension 0 where there is none.

    For ``fully_shard(module, shard_placement_fn=shard_placement_fn)``. ``world_size`` is the number of processes that
    share one copy of the parameters, by default all of them; give it with :func:`functools.partial` for another mesh.
    FSDP2 shards dimension 0 unevenly and no other: a factor none of whose sizes is divisible, such as
    ``(1, 3, 5, 7)`` for two processes, stays with the first ``a`` of them.
    Raises ``ValueError`` if ``world_size`` is below 1, or is not given and there is no process group.
    """
    if world_size is None:
        world_size = torch.distributed.get_world_size()
    if world_size < 1:
        raise ValueError(f"world_size = {world_size}: expected at least 1")
    # From the left: the further right the dimension, the shorter the runs that are copied around every collective.
    return Shard(next((i for i, size in enumerate(parameter.shape) if size and size % world_size == 0), 0))
