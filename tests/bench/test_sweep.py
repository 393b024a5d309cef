"""What long benchmark commands share: the command line with its sub-commands, devices, limits, Weights & Biases."""

import argparse
import sys
import types
from pathlib import Path

import pytest
import torch

from structlayers.bench import __main__ as command
from structlayers.bench import chains, kernels, report, sweep, training
from structlayers.bench.machine import Roofline
from structlayers.bench.timing import TimingPlan, copies_beyond_cache, in_turn, time_interleaved, wall_time_ms
from structlayers.errors import ConfigError

CPU = torch.device("cpu")


def test_sub_commands(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["structlayers.bench", "--help"])
    command.main()
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in command.COMMANDS)
    for arguments in ([], ["chain"]):
        monkeypatch.setattr(sys, "argv", ["structlayers.bench", *arguments])
        with pytest.raises(SystemExit, match="COMMAND"):
            command.main()
    for name in command.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["structlayers.bench", name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            command.main()
        assert f"python -m structlayers.bench {name}".replace("bench kernels", "bench") in capsys.readouterr().out


def test_the_command_is_named_as_a_shell_reads_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/structlayers/bench/__main__.py", "chains", "--chains", "(1,2,2,1)"])
    assert sweep.command_line() == "python -m structlayers.bench chains --chains '(1,2,2,1)'"
    monkeypatch.setattr(sys, "argv", ["/x/structlayers/bench/kernels.py", "--summary"])
    assert sweep.command_line() == "python -m structlayers.bench.kernels --summary"
    monkeypatch.setattr(sys, "argv", ["/x/y/infer.py", "model=vit"])
    assert sweep.command_line() == "python infer.py model=vit"


def test_options_and_their_limits():
    options = argparse.ArgumentParser()
    sweep.add_sweep_options(options, "outputs/x.jsonl")
    found = options.parse_args(["--minutes", "9", "--samples", "3", "4", "--energy"])
    assert (found.minutes, found.samples, found.energy, str(found.out)) == (9.0, [3, 4], True, "outputs/x.jsonl")
    assert sweep.Deadline(0).over and not sweep.Deadline(float("inf")).over and not sweep.Deadline(9).over
    assert str(sweep.Deadline(9)).startswith("9 min are over")
    for minutes in (-1, float("nan")):
        with pytest.raises(ConfigError, match=f"minutes = {minutes}: expected a number of at least 0"):
            sweep.Deadline(minutes)


def test_the_state_is_not_asked_for_all_the_time(monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "device_state", lambda device: asked.append(device) or {"power_w": float(len(asked))})
    sampler = sweep.StateSampler(CPU)
    assert [sampler.now(), sampler.now()] == [{"power_w": 1.0}] * 2
    eager = sweep.StateSampler(CPU, interval_s=0.0)
    assert [eager.now(), eager.now()] == [{"power_w": 2.0}, {"power_w": 3.0}]


def test_a_busy_gpu_is_named_in_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "busy_reason", lambda device: "the GPU was busy before the run: 93 % load")
    machine = sweep.machine_of(CPU, "abc")
    assert (machine["busy"], machine["commit"]) == ("the GPU was busy before the run: 93 % load", "abc")
    assert "warning: the GPU was busy" in capsys.readouterr().out


def test_rooflines_are_measured_once_for_each_type():
    asked = []

    def measure(device, dtype):
        asked.append((dtype, torch.get_float32_matmul_precision()))
        return Roofline(1.0, 90.0 if torch.get_float32_matmul_precision() == "highest" else 300.0)

    rooflines = sweep.Rooflines(CPU, measure)
    for _ in range(2):
        assert rooflines.of(torch.float32, False).matmul_gflop_per_s == 90.0
        assert rooflines.of(torch.float32, True).matmul_gflop_per_s == 300.0
    assert asked == [(torch.float32, "highest"), (torch.float32, "high")]
    # On a GPU float32 accuracy may come from three TF32 products.
    assert sweep.Rooflines(torch.device("cuda"), measure).of(torch.float32, False).matmul_gflop_per_s == 100.0


def test_rows_go_to_wandb_when_asked(monkeypatch):
    logged, ended = [], []
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=logged.append, finish=lambda: ended.append(True))
    started = []
    module.init = lambda **options: started.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = sweep.WandbLog("speed", {"suite": "table"})
    log.log_results({"case": "a", "n": 1, "reason": "", "results": [{"contender": "bmm", "p50_ms": 2.0, "tile": None}]})
    log.finish()
    assert logged == [{"case": "a", "n": 1, "contender": "bmm", "p50_ms": 2.0}] and ended == [True]
    assert started[0]["project"] == "speed" and started[0]["config"] == {"suite": "table"}
    silent = sweep.WandbLog(None, {})
    silent.log({"a": 1})
    silent.finish()
    assert len(started) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        sweep.WandbLog("speed", {})


# ---- timing


def test_calls_in_turn_are_one_call():
    order = []
    run = in_turn([lambda q=q: order.append(q) for q in range(3)], CPU)
    run()
    run()
    assert order == [0, 1, 2, 0, 1, 2]
    plan = TimingPlan(warmup=1, budget_s=0.0, min_samples=2, max_samples=2)
    timing = time_interleaved({"a": run}, CPU, plan)["a"]
    assert timing.per_call(3).p50_ms == pytest.approx(timing.p50_ms / 3)
    assert wall_time_ms(run, CPU, plan) > 0
    assert copies_beyond_cache(100, CPU) == 2
    with pytest.raises(ConfigError, match="flush_by"):
        TimingPlan(flush_by="wishing")


def test_copies_are_twice_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=50_000))
    gpu = torch.device("cuda")
    assert copies_beyond_cache(1000, gpu) == 100
    assert copies_beyond_cache(1001, gpu) == 100
    assert copies_beyond_cache(999, gpu) == 101
    assert copies_beyond_cache(700, gpu) == 128
    assert copies_beyond_cache(10**9, gpu) == 2
    assert copies_beyond_cache(1, gpu) == 128


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (kernels.main, ["--device", "foo"], "ConfigError: device = 'foo': expected cpu, cuda"),
        (kernels.main, ["--overhead", "--device", "meta"], "ConfigError: device = 'meta': expected cpu, cuda"),
        (kernels.main, ["--device", "cpu", "--batches", "0"], "ConfigError: batch = 0: expected an integer >= 1"),
        (chains.main, ["--device", "cpu", "--batches", "-1"], "ConfigError: batch = -1: expected an integer >= 1"),
        (training.main, ["--device", "cpu", "--batches", "0"], "ConfigError: batch = 0: expected an integer >= 1"),
        (chains.main, ["--device", "cpu", "--budget", "nan"], "ConfigError: budget_s = nan: expected a number"),
    ],
)
def test_a_wrong_option_is_one_line(run, options, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as caught:
        run([*options, "--out", str(tmp_path / "rows.jsonl")])
    assert "\n" not in caught.value.code


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    rows = Path(__file__).resolve().parents[2] / "benchmarks" / "training_h200_2026-11-24.jsonl"
    with pytest.raises(SystemExit, match=r"DataError: .*file/report: cannot be written: "):
        report.main([str(rows), "--out", str(tmp_path / "file" / "report")])
