"""Time a model, dense beside structured: ``python infer.py [ckpt_path=...] [group=file ...] [key=value ...]``.

From a checkpoint of train.py, with its test metric, or from a model configuration with random weights. The run folder
gets rows.jsonl and latency.png; a run that was killed goes on in its folder (``hydra.run.dir=``) with what is missing.
``python infer.py --help`` lists what can be overridden; configs/infer.yaml says what it means.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# The profiler that measures CPU memory writes a line to stderr at every start and stop; its library reads this once.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from structlayers.bench.models import ModelSweep, random_input, time_model
from structlayers.bench.plot import plot_rows
from structlayers.bench.rows import Row, append_rows, read_rows, table
from structlayers.bench.sweep import WandbLog
from structlayers.bench.timing import TimingPlan
from structlayers.build import build_model, check_finite, require_swaps
from structlayers.cli import entry_point
from structlayers.errors import ConfigError, DataError
from structlayers.lit import check_matches, evaluate, find_checkpoint, read_checkpoint
from structlayers.values import (
    FLAG,
    MAPPING,
    SEED,
    TEXT,
    THREADS,
    check,
    either,
    integer,
    listed,
    nullable,
    one_of,
    some,
)

METRICS = {"accuracy": "accuracy {:.2%}", "bits_per_byte": "{:.4f} bits per byte", "loss": "loss {:.4f} nats"}
# Groups that a checkpoint has already decided.
_FIXED_BY_CHECKPOINT = ("model", "structure", "data", "model_args")


@dataclass(frozen=True)
class Subject:
    """The model to be timed and its input; ``metrics`` are empty for random weights."""

    model: nn.Module
    name: str
    structure: str
    make_input: Callable[[int], Tensor]  # batch size -> input on the CPU
    metrics: dict[str, float] = field(default_factory=dict)


KINDS = {
    **dict.fromkeys(("ckpt_path", "wandb", "name"), nullable(TEXT)),
    # A hash may be all digits.
    "commit": nullable(either(TEXT, integer(0))),
    **dict.fromkeys(("evaluate", "plot"), FLAG),
    "model_args": nullable(MAPPING),
    "compile": some(either(FLAG, TEXT)),
    "device": TEXT,
    "threads": THREADS,
    "float32_precision": one_of("highest", "high", "medium"),
    "seed": SEED,
    "bench": MAPPING,
    "output_dir": TEXT,
}


def sweep_of(cfg: DictConfig) -> ModelSweep:
    """What the configuration asks to be timed; raises ``ConfigError`` for what names nothing known."""
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (device == "cpu" or str(device).split(":")[0] == "cuda"):
        raise ConfigError(f"device = {device!r}: expected auto, cpu, cuda or cuda:<number>")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device = {device!r}: this torch ({torch.__version__}) sees no CUDA device")
    known = [entry.name for entry in fields(TimingPlan)]
    for key, value in cfg.bench.items():
        if key not in known:
            raise ConfigError(f"bench.{key} = {value!r}: expected one of {', '.join(known)}")
    return ModelSweep(
        batch_sizes=listed(cfg.batch_size),
        dtypes=listed(cfg.dtype),
        backends=listed(cfg.backend),
        layouts=listed(cfg.layout),
        compiled=tuple({False: "no", True: "default"}.get(mode, mode) for mode in listed(cfg.compile)),
        device=device,
        oracle_rows=cfg.oracle_rows,
        roofline=cfg.roofline,
        frozen=listed(cfg.freeze),
        epilogue=cfg.epilogue,
        one_factor=cfg.one_factor,
        free=cfg.free,
        energy=cfg.energy,
        energy_window_s=cfg.energy_window_s,
        commit=None if cfg.commit is None else str(cfg.commit),
        plan=TimingPlan(**cfg.bench),
    )


def structure_name(structure: Any) -> str:
    """How the rows call a structure: its name, "chain" where it is spelt out, "mixed" for rules of several names."""
    if not isinstance(structure, dict):
        return "mixed"
    rules = structure.get("rules", [structure])
    names = {rule.get("structure", "dense") for rule in rules}
    names = {"chain" if name.startswith("(") else name for name in names}
    return names.pop() if len(names) == 1 else "mixed"


def from_config(cfg: DictConfig) -> Subject:
    """A model with random weights, on random input."""
    torch.manual_seed(cfg.seed)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    model_args = config["model_args"] or instantiate(cfg.data).model_args()
    model, report = build_model(config["model"], config["structure"], model_args)
    require_swaps(config["structure"], report)
    print(report)
    name = cfg.name or f"{type(model).__name__}, random weights"
    return Subject(
        model, name, structure_name(config["structure"]), lambda batch: random_input(model_args, batch, cfg.seed)
    )


def from_checkpoint(cfg: DictConfig, device: torch.device) -> Subject:
    """The model of a training run with its weights, evaluated on the run's test data."""
    path = find_checkpoint(cfg.ckpt_path, "best.ckpt")
    checkpoint = read_checkpoint(path)
    stored = checkpoint["hyper_parameters"]
    config, model_args = stored["config"], stored["model_args"]
    model, report = build_model(config["model"], config["structure"], model_args)
    check_matches(checkpoint, model, path)
    model.load_state_dict({name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()})
    check_finite(model)
    model.eval()
    print(f"{path}\n{report}")
    name, structure = cfg.name or f"{type(model).__name__} of {path}", structure_name(config["structure"])
    if not cfg.evaluate:
        return Subject(model, name, structure, lambda batch: random_input(model_args, batch, cfg.seed))
    # The data may have moved since the training: data.<key>=... still counts.
    moved = [override for override in overrides() if override.startswith("data.")]
    data = instantiate(OmegaConf.merge(config["data"], OmegaConf.from_dotlist(moved).get("data", {})))
    metrics = evaluate(model, stored["task"], data, device)
    print(f"test {describe_metrics(metrics)}")
    return Subject(model, name, structure, lambda batch: test_batch(data, batch), metrics)


