"""Energy from a counter that moves in steps, and what stands in a row where there is none."""

import sys
import types

import pytest
import torch

from structlayers.bench import nvml
from structlayers.bench.energy import EnergyColumn, EnergyError, EnergyMeter
from structlayers.bench.products import fill_energy
from structlayers.bench.results import Result


class Gpu:
    """A simulated clock, and a counter that moves every ``period_s``: 50 W idle, 250 W while a call runs."""

    def __init__(self, period_s=0.02, call_s=0.001, offset_j=1e6):
        self.now, self.used_j, self.shown_j, self.shown_at = 0.0, offset_j, offset_j, 0.0
        self.period_s, self.call_s = period_s, call_s
        self.calls = 0

    def spend(self, seconds, watts):
        self.now += seconds
        self.used_j += seconds * watts
        if self.now - self.shown_at >= self.period_s:
            self.shown_j, self.shown_at = self.used_j, self.now

    def read_j(self):
        return self.shown_j

    def call(self):
        self.calls += 1
        self.spend(self.call_s, 250.0)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(EnergyMeter, "_pause", lambda self: gpu.spend(1e-3, 50.0))
    return gpu


def meter_of(gpu, window_s=1.0):
    return EnergyMeter(gpu.read_j, lambda: None, window_s, clock=lambda: gpu.now)


def test_energy_of_a_call_and_idle_power(gpu):
    meter = meter_of(gpu)
    assert meter.period_s == pytest.approx(0.02, rel=0.1)
    assert meter.idle_power_w == pytest.approx(50.0, rel=0.03)
    energy = meter.measure(gpu.call)
    assert energy.per_call_j == pytest.approx(0.25, rel=0.03)
    assert energy.power_w == pytest.approx(250.0, rel=0.03)
    assert energy.window_s >= 1.0
    # A launch of four calls costs a call a quarter.
    assert meter.measure(gpu.call, 4).per_call_j == pytest.approx(0.25 / 4, rel=0.03)


def test_the_window_has_many_periods_of_a_slow_counter(gpu):
    gpu.period_s = 0.4
    meter = meter_of(gpu, window_s=0.5)
    assert meter.window_s >= 5 * 0.4 * 0.9
    assert meter.measure(gpu.call).per_call_j == pytest.approx(0.25, rel=0.05)


def test_what_cannot_use_least_is_not_measured():
    class Column:
        def fill(self, result, call, n, calls):
            assert calls is None
            result.energy_j = call() * n

    times = {"einsum": 5.0, "bmm": 2.0, "dense": 4.0, "cuda": 9.0, "auto": 1.0, "cuda/run4": 20.0, "dense_built": None}
    results = [Result(name, p50_ms=time) for name, time in times.items()]
    fill_energy(results, {name: lambda: 0.5 for name in times}, 10, Column())
    measured = {result.contender for result in results if result.energy_j == 5.0}
    assert measured == {"bmm", "dense", "cuda", "auto", "cuda/run4"}
    assert [r.contender for r in results if r.energy_reason] == ["einsum"]
    assert "more than 2 times the time of another" in results[0].energy_reason


def test_a_counter_that_stands_still_is_an_error(gpu):
    gpu.read_j = lambda: 0.0
    with pytest.raises(EnergyError, match=r"stood still at 0\.0 J"):
        meter_of(gpu)


def test_a_counter_that_runs_backwards_is_an_error(gpu):
    meter = meter_of(gpu)
    read, falls = gpu.read_j, iter(range(10**6))
    meter._read_j = lambda: read() - 1e3 * next(falls)
    with pytest.raises(EnergyError, match=r"the energy counter read -"):
        meter.measure(gpu.call)


# ---- NVML


class NvmlError(Exception):
    pass


def fake_pynvml(monkeypatch, **functions):
    module = types.ModuleType("pynvml")
    module.NVMLError = NvmlError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = "sm", "mem", "gpu"
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: ("handle", uuid)
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"aa-{index}"))
    return module


def failing(*_):
    raise NvmlError("Not Supported")


def test_the_counter_is_the_devices_own(monkeypatch):
    """By UUID, since NVML does not know which devices are hidden from torch."""
    asked = []
    fake_pynvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=lambda handle: asked.append(handle) or 5000)
    assert nvml.energy_counter(torch.device("cuda", 1))() == 5.0
    assert set(asked) == {("handle", "GPU-aa-1")}


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_device_without_a_counter_gives_the_reason(monkeypatch, name):
    fake_pynvml(monkeypatch, **{"nvmlDeviceGetTotalEnergyConsumption": lambda handle: 1, name: failing})
    column = EnergyColumn(torch.device("cuda", 0))
    assert column.idle_power_w is None
    result = Result("bmm", "timed", p50_ms=1.0)
    column.fill(result, lambda: None, 4)
    assert "Not Supported" in result.energy_reason
    assert result.energy_j is None and result.power_w is None


def test_without_the_package_or_a_gpu(monkeypatch):
    fake_pynvml(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in EnergyColumn(torch.device("cuda", 0)).reason
    assert EnergyColumn(torch.device("cpu")).reason == "NVML reads NVIDIA GPUs; this device is cpu"


def test_state_leaves_out_what_is_unknown(monkeypatch):
    load = types.SimpleNamespace(gpu=93)
    fake_pynvml(
        monkeypatch,
        nvmlDeviceGetClockInfo=lambda handle, kind: {"sm": 1980, "mem": 2619}[kind],
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetTemperature=failing,
        nvmlDeviceGetPowerUsage=lambda handle: 123_456,
        nvmlDeviceGetUtilizationRates=lambda handle: load,
    )
    device = torch.device("cuda", 0)
    state = nvml.device_state(device)
    assert (state["sm_clock_mhz"], state["memory_clock_mhz"], state["power_w"]) == (1980, 2619, 123.456)
    assert "temperature_c" not in state
    assert nvml.busy_reason(device) == "the GPU was busy before the run: 93 % load"
    load.gpu = 3
    assert nvml.busy_reason(device) == ""
    assert nvml.device_state(torch.device("cpu")) == {}


def test_state_by_the_drivers_command(monkeypatch):
    fake_pynvml(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    commands = []

    def run(command, **_):
        commands.append(command)
        return types.SimpleNamespace(stdout="1980, 1980, 2619, 41, [N/A], 0\n")

    monkeypatch.setattr(nvml.subprocess, "run", run)
    state = nvml.device_state(torch.device("cuda", 2))
    assert "--id=GPU-aa-2" in commands[0]
    assert (state["temperature_c"], state["utilisation_percent"]) == (41.0, 0.0)
    assert "power_w" not in state
