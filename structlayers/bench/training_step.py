"""A whole training step of a GPT, dense beside structured: forward, loss, backward, AdamW."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structlayers.bench.case_rows import DENSE
from structlayers.bench.compare import describe_error
from structlayers.bench.cost import peak_memory
from structlayers.bench.models import check_layers, layer_tolerance, oracle
from structlayers.bench.products import fill_timings
from structlayers.bench.results import Result
from structlayers.bench.rows import DISAGREES, FAILED, TIMED
from structlayers.bench.timing import TimingPlan, wall_time_ms
from structlayers.bench.verify import agreement
from structlayers.errors import ConfigError
from structlayers.models import GPT
from structlayers.surgery import swap_linears
from structlayers.tolerances import model_tolerance, tolerance

STRUCTURED, RECOMPUTED = "structured", "recomputed"
CONTENDERS = (DENSE, STRUCTURED, RECOMPUTED)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}


@dataclass(frozen=True)
class StepCase:
    """A GPT and its batch; ``blocks`` of the Monarch chains in every projection of attention and feed-forward.

    Raises ``ConfigError`` for a precision that is none.
    """

    dim: int = 2048
    depth: int = 12
    heads: int = 16
    feed_forward: int = 8192
    vocabulary: int = 50_304
    context: int = 1024
    batch: int = 16
    blocks: int = 4
    precision: str = "bf16"
    compiled: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision = {self.precision!r}: expected one of {', '.join(PRECISIONS)}")

    @property
    def name(self) -> str:
        return f"GPT step, {self.depth} x {self.dim}, {self.batch} x {self.context} tokens"

    @property
    def spec(self) -> str:
        """All of it in words."""
        return (
            f"{self.depth} layers, d_model {self.dim}, d_ff {self.feed_forward}, {self.heads} heads, vocabulary "
            f"{self.vocabulary}, {self.blocks}-block Monarch in attention and feed-forward, AdamW, "
            f"{'compiled' if self.compiled else 'eager'}"
        )

    def model(self, structured: bool, recompute: bool = False) -> nn.Module:
        """The model with float32 weights, on the CPU."""
        torch.manual_seed(0)
        model = GPT(
            self.vocabulary, self.context, self.dim, self.depth, self.heads, mlp_ratio=self.feed_forward / self.dim
        )
        if structured:
            rule = {"structure": "monarch", "options": {"blocks": self.blocks}, "include": ["blocks.*"]}
            swap_linears(model, [rule], init="random", recompute=recompute)
        return model


def time_step(case: StepCase, contenders: list[str], device: torch.device, plan: TimingPlan) -> list[Result]:
    """Check and time whole steps, in turns; ``peak_memory_bytes`` is all that training holds at once.

    The logits of one sequence and every structured layer are compared with the float64 oracle first. On a GPU the time
    is that of a step captured as a CUDA graph; ``wall_ms`` is that of one that is launched operation by operation.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(case.vocabulary, (case.batch, case.context + 1), generator=generator).to(device)
    results: list[Result] = []
    steps: dict[str, Callable[[], object]] = {}
    for name in contenders:
        results.append(result := Result(name))
        try:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            model = case.model(name != DENSE, name == RECOMPUTED).to(device)
            result.weight_bytes = sum(p.nbytes for p in model.parameters())
            result.resolved = "torch" if name == DENSE else "auto"
            result.error, result.reason = check(case, model, tokens[:1, :-1])
            result.status = DISAGREES if result.reason else TIMED
            if result.reason:
                continue
            step = make_step(case, model, tokens)
            for _ in range(2):
                # The first one compiles, and makes the optimizer's state.
                step()
            result.peak_memory_bytes = _peak(step, model, before, device)
            result.wall_ms = wall_time_ms(step, device, plan)
            steps[name] = step
        except Exception as error:  # out of memory, no compiler: the row says which
            result.status, result.reason = FAILED, describe_error(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    by_name = {result.contender: result for result in results}
    if device.type == "cuda":
        steps = _captured(steps, by_name, device)
    fill_timings(results, steps, device, plan)
    return results


def make_step(case: StepCase, model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """One step on ``tokens`` (B, T + 1): its loss, after the weights have moved."""
    on_gpu = tokens.device.type == "cuda"
    # Capturable: it counts its steps on the GPU.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu)
    call: Any = torch.compile(model, dynamic=False) if case.compiled else model
    scaler = torch.amp.GradScaler(tokens.device.type, enabled=case.precision == "fp16")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def step() -> Tensor:
        with _autocast(case, tokens.device):
            loss = F.cross_entropy(call(inputs).flatten(0, 1), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def check(case: StepCase, model: nn.Module, tokens: Tensor) -> tuple[float | None, str]:
    """The error of the logits of ``tokens`` (1, T) against the float64 oracle, and the reason against them, or ""."""
    with torch.no_grad():
        expected = oracle(model)(tokens)
        with _autocast(case, tokens.device):
            out = model(tokens)
            reason = check_layers(model, tokens)
    dtype = PRECISIONS[case.precision]
    # Inputs and weights are rounded too where autocast is on.
    layer = layer_tolerance(model) if dtype is None else 2 * tolerance(dtype, case.feed_forward, 2)
    linears = 6 * case.depth + 1
    found = agreement(out, expected, model_tolerance(layer, linears))
    return (found.error if found.error == found.error else None), found.reason or reason


def _autocast(case: StepCase, device: torch.device) -> AbstractContextManager[object]:
    dtype = PRECISIONS[case.precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _captured(
    steps: dict[str, Callable[[], object]], results: dict[str, Result], device: torch.device
) -> dict[str, Callable[[], object]]:
    """The steps as CUDA graphs, those that can be captured; the results of the others say why not.

    They share their memory: nothing of a step outlives it but weights and moments, and those lie elsewhere.
    """
    pool = torch.cuda.graph_pool_handle()
    replays: dict[str, Callable[[], object]] = {}
    for name, step in steps.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
                step()
        except Exception as error:
            results[name].status, results[name].reason = FAILED, describe_error(error)
            torch.cuda.synchronize(device)
        else:
            replays[name] = graph.replay
    return replays


def _peak(step: Callable[[], object], model: nn.Module, before: int, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Weights and AdamW's two moments live all the time; gradients and activations come and go.
    return 3 * sum(p.nbytes for p in model.parameters()) + peak_memory(step, device)[0]
