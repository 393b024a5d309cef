"""What NVML says about the GPU that torch uses: clocks, temperature, power, load, and the total-energy counter.

NVML numbers the GPUs of the host, torch those of ``CUDA_VISIBLE_DEVICES``: they meet by UUID.
"""

import csv
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from structlayers.problem import device_index

# Load that other work puts on a GPU, in per cent, above which its timings say little.
_BUSY_PERCENT = 10.0
_QUERY = {
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_most_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "utilisation_percent": "utilization.gpu",
}


class NvmlUnavailable(RuntimeError):
    """NVML, or what was asked of it, cannot be had here; the message is the reason."""


def uuid_of(device: torch.device) -> str:
    """The UUID of a CUDA device as NVML writes it. Raises :class:`NvmlUnavailable` on a CPU."""
    if device.type != "cuda":
        raise NvmlUnavailable(f"NVML reads NVIDIA GPUs; this device is {device.type}")
    index = device_index(device)
    text = str(torch.cuda.get_device_properties(index).uuid)
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"


def handle_of(device: torch.device) -> tuple[Any, Any]:
    """The module ``pynvml`` and its handle of ``device``; raises :class:`NvmlUnavailable` with the reason."""
    uuid = uuid_of(device)
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailable("the package nvidia-ml-py is absent: pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML does not give device {uuid}: {error}") from error


def energy_counter(device: torch.device) -> Callable[[], float]:
    """A function that reads the energy which ``device`` has used since its driver was loaded, in joules.

    Raises :class:`NvmlUnavailable` where the counter cannot be read (a MIG slice and GPUs before Volta have none).
    """
    pynvml, handle = handle_of(device)

    def read() -> float:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3

    try:
        read()
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"the total-energy counter of {uuid_of(device)} cannot be read: {error}") from error
    return read


def device_state(device: torch.device) -> dict[str, float]:
    """Clocks in MHz, temperature in degrees Celsius, power in W and load in per cent, now; what is unknown is left out.

    Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    try:
        return _state_by_nvml(*handle_of(device))
    except NvmlUnavailable:
        return _state_by_command(device)


def busy_reason(device: torch.device) -> str:
    """Why timings on ``device`` would be doubtful now, before any of them; empty where nothing speaks against them."""
    load = device_state(device).get("utilisation_percent", 0.0)
    return f"the GPU was busy before the run: {load:.0f} % load" if load > _BUSY_PERCENT else ""


def _state_by_nvml(pynvml: Any, handle: Any) -> dict[str, float]:
    readers: dict[str, Callable[[], float]] = {
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "sm_clock_most_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) * 1e-3,
        "utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    }
    found = {}
    for name, read in readers.items():
        try:
            found[name] = float(read())
        except pynvml.NVMLError:
            continue
    return found


def _state_by_command(device: torch.device) -> dict[str, float]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, f"--id={uuid_of(device)}"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for name, text in zip(_QUERY, next(csv.reader(done.stdout.splitlines()), []), strict=False):
        try:
            found[name] = float(text)
        except ValueError:
            # "[N/A]" on some devices.
            continue
    return found
