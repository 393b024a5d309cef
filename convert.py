"""Convert a trained dense model to factor chains: ``python convert.py [pretrained=...] [key=value ...]``.

Evaluates the model, converts it at every budget, evaluates each result, fine-tunes what the last way of converting gave
and evaluates again. The run folder gets config.yaml, results.json and, as safetensors files that ``structlayers.load``
reads, every converted model before and after its fine-tuning; each file is written when it is ready, whole or not at
all. ``python convert.py --help`` lists what can be overridden; configs/convert.yaml says what it means.
"""

import copy
import itertools
import json
import logging
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import structlayers
from structlayers.backends import check_backend
from structlayers.build import build_model, check_finite
from structlayers.calibrate import collect_moments
from structlayers.cli import entry_point
from structlayers.data_aware import InputMoments
from structlayers.errors import ConfigError
from structlayers.files import replace_file
from structlayers.lit import LitModule, check_matches, check_trainer, evaluate, find_checkpoint, read_checkpoint
from structlayers.lit.callbacks import ProgressBar
from structlayers.lit.summary import METRICS, format_table
from structlayers.models.hub import LogitsOf, PassageMatcher
from structlayers.surgery import INITS, swap_linears
from structlayers.swap_rules import SwapRule
from structlayers.values import (
    FLAG,
    MAPPING,
    NOT_NEGATIVE,
    PATTERN,
    SEED,
    TEXT,
    THREADS,
    Kind,
    check,
    integer,
    listed,
    nullable,
    number,
    one_of,
    some,
)

FINETUNED = ", fine-tuned"
KINDS = {
    "include": some(PATTERN),
    "chain": TEXT,
    "options": nullable(MAPPING),
    "budgets": some(number("a fraction above 0, at most 1", lambda value: 0 < value <= 1)),
    "inits": some(one_of(*INITS)),
    "compare": nullable(Kind("a structure or a list of such", lambda value: all(map(TEXT.holds, listed(value))))),
    "calibration_batches": integer(1),
    "ridge": NOT_NEGATIVE,
    "finetune_steps": integer(0),
    "finetune_dense": FLAG,
    "ckpt_path": nullable(TEXT),
    "seed": SEED,
    "threads": THREADS,
    "output_dir": TEXT,
    "trainer": MAPPING,
}


@dataclass(frozen=True)
class Result:
    """One row of the table. ``kept``: share of the converted layers' parameters; None where none was converted."""

    model: str
    n_parameters: int
    kept: float | None
    metrics: dict[str, float]
    seconds: float
    file: str | None = None


@dataclass
class Findings:
    """What has been found so far; ``add`` writes it down at once."""

    data: pl.LightningDataModule
    device: torch.device
    folder: Path
    results: list[Result] = field(default_factory=list)

    def add(self, name: str, model: nn.Module, kept: float | None, start: float, file: Path | None = None) -> None:
        """Evaluate ``model``; ``start``: when the work on it began."""
        seconds = time.perf_counter() - start
        metrics = evaluate(model.eval(), self.data.task, self.data, self.device)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.results.append(Result(name, n_parameters, kept, metrics, seconds, file and file.name))
        text = json.dumps([asdict(result) for result in self.results], indent=1)
        replace_file(self.folder / "results.json", lambda path: path.write_text(text))
        print(f"{name}: loss {metrics['loss']:.4f}, {seconds:.0f} s", flush=True)


def load_dense(cfg: DictConfig) -> tuple[nn.Module, pl.LightningDataModule]:
    """The dense model that the configuration or the checkpoint names, and its data, set up."""
    if cfg.ckpt_path:
        path = find_checkpoint(cfg.ckpt_path, "best.ckpt")
        checkpoint = read_checkpoint(path)
        config = checkpoint["hyper_parameters"]["config"]
        if config["structure"]:
            raise ConfigError(f"ckpt_path={cfg.ckpt_path}: has chains already, expected a run of structure=dense")
    else:
        config = OmegaConf.to_container(cfg, resolve=True)
        if "model" not in config or "data" not in config:
            raise ConfigError("no model: expected pretrained=<file of configs/pretrained>, or ckpt_path")
    data = instantiate(config["data"])
    data.setup()
    arguments = {key: value for key, value in config["model"].items() if value is not None}
    model, _ = build_model(arguments, None, data.model_args())
    if cfg.ckpt_path:
        check_matches(checkpoint, model, path)
        state = checkpoint["state_dict"].items()
        model.load_state_dict({name.removeprefix("model."): value for name, value in state})
    return model.eval(), data


def wanted(cfg: DictConfig) -> list[tuple[SwapRule, str, bool]]:
    """Every conversion as rule, init, and whether to fine-tune and save it; raises ``ConfigError`` for bad values."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check(config, KINDS)
    check_trainer(config["trainer"])
    check_backend(cfg.backend)
    inits = listed(cfg.inits)
    options = {key: value for key, value in (cfg.options or {}).items() if value is not None}
    where = {"include": config["include"], "exclude": config["exclude"]}
    found = []
    for budget in listed(cfg.budgets):
        for structure in [*(name for name in listed(cfg.compare) if name != cfg.chain), cfg.chain]:
            own = options if structure == cfg.chain else {}
            rule = SwapRule(structure, own, **where, budget=budget)
            found += [(rule, init, structure == cfg.chain and init == inits[-1]) for init in inits]
    return found


def calibrate(model: nn.Module, data: pl.LightningDataModule, cfg: DictConfig) -> dict[str, InputMoments]:
    """Moments of the inputs of the layers to convert, by their names in the inner model."""
    batches: Iterable[Any] = itertools.islice(data.train_dataloader(), cfg.calibration_batches)
    return collect_moments(inner(model), batches, cfg.include, cfg.exclude, forward=lambda _, batch: model(batch[0]))


def finetune(model: nn.Module, data: pl.LightningDataModule, cfg: DictConfig) -> nn.Module:
    """``model`` after ``finetune_steps`` steps on the training data."""
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        max_steps=cfg.finetune_steps,
        limit_val_batches=0,
        callbacks=[ProgressBar(log_every_s=60)] if cfg.trainer.enable_progress_bar else [],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(lit_module(model.train(), data, cfg), datamodule=data)
    return model.eval()


def lit_module(model: nn.Module, data: pl.LightningDataModule, cfg: DictConfig) -> LitModule:
    """What trains ``model``; raises ``ConfigError`` for a bad value of ``optim``."""
    optim: dict[str, Any] = OmegaConf.to_container(cfg.optim, resolve=True)  # type: ignore[assignment]
    try:
        return LitModule(model, data.task, **optim, seed=cfg.seed)
    except TypeError as error:
        raise ConfigError(f"optim: {error}") from error


def inner(model: nn.Module) -> nn.Module:
    """What a user of the pretrained model has in hand: the model of transformers without our wrapper."""
    return model.model if isinstance(model, LogitsOf | PassageMatcher) else model


@torch.no_grad()
def round_trip(path: Path, converted: nn.Module, dense: nn.Module, data: pl.LightningDataModule) -> str:
    """What becomes of the outputs on test data when a converted model is loaded from its file, then made dense."""
    x = next(iter(data.test_dataloader()))[0][:2].to(next(converted.parameters()).device)
    expected = converted(x)
    again = copy.deepcopy(dense).to(x.device)
    structlayers.load(path, inner(again))
    loaded = "identical outputs" if torch.equal(again(x), expected) else "other outputs, which is wrong"
    difference = (structlayers.densify(again)(x) - expected).abs().max() / expected.abs().max()
    return f"{path.name}: loaded again, {loaded}; made dense, they differ by {float(difference):.1e} of the largest"


def table(results: list[Result]) -> str:
    """All rows, with the gap in loss (nats) to the dense model, the first row."""
    dense = results[0]
    metrics = {key: label for key, label in METRICS.items() if key in dense.metrics and key != "bits_per_byte"}
    rows = [["model", "parameters", "kept", *metrics.values(), "gap in loss", "seconds"]]
    for result in results:
        shown = [("{:.2%}" if key == "accuracy" else "{:.4f}").format(result.metrics[key]) for key in metrics]
        kept = "-" if result.kept is None else f"{result.kept:.1%}"
        gap = f"{result.metrics['loss'] - dense.metrics['loss']:+.4f}"
        rows.append([result.model, f"{result.n_parameters:,}", kept, *shown, gap, f"{result.seconds:.0f}"])
    lines = [format_table(rows), ""]
    references = [result for result in results if result.kept is None]
    for before, after in itertools.pairwise(results):
        if after.model == before.model + FINETUNED and before not in references:
            closed = [_closed(before, after, reference) for reference in references]
            lines.append(f"{after.model}: closes {' and '.join(closed)}")
    return "\n".join(lines)


def _closed(before: Result, after: Result, reference: Result) -> str:
    """How much of the distance in loss to a reference the fine-tuning has made up for."""
    gaps = [result.metrics["loss"] - reference.metrics["loss"] for result in (before, after)]
    share = "all" if min(gaps) <= 0 else f"{1 - gaps[1] / gaps[0]:.0%}"
    return f"{share} of the gap in loss to {reference.model}"


@entry_point("convert")
def main(cfg: DictConfig) -> None:
    """Convert what the configuration asks for, and print one table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|in eval mode at the start)")
    conversions = wanted(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, verbose=False)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense, data = load_dense(cfg)
    check_finite(dense)
    # Here already, so that a mistake in optim ends the run before the conversions.
    lit_module(dense, data, cfg)
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), folder / "config.yaml")
    found = Findings(data, device, folder)
    found.add("dense", dense, None, time.perf_counter())
    dense.to(device)
    moments = None
    if "project_data" in listed(cfg.inits):
        start = time.perf_counter()
        moments = calibrate(dense, data, cfg)
        rows = max(moment.rows for moment in moments.values())
        print(f"calibration: {len(moments)} layers, {rows:,} rows, {time.perf_counter() - start:.0f} s", flush=True)
    checks: list[str] = []
    for rule, init, chosen in conversions:
        start = time.perf_counter()
        model = copy.deepcopy(dense)
        how = {"moments": moments, "ridge": cfg.ridge} if init == "project_data" else {}
        report = swap_linears(inner(model), rule, init=init, backend=cfg.backend, **how)
        name = f"{rule.budget:.0%}: {rule.structure}, {init}"
        if not report.swapped:
            raise ConfigError(f"{name}: no layer was converted\n{report}")
        file = folder / f"{rule.structure}_{rule.budget:g}.safetensors" if chosen else None
        if file:
            structlayers.save(inner(model), file)
            checks.append(round_trip(file, model, dense, data))
        found.add(name, model, report.kept, start, file)
        if file and cfg.finetune_steps:
            start = time.perf_counter()
            finetune(model, data, cfg)
            file = structlayers.save(inner(model), file.with_stem(file.stem + "_finetuned"))
            found.add(name + FINETUNED, model, report.kept, start, file)
    if cfg.finetune_steps and cfg.finetune_dense:
        start = time.perf_counter()
        found.add("dense" + FINETUNED, finetune(copy.deepcopy(dense), data, cfg), None, start)
    print(f"\n{table(found.results)}", *checks, f"files: {folder}", sep="\n")


if __name__ == "__main__":
    main()
