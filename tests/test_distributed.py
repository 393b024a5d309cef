"""Training on two processes (gloo, CPU) with DDP and FSDP2: the same gradients and weights as on one.

Every test starts this file twice as a program, which runs one of the ``work_*`` functions in each process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from structlayers import Chain, KSLinear, load, param_groups, save
from structlayers.sharding import shard_placement_fn

WORLD_SIZE = 2


class Network(nn.Module):
    """Two structured layers, one of them with a frozen factor and padded, between dense ones."""

    def __init__(self, recompute: bool = False, device: str | None = None) -> None:
        super().__init__()
        options = {"recompute": recompute, "device": device}
        self.up = KSLinear(Chain.monarch(12, 30, blocks=4, rank=2), activation="gelu", **options)
        self.down = KSLinear(Chain.butterfly(32), **options)
        self.head = nn.Linear(32, 5, device=device)
        self.up.factors[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.pad(self.up(x), (0, 2))))


def network(**options) -> Network:
    torch.manual_seed(0)
    return Network(**options).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (8,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))


def trained(steps: int = 3) -> Network:
    """What one process gets from the whole batch."""
    model = network()
    optimizer = adamw(model)
    for _ in range(steps):
        step(model, optimizer, *batch())
    return model


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    wanted = dict(expected.named_parameters())
    found = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert (parameter.grad is None) == (wanted[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(whole(parameter.grad), wanted[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_weights(state: dict[str, Tensor], expected: nn.Module) -> None:
    wanted = expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


def own_part(rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch()
    return x[rank::WORLD_SIZE], y[rank::WORLD_SIZE]


def sharded(model: Network) -> Network:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.up, model.down):
        fully_shard(layer, shard_placement_fn=shard_placement_fn)
    return fully_shard(model, shard_placement_fn=shard_placement_fn)


# ---- what each of the two processes does


def work_ddp(rank: int, folder: Path) -> None:
    for recompute in (False, True):
        model = nn.parallel.DistributedDataParallel(network(recompute=recompute))
        optimizer = adamw(model)
        x, y = own_part(rank)
        for _ in range(3):
            step(model, optimizer, x, y)
        expected = trained()
        assert_same_gradients(model, expected)
        assert_same_weights(model.module.state_dict(), expected)


def work_fsdp2(rank: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    expected = trained()
    for recompute in (False, True):
        model = sharded(network(recompute=recompute))
        factors = [factor for layer in (model.up, model.down) for factor in layer.factors]
        held = sum(factor.to_local().numel() for factor in factors)
        assert held <= 0.6 * sum(factor.numel() for factor in factors)
        # With a default placement this would not hold: every left factor is whole on the first process.
        assert factors[0].shape[0] == 1
        assert factors[0].to_local().numel() == factors[0].numel() // WORLD_SIZE
        optimizer = adamw(model)
        x, y = own_part(rank)
        for _ in range(3):
            step(model, optimizer, x, y)
        assert_same_gradients(model, expected)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if rank == 0:
            assert_same_weights(state, expected)
            # The whole weights are those of an ordinary model, and so is its file.
            gathered = network()
            gathered.load_state_dict(state)
            loaded = load(save(gathered, folder / "model.safetensors"), network())
            assert_same_weights(loaded.state_dict(), expected)


def work_sharded_checkpoint(rank: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    x, y = own_part(rank)

    def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    model = sharded(network())
    optimizer = adamw(model)
    step(model, optimizer, x, y)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "sharded")

    # Another start, so that nothing but the file can make the rest of the training the same.
    torch.manual_seed(5)
    resumed = sharded(Network().double())
    optimizer = adamw(resumed)
    state = state_of(resumed, optimizer)
    dcp.load(state, checkpoint_id=folder / "sharded")
    set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for _ in range(2):
        step(resumed, optimizer, x, y)
    assert_same_gradients(resumed, trained())


def work_fsdp2_from_meta(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = Network(device="meta")
    fully_shard(model, shard_placement_fn=shard_placement_fn, mp_policy=policy)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    plain = Network()
    plain.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
    for factor, twin in zip(model.down.factors, Network().down.factors, strict=True):
        # Drawn by the rule, whichever process holds it: about the deviation of factors drawn on one process.
        assert 0.5 < whole(factor).std() / twin.std() < 2
    x, y = own_part(rank)
    logits = model(x.float())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), plain(x.float()), rtol=0.05, atol=0.05)
    F.cross_entropy(logits.float(), y).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# ---- the tests


def run_on_two_processes(name: str, folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # The name of a machine in a sandbox often resolves to nothing.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes = []
    for rank in range(WORLD_SIZE):
        command = [sys.executable, __file__, name, str(rank), str(folder)]
        with (folder / f"printed{rank}").open("w") as printed:
            processes.append(subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment))
    deadline = time.monotonic() + 180
    try:
        # The first that fails ends the wait for the other.
        while {process.poll() for process in processes} in ({None}, {None, 0}) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = "\n".join((folder / f"printed{rank}").read_text() for rank in range(WORLD_SIZE))
    assert [process.returncode for process in processes] == [0] * WORLD_SIZE, text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in globals() if name.startswith("work_")])
def test_two_processes(name, tmp_path):
    run_on_two_processes(name, tmp_path)


def main() -> None:
    name, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/processes",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=120),
    )
    globals()[name](rank, folder)
    (folder / f"done{rank}").touch()
    # Neither leaves while the other may still talk to it.
    while not all((folder / f"done{other}").exists() for other in range(WORLD_SIZE)):
        time.sleep(0.01)
    # Threads of Gloo that still run now and then abort an interpreter that takes itself down.
    os._exit(0)


if __name__ == "__main__":
    main()
