"""What machine this is, and how fast it copies and multiplies: the roofline under every row."""

import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from structlayers.bench.timing import Timing, TimingPlan, time_interleaved

_ROOT = Path(__file__).resolve().parents[2]

# Float32 elements. On CUDA larger than the L2, which is flushed before a sample; CPU caches are not, so that there a
# ceiling must count what fits into them.
_COPY_SIZES = {"cpu": (2**14, 2**17, 2**20, 2**24), "cuda": (2**26, 2**28)}
# (m, n, k) of y = x @ w.T with x (m, k), w (n, k): square ones, and the tall ones of a layer; smallest first.
_MATMUL_SHAPES = {
    "cpu": ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 512, 512)),
    "cuda": ((4096, 4096, 4096), (8192, 4096, 4096), (16384, 4096, 1024), (8192, 8192, 8192)),
}
# A type that the processor emulates would otherwise hold up a run for minutes; its smaller shapes have told its rate by
# then.
_SLOW_CALL_MS = 500.0


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings of one device for one dtype."""

    copy_gb_per_s: float  # bytes read plus bytes written
    matmul_gflop_per_s: float

    def floor_ms(self, n_bytes: float, flops: float) -> float:
        """The least time for so much traffic and arithmetic: the larger of the two."""
        return max(n_bytes / (self.copy_gb_per_s * 1e6), flops / (self.matmul_gflop_per_s * 1e6))


def describe_machine(device: torch.device) -> dict[str, object]:
    """Name the machine and the versions that a number depends on; what cannot be found out is None."""
    found: dict[str, object] = {
        "structlayers": _version("structlayers"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def measure_roofline(device: torch.device, dtype: torch.dtype, plan: TimingPlan | None = None) -> Roofline:
    """Measure the copy rate and the ``dtype`` matmul rate of ``device``: the best over several shapes, random data."""
    plan = plan or TimingPlan(budget_s=0.1, min_samples=5, max_samples=100)
    return Roofline(_best_rate(_copies(device), device, plan), _best_rate(_matmuls(device, dtype), device, plan))


def _best_rate(cases: Iterable[tuple[float, Callable[[], object]]], device: torch.device, plan: TimingPlan) -> float:
    """Best of ``work / time`` over ``(work, call)``, in 1e9 per second; stops after a call of over half a second."""
    best = 0.0
    for work, call in cases:
        timing = time_interleaved({"call": call}, device, plan)["call"]
        if not isinstance(timing, Timing):
            raise timing
        # A ceiling is what the machine can do, not what it does beside other work.
        best = max(best, work / (timing.p20_ms * 1e6))
        if timing.p50_ms > _SLOW_CALL_MS:
            break
    return best


def _copies(device: torch.device) -> Iterable[tuple[float, Callable[[], object]]]:
    for size in _COPY_SIZES[device.type]:
        source = torch.randn(size, device=device)
        target = torch.empty_like(source)
        yield 2 * source.nbytes, partial(target.copy_, source)


def _matmuls(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[float, Callable[[], object]]]:
    for m, n, k in _MATMUL_SHAPES[device.type]:
        x, w = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        yield 2 * m * n * k, partial(torch.nn.functional.linear, x, w)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    if not (_ROOT / ".git").exists():
        return None
    commit = _output_of("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    changed = _output_of("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _output_of(*command: str) -> str | None:
    """First line that ``command`` prints; None if it is absent, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else None
