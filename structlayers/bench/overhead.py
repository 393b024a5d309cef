"""What a call costs on the host: from Python to the launch, the device too quick to matter."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from structlayers.nn import KSLinear
from structlayers.ops import ks_linear
from structlayers.patterns import Chain, Pattern

PATTERN = Pattern(1, 16, 16, 4)
# So few calls that the queue of launches, about a thousand long, never fills.
_CALLS, _ROUNDS = 200, 25


def call_time_us(call: Callable[[], object], device: torch.device) -> float:
    """Median over rounds of the mean host time of one call, in microseconds; the device idles before every round."""
    rounds = []
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        rounds.append((time.perf_counter() - start) / _CALLS * 1e6)
    return statistics.median(rounds)


def overheads_us(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, dict[str, float]]:
    """Microseconds of a call in inference mode, under ``no_grad`` and when gradients are recorded, by what is called.

    Batch 4, a pattern of four 16 x 16 blocks, bias; the backend is "cuda" on a GPU and "auto" on a CPU, in bfloat16 and
    float32. ``F.linear`` of the same size stands beside.
    """
    gpu = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    backend = "cuda" if gpu else "auto"
    x = torch.randn(4, PATTERN.in_features, device=device, dtype=dtype)
    weight = torch.randn(PATTERN.weight_shape, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(PATTERN.out_features, device=device, dtype=dtype, requires_grad=True)
    matrix = torch.randn(PATTERN.out_features, PATTERN.in_features, device=device, dtype=dtype, requires_grad=True)
    layer = KSLinear(Chain([PATTERN]), backend=backend, device=device, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {
        f"ks_linear, {backend}": lambda: ks_linear(x, weight, bias, backend=backend),
        f"KSLinear, {backend}": lambda: layer(x),
        "operator, recorded by torch": lambda: torch.ops.structlayers.ks_linear(
            x, weight, bias, None, None, "batch_first", "none", backend
        ),
        "F.linear": lambda: F.linear(x, matrix, bias),
    }
    modes: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "recording": nullcontext,
    }
    times: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        times[name] = {}
        for mode, context in modes.items():
            with context():
                call_time_us(call, device)
                times[name][mode] = call_time_us(call, device)
    return times


def overhead_table(device: torch.device) -> str:
    """:func:`overheads_us` as text."""
    times = overheads_us(device)
    width = max(map(len, times))
    modes = list(next(iter(times.values())))
    text = [f"{'us per eager call':<{width}} " + " ".join(f"{mode:>10}" for mode in modes)]
    text += [f"{name:<{width}} " + " ".join(f"{times[name][mode]:>10.2f}" for mode in modes) for name in times]
    text.append(f"{'(targets)':<{width}} {'8':>10} {'10':>10} {'25':>10}")
    return "\n".join(text)
