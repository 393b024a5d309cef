"""What a run writes and shows: metrics.csv, the progress bar, the closing table."""

import csv
import re

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from structlayers import Chain, KSLinear
from structlayers.bench import cost
from structlayers.lit import LitModule
from structlayers.lit.callbacks import ProgressBar
from structlayers.lit.loggers import CSVLogger
from structlayers.lit.summary import RunResult, count_flops, disguised_chains, example_input, format_table, summarise
from structlayers.models import GPT


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_csv_rows_are_on_disk_at_once_and_columns_may_come_later(tmp_path):
    logger = CSVLogger(str(tmp_path / "run"))
    logger.log_metrics({"train/loss": 1.5}, step=0)
    assert rows_of(logger.path) == [{"step": "0", "train/loss": "1.5"}]
    logger.log_metrics({"val/loss": 2.5}, step=0)
    logger.log_metrics({"train/loss": 0.5}, step=1)
    assert rows_of(logger.path) == [
        {"step": "0", "train/loss": "1.5", "val/loss": ""},
        {"step": "0", "train/loss": "", "val/loss": "2.5"},
        {"step": "1", "train/loss": "0.5", "val/loss": ""},
    ]


def test_csv_of_a_resumed_run_is_continued(tmp_path):
    CSVLogger(str(tmp_path)).log_metrics({"train/loss": 1.5, "epoch": 0}, step=0)
    resumed = CSVLogger(str(tmp_path))
    resumed.log_metrics({"epoch": 1, "val/loss": 0.5}, step=1)
    assert rows_of(resumed.path) == [
        {"step": "0", "train/loss": "1.5", "epoch": "0", "val/loss": ""},
        {"step": "1", "train/loss": "", "epoch": "1", "val/loss": "0.5"},
    ]


def test_csv_of_a_resumed_run_loses_what_came_after_the_checkpoint(tmp_path):
    killed = CSVLogger(str(tmp_path))
    for step in range(4):
        killed.log_metrics({"train/loss": float(step)}, step=step)
    # After the first step, after the second, and between two batches of the third.
    for step in (0, 1, 2, 3):
        killed.log_metrics({"val/loss": float(step)}, step=step)
    killed.log_metrics({"test/loss": 1.0}, step=2)
    killed.log_metrics({"test/loss": 2.0}, step=4)
    killed.log_metrics({"train/loss": 9.0}, step=None)
    before = killed.path.read_bytes()

    resumed = CSVLogger(str(tmp_path))
    resumed.resume_after(2)
    # Resuming may still fail.
    assert killed.path.read_bytes() == before
    resumed.log_metrics({"train/loss": 0.5}, step=2)
    resumed.log_metrics({"train/loss": 0.5, "train/lr": 0.1}, step=3)
    rows = [(row["step"], row["train/loss"], row["val/loss"], row["test/loss"]) for row in rows_of(resumed.path)]
    assert rows == [
        ("0", "0.0", "", ""),
        ("1", "1.0", "", ""),
        ("0", "", "0.0", ""),
        ("1", "", "1.0", ""),
        ("2", "", "2.0", ""),
        ("2", "", "", "1.0"),
        ("", "9.0", "", ""),
        ("2", "0.5", "", ""),
        ("3", "0.5", "", ""),
    ]


def test_csv_of_a_resumed_run_in_another_folder_begins_there(tmp_path):
    logger = CSVLogger(str(tmp_path))
    logger.resume_after(2)
    logger.log_metrics({"train/loss": 0.5}, step=2)
    assert rows_of(logger.path) == [{"step": "2", "train/loss": "0.5"}]


def test_progress_bar_counts_samples(capsys):
    loader = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(3, (40,))), batch_size=10)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[ProgressBar(log_every_s=0)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(LitModule(nn.Linear(4, 3), "classification", lr=0.1), loader, loader)
    shown = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert re.search(r"120/120 \[.*samples/s, epoch=3, val/loss=\d\.\d+, val/accuracy=", shown[-1])
    assert any(re.search(r"60.0/120 .*samples/s, epoch=1, loss=\d\.\d+, val/loss=", line) for line in shown)


def test_flops_of_dense_and_structured_layers():
    chain = Chain.monarch(64, 64, blocks=8)
    x = torch.zeros(1, 64)
    assert count_flops(nn.Linear(64, 32), x) == 2 * 64 * 32
    assert count_flops(KSLinear(chain), x) == chain.flops(1)


def test_flops_of_training_and_inference_agree():
    model, tokens = GPT(256, 16, dim=32, depth=1, heads=2).eval(), torch.zeros(1, 16, dtype=torch.long)
    linears = sum(2 * 16 * layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    # Scores and weighted sums of the attention.
    assert count_flops(model, tokens) == cost.count_flops(lambda: model(tokens)) == linears + 2 * 2 * 16 * 16 * 32


class Probe(nn.Linear):
    """Says on which devices it ran."""

    def __init__(self, seen):
        super().__init__(8, 8)
        self.seen = seen
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x):
        self.seen(x.device.type)
        return super().forward(x) * self.scale


class LooksAtValues(Probe):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum().item() > 0 else 1.0)


