"""A batch loader for tensors in memory, whose batches depend on (seed, epoch, batch index) and nothing else.

Lightning sees an ordinary iterable, and saves and loads its ``state_dict()`` with the fit loop, so that a run continues
exactly, in the middle of an epoch too. Sharding between processes is done here (``rank``, ``world_size``), so that
Lightning has no sampler to inject.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structlayers.errors import CheckpointError, ConfigError

Batch = tuple[Tensor, Tensor]
# (indices (B,), generator) -> (x, y); all randomness comes from the generator
Fetch = Callable[[Tensor, torch.Generator], Batch]


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream is a function of the integers in ``key``, each at least 0."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


class BatchLoader:
    """Iterate over the batches ``fetch(indices, generator)`` of one epoch.

    Training (``shuffle=True``): every batch is full and every process sees as many batches; at a step the processes
    take neighbouring pieces of one permutation. Evaluation: examples rank, rank + world_size, ... in order, none left
    out, none repeated. The epoch is what ``epoch()`` returns when a pass begins, if it is given, else the last
    ``set_epoch``. Raises ``ConfigError`` if training has less than one batch per process.
    """

    def __init__(
        self,
        fetch: Fetch,
        size: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: Callable[[], int] | None = None,
    ) -> None:
        if shuffle and size < batch_size * world_size:
            raise ConfigError(
                f"batch_size={batch_size}: {size} training examples do not fill one batch for each of {world_size} "
                "process(es)"
            )
        self.fetch = fetch
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._given_epoch = epoch
        self._epoch = 0
        # epoch, and batches of it handed out
        self._place = (0, 0)
        self._resuming = False

    @property
    def epoch(self) -> int:
        """The epoch of a pass that would begin now."""
        return self._given_epoch() if self._given_epoch else self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, in a loop of one's own."""
        self._epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return self.size // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.size, self.world_size)) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator runs nothing before its first next(): Lightning calls iter() before the epoch is known.
        epoch = self.epoch
        start = self._position() if self._resuming else 0
        self._resuming = False
        order = self._order(epoch)
        for index in range(start, len(self)):
            # Counted before the yield: a checkpoint written while this batch is in use has consumed it.
            self._place = (epoch, index + 1)
            yield self.fetch(self._indices(order, index), seeded_generator(self.seed, epoch, index, self.rank))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        return torch.randperm(self.size, generator=seeded_generator(self.seed, epoch))

    def _position(self) -> int:
        epoch, position = self._place
        return position if epoch == self.epoch else 0

    def _indices(self, order: Tensor, index: int) -> Tensor:
        if self.shuffle:
            start = (index * self.world_size + self.rank) * self.batch_size
            return order[start : start + self.batch_size]
        start = index * self.batch_size
        return order[self.rank :: self.world_size][start : start + self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch and the numbers that give it a meaning, all plain integers."""
        return {"epoch": self.epoch, "position": self._position(), **self._meaning()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after batch ``position`` of ``epoch`` in the next pass; a pass in another epoch starts at 0.

        Raises ``CheckpointError`` in mid-epoch if the seed, the sizes or the number of processes have changed.
        """
        middle = 0 < state["position"] < len(self)
        for name, value in self._meaning().items():
            if middle and state[name] != value:
                raise CheckpointError(
                    f"the checkpoint stopped in the middle of an epoch with {name}={state[name]}; the data now have "
                    f"{name}={value}, so the rest of that epoch does not exist"
                )
        self.set_epoch(state["epoch"])
        self._place = (state["epoch"], state["position"])
        self._resuming = True

    def _meaning(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "size": self.size,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }
