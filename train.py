"""Train a model whose dense layers are factor chains: ``python train.py [group=file ...] [key=value ...]``.

The run folder gets config.yaml, checkpoints/best.ckpt and last.ckpt, metrics.csv, and with ``profiler=simple`` or
``profiler=pytorch`` a folder profile. ``python train.py --help`` lists what can be overridden; the files under configs/
say what it means.
"""

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from structlayers.build import build_model, require_swaps
from structlayers.cli import entry_point
from structlayers.errors import ConfigError
from structlayers.lit import (
    AtomicCheckpointIO,
    LitModule,
    check_matches,
    check_monitors,
    check_resumes,
    check_trainer,
    find_checkpoint,
    read_checkpoint,
)
from structlayers.lit.callbacks import LastCheckpoint, StepTimer
from structlayers.lit.loggers import CSVLogger
from structlayers.lit.summary import RunResult, count_flops, disguised_chains, example_input, summarise
from structlayers.values import FLAG, MAPPING, SEED, TEXT, THREADS, check, integer, nullable, one_of

say = rank_zero_only(print)

KINDS = {
    "seed": SEED,
    "compare": nullable(one_of("dense")),
    "seeds": integer(1),
    "ckpt_path": nullable(TEXT),
    "compile": FLAG,
    "recompute": FLAG,
    "threads": THREADS,
    "output_dir": TEXT,
    "trainer": MAPPING,
}


def train(cfg: DictConfig, name: str) -> RunResult:
    """One training from a composed configuration, and the test of its best checkpoint."""
    ckpt_path = find_checkpoint(cfg.ckpt_path, "last.ckpt") if cfg.ckpt_path else None
    checkpoint = read_checkpoint(ckpt_path) if ckpt_path else None
    pl.seed_everything(cfg.seed, verbose=False)
    config = OmegaConf.to_container(cfg, resolve=True)
    data = instantiate(cfg.data)
    # Here already, so that absent data end the run before it has written anything.
    data.setup("fit")
    model_args = data.model_args()
    how = {"backend": cfg.backend, "recompute": cfg.recompute}
    model, report = build_model(config["model"], config["structure"], model_args, **how)
    require_swaps(config["structure"], report)
    if ckpt_path and checkpoint:
        check_matches(checkpoint, model, ckpt_path)
    flops = count_flops(model, example_input(data.task, model_args))
    stored = {"task": data.task, "model_args": model_args, "config": config}
    options = {"seed": cfg.seed, "compile": cfg.compile, "hyperparameters": stored}
    try:
        module = LitModule(model, data.task, **config["optim"], **options)
    except TypeError as error:
        raise ConfigError(f"optim: {error}") from error
    if ckpt_path and checkpoint:
        check_resumes(checkpoint["hyper_parameters"]["config"]["optim"], config["optim"], ckpt_path)
    callbacks = {key: instantiate(callback) for key, callback in cfg.callbacks.items()}
    check_monitors(callbacks, module)
    if not cfg.trainer.enable_progress_bar:
        callbacks.pop("progress_bar", None)
    # Lightning would add a checkpoint of its own where none is asked for.
    writes = any(isinstance(callback, Checkpoint) for callback in callbacks.values())
    checkpointing = cfg.trainer.get("enable_checkpointing", writes)
    timer = StepTimer()
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        # The timer first, or it would count what the others do at the end of a step.
        callbacks=[timer, *callbacks.values()],
        logger=[instantiate(logger) for logger in cfg.logger.values()],
        profiler=instantiate(cfg.profiler) if cfg.profiler else None,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=checkpointing,
    )
    for logger in trainer.loggers:
        if checkpoint and isinstance(logger, CSVLogger):
            logger.resume_after(checkpoint["global_step"])
    folder = Path(cfg.output_dir)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    say(f"\n{name}, seed {cfg.seed}: {folder}", report if report.swapped else "", sep="\n", flush=True)

    on_gpu = trainer.strategy.root_device.type == "cuda"
    if on_gpu:
        # Before its first use a device has no statistics that could be reset.
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    val_loss = trainer.callback_metrics.get("val/loss")
    peak_bytes = torch.cuda.max_memory_allocated(trainer.strategy.root_device) if on_gpu else None
    steps = trainer.global_step
    if cfg.profiler:
        # Longest times first.
        for path in sorted(Path(cfg.profiler.dirpath).glob("fit-*.txt")):
            say(*path.read_text().splitlines()[:40], f"all of it: {path}", sep="\n")
    best = getattr(trainer.checkpoint_callback, "best_model_path", None) or None
    last = next((callback.path for callback in callbacks.values() if isinstance(callback, LastCheckpoint)), None)
    # Empty where limit_test_batches is 0.
    tested = trainer.test(module, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
    return RunResult(
        name=name,
        seed=cfg.seed,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops_per_sample=flops,
        n_swapped=len(report.swapped),
        kept=report.kept if report.swapped else None,
        disguised=disguised_chains(model),
        metrics={key.removeprefix("test/"): value for key, value in (tested[0] if tested else {}).items()},
        wall_s=time.perf_counter() - start,
        checkpoint=best or (str(last) if last and last.is_file() else "none written"),
        steps=steps,
        val_loss=None if val_loss is None else float(val_loss),
        step_ms=timer.step_ms,
        peak_bytes=peak_bytes,
    )


def runs(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """The trainings that a configuration asks for: its own in the run folder, further ones in folders below it."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check(config, KINDS)
    check({"seed": cfg.seed + cfg.seeds - 1}, {"seed": SEED}, "the last of the seeds: ")
    check_trainer(config["trainer"])
    name = cfg.structure.get("structure", "mixed") if cfg.structure else "dense"
    if cfg.compare == name:
        raise ConfigError("compare=dense with structure=dense compares a model with itself; choose another structure")
    if cfg.ckpt_path and (cfg.compare or cfg.seeds > 1):
        raise ConfigError("ckpt_path resumes one training; leave out compare and seeds")
    wanted = []
    for other in (False, True) if cfg.compare else (False,):
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            run = cfg.copy()
            parts = ([cfg.compare] if other else []) + ([f"seed_{seed}"] if seed != cfg.seed else [])
            with open_dict(run):
                run.output_dir = str(Path(cfg.output_dir, *parts))
                run.seed = seed
                if other:
                    run.structure = {}
            wanted.append(("dense" if other else name, run))
    return wanted


@entry_point("train")
def main(cfg: DictConfig) -> float:
    """Train what the configuration asks for; returns the test metric for sweepers, nan without a test."""
    # What Lightning says about itself at every start, and advice that does not hold for small models.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|smaller than the logging interval|LeafSpec)"
    )
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty")
    wanted = runs(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    results = [train(run, name) for name, run in wanted]
    say(f"\n{summarise(results)}")
    metrics = results[0].metrics
    return metrics.get("accuracy", metrics.get("loss", math.nan))


if __name__ == "__main__":
    main()