def test_flops_are_counted_without_computing_where_shapes_say_it_all():
    seen = []
    shared = Probe(seen.append)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert count_flops(model, torch.ones(3, 8)) == 2 * 2 * 3 * 8 * 8
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_flops_of_a_model_that_looks_at_values_are_those_of_a_real_pass():
    seen = []
    assert count_flops(LooksAtValues(seen.append), torch.ones(3, 8)) == 2 * 3 * 8 * 8
    assert seen[-1] == "cpu"


def test_flops_leave_the_mode_of_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    count_flops(model, torch.zeros(1, 4))
    assert model.training


def test_disguised_chains_are_named():
    model = nn.ModuleDict(
        {"honest": KSLinear(Chain.monarch(64, 64, blocks=8)), "disguised": KSLinear(Chain.dense(4, 4))}
    )
    assert disguised_chains(model) == ("disguised",)


@pytest.mark.parametrize(
    ("task", "args", "shape", "dtype"),
    [
        ("classification", {"input_shape": (1, 8, 8), "num_classes": 10}, (1, 1, 8, 8), torch.float32),
        ("language_modelling", {"vocab_size": 256, "context_length": 16}, (1, 16), torch.int64),
    ],
)
def test_example_input(task, args, shape, dtype):
    x = example_input(task, args)
    assert x.shape == shape
    assert x.dtype == dtype


def test_format_table():
    assert format_table([["a", "b"], ["long", "1"]]) == "a     b\n-------\nlong  1"


def result(name, seed, accuracy, **options):
    defaults = {"n_parameters": 1234, "flops_per_sample": 5678, "n_swapped": 3, "kept": 0.25, "disguised": ()}
    rest = {"metrics": {"accuracy": accuracy, "loss": 0.5}, "wall_s": 10.0, "checkpoint": f"{name}/{seed}/best.ckpt"}
    measured = {"steps": 1200, "val_loss": 0.25, "step_ms": 12.5}
    return RunResult(name=name, seed=seed, **{**defaults, **rest, **measured, **options})


def test_summary_of_one_run():
    text = summarise([result("monarch", 0, 0.975)])
    assert re.search(r"^ +monarch$", text, re.MULTILINE)
    for label, value in {
        "parameters": "1,234",
        "replaced linears keep": "25.0%",
        "chains dense in disguise": "0 of 3",
        r"FLOPs per sample \(forward\)": "5,678",
        "test accuracy": "97.50%",
        r"test loss \(nats\)": "0.5000",
        "training steps": "1,200",
        r"last validation loss \(nats\)": "0.2500",
        "time per step": "12.50 ms",
        "wall time": "10.0 s",
    }.items():
        assert re.search(rf"^{label} +{value}$", text, re.MULTILINE), label
    assert "GPU memory" not in text
    assert text.endswith("checkpoint (monarch, seed 0): monarch/0/best.ckpt")


def test_what_was_not_measured_has_no_row():
    text = summarise([result("monarch", 0, 0.975, val_loss=None, step_ms=None)])
    assert "validation loss" not in text
    assert "time per step" not in text


def test_ratios_to_dense():
    text = summarise(
        [
            result("monarch", 0, 0.9, val_loss=0.204, step_ms=10.0, peak_bytes=3 * 2**30),
            result("dense", 0, 0.9, val_loss=0.2, step_ms=16.0, peak_bytes=4 * 2**30),
        ]
    )
    for label, values, ratio in (
        (r"last validation loss \(nats\)", "0.2040 +0.2000", "1.020"),
        ("time per step", "10.00 ms +16.00 ms", "0.625"),
        ("peak GPU memory", "3,072 MiB +4,096 MiB", "0.750"),
    ):
        assert re.search(rf"^{label} +{values}\n  monarch / dense +{ratio} +-$", text, re.MULTILINE), label


def test_no_ratio_where_one_was_not_measured():
    text = summarise([result("monarch", 0, 0.9, step_ms=None), result("dense", 0, 0.9)])
    assert re.search(r"^time per step +- +12.50 ms\nwall time", text, re.MULTILINE)


def test_summary_beside_dense_over_seeds():
    dense = {"kept": None, "n_swapped": 0, "n_parameters": 9999}
    text = summarise(
        [
            result("monarch", 0, 0.97, wall_s=10.0),
            result("monarch", 1, 0.99, wall_s=20.0),
            result("dense", 0, 0.98, **dense),
            result("dense", 1, 1.0, **dense),
        ]
    )
    assert re.search(r"^mean of 2 seeds +monarch +dense$", text, re.MULTILINE)
    assert re.search(r"^test accuracy +98.00% +99.00%$", text, re.MULTILINE)
    assert re.search(r"^  of each seed +97.00% 99.00% +98.00% 100.00%$", text, re.MULTILINE)
    assert re.search(r"^replaced linears keep +25.0% +-$", text, re.MULTILINE)
    assert re.search(r"^wall time +15.0 s +10.0 s$", text, re.MULTILINE)
    assert text.count("checkpoint (") == 4


def test_summary_names_disguised_chains():
    assert "1 of 3: hidden.0" in summarise([result("monarch", 0, 0.9, disguised=("hidden.0",))])