def overrides() -> list[str]:
    """The overrides on the command line."""
    return list(HydraConfig.get().overrides.task)


def test_batch(data: pl.LightningDataModule, batch: int) -> Tensor:
    """The first ``batch`` test inputs; where there are fewer, they are repeated."""
    found: list[Tensor] = []
    while sum(map(len, found)) < batch:
        for x, _ in data.test_dataloader():
            found.append(x)
            if sum(map(len, found)) >= batch:
                break
    return torch.cat(found)[:batch]


@entry_point("infer")
def main(cfg: DictConfig) -> None:
    """Time what the configuration asks for, and write rows.jsonl and latency.png into the run folder."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
    check(OmegaConf.to_container(cfg, resolve=True), KINDS)  # type: ignore[arg-type]
    if cfg.ckpt_path:
        for override in overrides():
            if override.split("=")[0].lstrip("+~").split(".")[0] in _FIXED_BY_CHECKPOINT and not override.startswith(
                "data."
            ):
                raise ConfigError(f"{override}: the checkpoint decides this; leave it out, or leave out ckpt_path")
    torch.set_float32_matmul_precision(cfg.float32_precision)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    sweep = sweep_of(cfg)
    subject = from_checkpoint(cfg, torch.device(sweep.device)) if cfg.ckpt_path else from_config(cfg)

    folder = Path(cfg.output_dir)
    path = folder / "rows.jsonl"
    rows = [row for row in read_rows(path) if row.case == subject.name] if path.exists() else []
    done = {(row.dtype, row.batch) for row in rows}
    log = WandbLog(cfg.wandb, OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    timed = time_model(
        subject.model,
        subject.name,
        subject.structure,
        subject.make_input,
        sweep,
        subject.metrics,
        lambda dtype, batch: (dtype, batch) in done,
    )
    for found in timed:
        append_rows(path, found)
        rows += found
        for row in found:
            log.log(asdict(row))
        print(f"{found[0].dtype}, batch {found[0].batch}: {len(found)} variants done", flush=True)
    log.finish()
    print(f"\n{summary(rows)}\n\nrows: {path}")
    if not any(row.status == "timed" for row in rows):
        raise DataError("no variant could be timed; the table says why")
    if cfg.plot:
        plot_rows(rows, folder / "latency.png")
        print(f"plot: {folder / 'latency.png'}")


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics in words, those that a reader looks for first."""
    return ", ".join(text.format(metrics[key]) for key, text in METRICS.items() if key in metrics)


def summary(rows: list[Row]) -> str:
    """The table on the screen, under what it was measured on."""
    machine = rows[0].machine
    where = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} thread(s)"
    lines = [
        f"{rows[0].case}{', test ' + describe_metrics(rows[0].metrics) if rows[0].metrics else ''}",
        f"{where}, torch {machine.get('torch')}; x base: times faster than dense in the same mode; "
        "floor: share of the machine's best rates reached; peak MB: beyond weights and input "
        f"({rows[0].memory_source or 'not measured'})",
    ]
    lines.append(table(rows))
    if any(row.floor_ms is not None and row.p50_ms is not None and row.floor_ms > row.p50_ms for row in rows):
        lines.append("floor above 100%: the rates of this machine were measured while it was busy; run again")
    spread = sum(row.p20_ms is not None and row.p80_ms is not None and row.p80_ms > 2 * row.p20_ms for row in rows)
    if spread:
        lines.append(f"{spread} of {len(rows)} rows spread by more than 2x from p20 to p80: the machine was busy")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
