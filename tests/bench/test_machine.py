import torch

from structlayers.bench.machine import Roofline, describe_machine, measure_roofline
from structlayers.bench.timing import TimingPlan

CPU = torch.device("cpu")


def test_the_machine_is_described_by_what_numbers_depend_on():
    found = describe_machine(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["float32_precision"] == torch.get_float32_matmul_precision()
    assert {"commit", "cpu", "structlayers", "system", "python"} <= found.keys()
    assert "gpu" not in found


def test_measured_rates_are_those_of_a_computer(monkeypatch):
    monkeypatch.setattr("structlayers.bench.machine._COPY_SIZES", {"cpu": (2**20,)})
    monkeypatch.setattr("structlayers.bench.machine._MATMUL_SHAPES", {"cpu": ((128, 128, 128), (256, 256, 256))})
    roofline = measure_roofline(CPU, torch.float32, TimingPlan(warmup=1, budget_s=0.0, min_samples=3))
    assert 0.05 < roofline.copy_gb_per_s < 10_000
    assert 0.05 < roofline.matmul_gflop_per_s < 100_000


def test_the_floor_is_the_larger_of_traffic_and_arithmetic():
    roofline = Roofline(copy_gb_per_s=10.0, matmul_gflop_per_s=100.0)
    assert roofline.floor_ms(n_bytes=1e9, flops=1e9) == 100.0
    assert roofline.floor_ms(n_bytes=1e6, flops=1e9) == 10.0
