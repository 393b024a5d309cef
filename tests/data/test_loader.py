"""BatchLoader: batches are a function of (seed, epoch, batch index), sharded, and resumable inside an epoch."""

import pytest
import torch

from structlayers.data.loader import BatchLoader, seeded_generator
from structlayers.errors import CheckpointError, ConfigError


def fetch(indices, generator):
    return indices, torch.rand(len(indices), generator=generator)


def loader(size=23, batch_size=4, *, shuffle=True, seed=7, **kw):
    return BatchLoader(fetch, size, batch_size, shuffle=shuffle, seed=seed, **kw)


def batches(it):
    return [(x.tolist(), noise.tolist()) for x, noise in it]


def epoch_of(it, epoch):
    it.set_epoch(epoch)
    return batches(it)


def test_training_epoch_is_a_permutation_in_full_batches():
    got = batches(loader())
    seen = [i for x, _ in got for i in x]
    assert [len(x) for x, _ in got] == [4] * 5 and len(loader()) == 5
    assert len(set(seen)) == 20 and set(seen) <= set(range(23))


def test_same_seed_and_epoch_give_the_same_batches_whatever_the_global_generator():
    torch.manual_seed(0)
    first = epoch_of(loader(), 3)
    torch.manual_seed(1)
    assert epoch_of(loader(), 3) == first


def test_order_and_noise_change_with_epoch_and_seed():
    base = epoch_of(loader(), 0)
    for other in (epoch_of(loader(), 1), epoch_of(loader(seed=8), 0)):
        assert all(a[0] != b[0] and a[1] != b[1] for a, b in zip(base, other, strict=True))


def test_noise_differs_between_batches_and_processes():
    noise = [n for rank in range(2) for _, n in batches(loader(rank=rank, world_size=2))]
    assert len(noise) == 4 and len({tuple(n) for n in noise}) == 4


def test_global_generator_is_left_alone():
    state = torch.get_rng_state()
    batches(loader())
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_visits_every_example_once_in_order():
    got = batches(loader(shuffle=False))
    assert [i for x, _ in got for i in x] == list(range(23))
    assert [len(x) for x, _ in got] == [4, 4, 4, 4, 4, 3] and len(loader(shuffle=False)) == 6


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_steps_of_one_permutation(world_size):
    alone = batches(loader(size=26, batch_size=2 * world_size))
    shards = [batches(loader(size=26, batch_size=2, rank=r, world_size=world_size)) for r in range(world_size)]
    for step, (whole, _) in enumerate(alone):
        assert [i for shard in shards for i in shard[step][0]] == whole
    assert {len(shard) for shard in shards} == {len(alone)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_evaluate_every_example_exactly_once(world_size):
    seen = []
    for rank in range(world_size):
        shard = loader(shuffle=False, rank=rank, world_size=world_size)
        got = batches(shard)
        assert len(got) == len(shard)
        seen += [i for x, _ in got for i in x]
    assert sorted(seen) == list(range(23))


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 4])
def test_resume_continues_the_epoch_at_the_next_batch(epoch, position):
    whole = epoch_of(loader(), epoch)
    stopped = loader()
    stopped.set_epoch(epoch)
    it = iter(stopped)
    head = [next(it) for _ in range(position)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    # Lightning makes the iterator before the epoch is known.
    tail = iter(resumed)
    resumed.set_epoch(epoch)
    assert batches(head) + batches(tail) == whole
    assert epoch_of(resumed, epoch + 1) == epoch_of(loader(), epoch + 1)


def test_resume_after_a_full_epoch_starts_the_next_one():
    finished = loader()
    batches(finished)
    for state in (finished.state_dict(), {**finished.state_dict(), "batch_size": 8}):
        resumed = loader()
        resumed.load_state_dict(state)
        assert epoch_of(resumed, 1) == epoch_of(loader(), 1)


def test_state_between_epochs_is_the_start_of_the_new_one():
    it = loader()
    batches(it)
    it.set_epoch(1)
    assert it.state_dict()["position"] == 0


def test_a_second_pass_in_the_same_epoch_starts_over():
    it = loader()
    assert batches(it) == batches(it)
    resumed = loader()
    resumed.load_state_dict({**it.state_dict(), "position": 2})
    assert len(batches(resumed)) == 3
    assert len(batches(resumed)) == 5


def test_the_epoch_is_asked_for_when_a_pass_begins():
    epochs = [0, 2]
    it = loader(epoch=lambda: epochs[0])
    assert batches(it) == epoch_of(loader(), 0)
    second = iter(it)
    epochs.pop(0)
    assert batches(second) == epoch_of(loader(), 2)


def test_state_is_plain_integers():
    it = loader()
    next(iter(it))
    state = it.state_dict()
    assert state == {"epoch": 0, "position": 1, "seed": 7, "size": 23, "batch_size": 4, "world_size": 1}
    assert {type(value) for value in state.values()} == {int}


@pytest.mark.parametrize("changed", [{"batch_size": 5}, {"size": 24}, {"seed": 8}, {"world_size": 2}])
def test_resume_in_mid_epoch_refuses_other_data(changed):
    stopped = loader()
    next(iter(stopped))
    [(name, value)] = changed.items()
    with pytest.raises(CheckpointError, match=rf"{name}={stopped.state_dict()[name]}.*{name}={value}"):
        loader(**changed).load_state_dict(stopped.state_dict())


def test_training_needs_one_batch_per_process():
    with pytest.raises(ConfigError, match=r"batch_size=12: 23 training examples .* 2 process"):
        loader(batch_size=12, world_size=2)


def test_seeded_generator_depends_on_the_whole_key():
    draws = {torch.rand(1, generator=seeded_generator(*key)).item() for key in [(0,), (1,), (1, 2), (2, 1), (1, 2, 3)]}
    assert len(draws) == 5
    assert torch.rand(1, generator=seeded_generator(1, 2)).item() in draws
