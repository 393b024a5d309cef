"""The table that closes a run: sizes, FLOPs, test metrics, and whether "structured" is the truth."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from structlayers.bench import cost
from structlayers.nn import KSLinear

METRICS = {
    "accuracy": "test accuracy",
    "loss": "test loss (nats)",
    "perplexity": "test perplexity",
    "bits_per_byte": "test bits per byte",
}


# Attributes of a run, and how the table shows them.
_MEASURED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("val_loss", "last validation loss (nats)", "{:.4f}".format),
    ("step_ms", "time per step", "{:.2f} ms".format),
    ("peak_bytes", "peak GPU memory", lambda value: f"{value / 2**20:,.0f} MiB"),
)


@dataclass(frozen=True)
class RunResult:
    """What one training ended with.

    ``kept`` is None where no layer was replaced, ``val_loss`` (nats, of the last validation) where there was no
    validation, ``step_ms`` where no step was timed, ``peak_bytes`` (of the training, on the first process) without a
    GPU.
    """

    name: str
    seed: int
    n_parameters: int
    flops_per_sample: int
    n_swapped: int
    kept: float | None
    disguised: tuple[str, ...]
    metrics: dict[str, float]
    wall_s: float
    checkpoint: str
    steps: int
    val_loss: float | None = None
    step_ms: float | None = None
    peak_bytes: int | None = None


def example_input(task: str, model_args: dict[str, Any]) -> Tensor:
    """One sample for a model: zeros ``(1, *input_shape)``, or tokens ``(1, context_length)``."""
    if task == "classification":
        return torch.zeros(1, *model_args["input_shape"])
    return torch.zeros(1, model_args["context_length"], dtype=torch.long)


def count_flops(model: nn.Module, x: Tensor) -> int:
    """FLOPs of one forward pass in evaluation mode, counted as ``infer.py`` counts them.

    Shapes say it all, so nothing is computed where a copy of the model runs on the meta device; otherwise the pass is
    made.
    """
    training = model.training
    model.eval()
    try:
        shapes = _on_meta(model)
        flops = cost.count_flops(lambda: shapes(x.to("meta")))
    except Exception:
        # Which error a model raises that looks at a value, or holds tensors that are no buffers, is its own choice.
        flops = cost.count_flops(lambda: model(x))
    model.train(training)
    return flops


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values. functional_call would leave buffers of modules that occur twice on the meta device."""
    known: dict[int, Tensor] = {id(value): nn.Parameter(value.to("meta"), False) for value in model.parameters()}
    known |= {id(value): value.to("meta") for value in model.buffers()}
    return copy.deepcopy(model, known)


def disguised_chains(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers whose chain can express any matrix, and so saves nothing but in name."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, KSLinear))
    return tuple(name for name, layer in layers if layer.chain.is_dense_in_disguise)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: first column to the left, the others to the right, a line under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def summarise(runs: Sequence[RunResult]) -> str:
    """The closing table, a column for each name (in order of appearance), then where the checkpoints are.

    Metrics and times are means over the runs of a name; each seed's value of a test metric is shown where there are
    several. Where two names are compared, there are the ratios of their validation losses, times and memory too.
    """
    columns = {run.name: [other for other in runs if other.name == run.name] for run in runs}
    seeds = len(runs) // len(columns)
    first = [column[0] for column in columns.values()]
    rows = [
        ["" if seeds == 1 else f"mean of {seeds} seeds", *columns],
        ["parameters", *(f"{run.n_parameters:,}" for run in first)],
        ["replaced linears keep", *("-" if run.kept is None else f"{run.kept:.1%}" for run in first)],
        ["chains dense in disguise", *(_disguised(run) for run in first)],
        ["FLOPs per sample (forward)", *(f"{run.flops_per_sample:,}" for run in first)],
    ]
    for key, label in METRICS.items():
        if key in first[0].metrics:
            show = "{:.2%}".format if key == "accuracy" else "{:.4f}".format
            values = [[run.metrics[key] for run in column] for column in columns.values()]
            rows.append([label, *(show(mean(column)) for column in values)])
            if seeds > 1:
                rows.append(["  of each seed", *(" ".join(map(show, column)) for column in values)])
    rows.append(["training steps", *(f"{run.steps:,}" for run in first)])
    for attribute, label, text in _MEASURED:
        measured = [_mean([getattr(run, attribute) for run in column]) for column in columns.values()]
        known = [value for value in measured if value is not None]
        if known:
            rows.append([label, *("-" if value is None else text(value) for value in measured)])
        if len(known) == len(columns) == 2 and known[1] > 0:
            rows.append(["  " + " / ".join(columns), f"{known[0] / known[1]:.3f}", "-"])
    rows.append(["wall time", *(f"{mean(run.wall_s for run in column):.1f} s" for column in columns.values())])
    lines = [format_table(rows), ""]
    lines += [f"checkpoint ({run.name}, seed {run.seed}): {run.checkpoint}" for run in runs]
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _disguised(run: RunResult) -> str:
    if not run.n_swapped:
        return "-"
    return f"{len(run.disguised)} of {run.n_swapped}" + (f": {', '.join(run.disguised)}" if run.disguised else "")
