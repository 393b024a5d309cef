"""Peak memory and FLOPs of one call."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def peak_memory(call: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """Peak bytes that ``call`` allocates beyond what was live before it, and how they were measured.

    Weights and inputs are not in it: they were live already. On CUDA the caching allocator counts, on CPU torch's
    allocator; scratch memory that a library takes for itself (oneDNN, MKL, cuBLAS workspaces outside the allocator) is
    seen by neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak, "torch CPU allocator (profiler)"


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in one call, counted by ``FlopCounterMode``."""
    # torch 2.13 has formulas for the CUDA attention kernels, none for the CPU one, and none for a product with an
    # activation.
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._addmm_activation: _addmm_flops,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return counter.get_total_flops()


def _addmm_flops(bias: Any, left: Any, right: Any, *_: object, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_flops(query: Any, key: Any, value: Any, *_: object, out_shape: object = None, **__: object) -> int:
    return sdpa_flop_count(query, key, value)
