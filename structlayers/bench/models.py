"""A model in its variants (dense twin, backends, layouts, compiled) and its oracle, as contenders of a comparison."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from structlayers.backends import check_backend
from structlayers.bench.compare import Case, Conditions, Contender, Variant, compare
from structlayers.bench.machine import describe_machine, measure_roofline
from structlayers.bench.rows import Row
from structlayers.bench.timing import TimingPlan
from structlayers.bench.verify import agreement, sample_rows
from structlayers.errors import ConfigError
from structlayers.nn import KSLinear
from structlayers.ops import ks_chain
from structlayers.problem import Layout
from structlayers.tolerances import model_tolerance, tolerance

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
COMPILE_MODES = ("no", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# A layer is compared on so many of its input rows: the oracle costs far more than the layer.
_LAYER_ROWS = 64

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class ModelSweep:
    """What to time a model over. Raises ``ConfigError`` or ``BackendError`` for a value that names nothing known.

    ``compiled``: "no" or a mode of ``torch.compile``. ``oracle_rows``: batch entries compared with the oracle (the
    first and the last ones).
    """

    batch_sizes: Sequence[int] = (1, 64)
    dtypes: Sequence[str] = ("float32",)
    backends: Sequence[str] = ("auto",)
    layouts: Sequence[str] = ("batch_first",)
    compiled: Sequence[str] = ("no",)
    device: str = "cpu"
    oracle_rows: int = 8
    roofline: bool = True
    plan: TimingPlan = field(default_factory=TimingPlan)

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "dtypes", "backends", "layouts", "compiled"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} = {list(values)}: expected at least one value, none of them twice")
        if bad := [n for n in self.batch_sizes if isinstance(n, bool) or not isinstance(n, int) or n < 1]:
            raise ConfigError(f"batch size {bad[0]!r}: expected an integer of at least 1")
        _known("dtype", self.dtypes, tuple(DTYPES))
        _known("layout", self.layouts, tuple(layout.value for layout in Layout))
        _known("compile", self.compiled, COMPILE_MODES)
        for backend in self.backends:
            check_backend(backend)
        if self.oracle_rows < 1:
            raise ConfigError(f"oracle_rows = {self.oracle_rows}: expected at least 1")


def _known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise ConfigError(f"{name} = {value!r}: expected one of {', '.join(known)}")


def time_model(
    model: nn.Module,
    name: str,
    structure: str,
    make_input: Callable[[int], Tensor],
    sweep: ModelSweep,
    metrics: Mapping[str, float] | None = None,
) -> Iterator[list[Row]]:
    """Time ``model`` beside its dense twin, yielding the rows of one dtype and batch size at a time.

    ``make_input(batch)`` gives the input on the CPU; floating-point inputs are cast to the dtype, as the model is.
    ``metrics`` are what is known of the trained model; ``model`` itself is left as it is. Every row of one list comes
    from one interleaved run on one input.
    """
    device = torch.device(sweep.device)
    machine = describe_machine(device)
    for dtype_name in sweep.dtypes:
        dtype = DTYPES[dtype_name]
        roofline = measure_roofline(device, dtype) if sweep.roofline else None
        conditions = Conditions(device, dtype, sweep.plan, roofline, machine, metrics or {})
        # Weights are rounded to the dtype once, here; the oracle has the rounded ones, so that errors are those of the
        # arithmetic.
        base = copy.deepcopy(model).eval().requires_grad_(False).to(device=device, dtype=dtype)
        for batch in sweep.batch_sizes:
            x = make_input(batch).to(device)
            if x.is_floating_point():
                x = x.to(dtype)
            case, variants = _case(base, name, x, sweep.oracle_rows), _variants(base, structure, sweep)
            with _room_to_compile(sweep.compiled):
                rows = compare(case, variants, conditions)
            yield rows


@contextmanager
def _room_to_compile(modes: Sequence[str]) -> Iterator[None]:
    """Let torch.compile make a program for every variant: beyond its limit it would run eagerly and not say so."""
    if set(modes) == {"no"}:
        yield
        return
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield


def random_input(model_args: Mapping[str, object], batch: int, seed: int = 0) -> Tensor:
    """Random input for a model built from ``model_args``: tokens ``(batch, context_length)`` below ``vocab_size``, or
    normal ``(batch, *input_shape)``.

    Raises ``ConfigError`` if ``model_args`` has neither kind of sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        if "vocab_size" in model_args:
            shape = (batch, int(model_args["context_length"]))  # type: ignore[call-overload]
            return torch.randint(int(model_args["vocab_size"]), shape, generator=generator)  # type: ignore[call-overload]
        return torch.randn(batch, *model_args["input_shape"], generator=generator)  # type: ignore[misc]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model_args = {dict(model_args)}: expected input_shape, or vocab_size and context_length"
        ) from error


def structured_layers(model: nn.Module) -> dict[str, KSLinear]:
    """The structured layers of ``model`` by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KSLinear)}


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with every structured layer written out as an ``nn.Linear``: equal outputs, dense cost."""
    return _replaced(model, _dense_layer)


def with_backend(model: nn.Module, backend: str, layout: str = "batch_first") -> nn.Module:
    """A copy of ``model`` whose structured layers run on ``backend``.

    With layout "batch_last" every structured layer is given its input transposed, and transposes its output back: the
    model around it stays batch-first, and pays for that.
    """

    def convert(layer: KSLinear) -> nn.Module:
        layer = copy.deepcopy(layer)
        layer.backend, layer.layout = check_backend(backend), layout
        return layer if layout == Layout.BATCH_FIRST.value else _BatchLast(layer)

    return _replaced(model, convert)


def oracle(model: nn.Module) -> nn.Module:
    """The reference model: float64, every structured layer on the backend "reference"."""
    return with_backend(model, "reference").double()


def layer_tolerance(model: nn.Module) -> float:
    """Tolerance of the worst linear layer of ``model``, structured or not."""
    precision = torch.get_float32_matmul_precision()
    return max(
        (tolerance(dtype, length, n, float32_precision=precision) for dtype, length, n in _products(model)),
        default=tolerance(next(model.parameters()).dtype, 1),
    )


def check_layers(model: nn.Module, x: Tensor) -> str:
    """Compare every structured layer with the float64 oracle, alone, on the input that it gets from ``model(x)``.

    Returns the reason against the first layer that disagrees, or "". The whole model's tolerance grows with depth;
    these do not.
    """
    reasons: list[str] = []

    def check(name: str) -> Callable[[KSLinear, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: KSLinear, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            if reason := _check_layer(layer, inputs[0], out):
                reasons.append(f"layer {name or 'of the model'} ({layer.chain.spec}): {reason}")

        return hook

    handles = [layer.register_forward_hook(check(name)) for name, layer in structured_layers(model).items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return reasons[0] if reasons else ""


def resolved_backends(model: nn.Module, x: Tensor) -> str:
    """The backends that the structured layers run on for ``model(x)``, the most frequent first."""
    counts: dict[str, int] = {}

    def count(layer: KSLinear, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        for backend in layer.resolved_backends(inputs[0].numel() // layer.in_features):
            counts[backend] = counts.get(backend, 0) + 1

    handles = [layer.register_forward_hook(count) for layer in structured_layers(model).values()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return ", ".join(sorted(counts, key=lambda backend: -counts[backend]))


class _BatchLast(nn.Module):
    """A batch-last layer in a batch-first model: ``(..., in)`` to ``(..., out)`` by transposing both ways."""

    def __init__(self, layer: KSLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, x.shape[-1]).T.contiguous()  # (in, N)
        return self.layer(columns).T.contiguous().unflatten(0, x.shape[:-1])  # (..., out)


def _case(base: nn.Module, name: str, x: Tensor, oracle_rows: int) -> Case:
    rows = sample_rows(x.shape[0], oracle_rows)

    def run_oracle() -> Tensor:
        part = x[rows]
        return oracle(base)(part.double() if part.is_floating_point() else part)

    n_layers = max(1, sum(1 for _ in _products(base)))
    bound = model_tolerance(layer_tolerance(base), n_layers)
    return Case(name, x, x.shape[0], run_oracle, lambda out: out[rows], bound)


def _variants(base: nn.Module, structure: str, sweep: ModelSweep) -> list[Variant]:
    variants = []
    structured = bool(structured_layers(base))
    for mode in sweep.compiled:
        suffix = "" if mode == "no" else ", compiled" if mode == "default" else f", {mode}"
        baseline = f"dense{suffix}"
        build = _builder(partial(dense_twin, base), mode)
        variants.append(Variant(baseline, "dense", "torch", "batch_first", build, mode, baseline))
        if not structured:
            continue
        for backend in sweep.backends:
            for layout in sweep.layouts:
                where = "" if layout == Layout.BATCH_FIRST.value else f", {layout}"
                name = f"{structure}, {backend}{where}{suffix}"
                build = _builder(partial(with_backend, base, backend, layout), mode)
                variants.append(Variant(name, structure, backend, layout, build, mode, baseline))
    return variants


def _builder(make: Callable[[], nn.Module], mode: str) -> Callable[[], Contender]:
    def build() -> Contender:
        model = make()
        call = model if mode == "no" else torch.compile(model, mode=mode, dynamic=False)
        tensors = [*model.parameters(), *model.buffers()]
        has_structure = bool(structured_layers(model))
        return Contender(
            call=call,
            eager=model,
            parameters=sum(p.numel() for p in model.parameters()),
            weight_bytes=sum(t.nbytes for t in tensors),
            resolved_backend=(lambda x: resolved_backends(model, x)) if has_structure else (lambda x: "torch"),
            check=(lambda x: check_layers(model, x)) if has_structure else (lambda x: ""),
        )

    return build


def _replaced(model: nn.Module, convert: Callable[[KSLinear], nn.Module]) -> nn.Module:
    """A copy of ``model`` with every structured layer converted; a layer that two names share stays shared."""
    model = copy.deepcopy(model)
    if isinstance(model, KSLinear):
        return convert(model)
    converted: dict[KSLinear, nn.Module] = {}
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, KSLinear)]
    for name, layer in found:
        if layer not in converted:
            converted[layer] = convert(layer)
        model.set_submodule(name, converted[layer])
    return model


def _dense_layer(layer: KSLinear) -> nn.Module:
    factor = layer.factors[0]
    # Multiplied out in float64 and rounded once: in 16 bits the product of rounded factors would carry errors of its
    # own.
    weight = copy.deepcopy(layer).double().to_dense().to(factor.dtype)
    linear = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device=factor.device, dtype=factor.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    linear.requires_grad_(False)
    if layer.activation == "none":
        return linear
    return nn.Sequential(linear, _ACTIVATION_MODULES[layer.activation]())


def _products(model: nn.Module) -> Iterator[tuple[torch.dtype, int, int]]:
    """(dtype, longest sum, number of products in a row) of every layer of ``model`` that multiplies by a weight."""
    for module in model.modules():
        if isinstance(module, KSLinear):
            longest = max(pattern.c for pattern in module.chain)
            # The dense twin sums over all inputs at once.
            yield module.factors[0].dtype, max(longest, module.in_features), len(module.chain)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield module.weight.dtype, math.prod(module.weight.shape[1:]), 1


def _check_layer(layer: KSLinear, x: Tensor, out: Tensor) -> str:
    batch_first = layer.layout == Layout.BATCH_FIRST.value
    x_rows, out_rows = (
        t.reshape(-1, t.shape[-1]) if batch_first else t.reshape(t.shape[0], -1).T for t in (x, out)
    )  # (N, in), (N, out)
    rows = sample_rows(x_rows.shape[0], _LAYER_ROWS)
    reference = ks_chain(
        x_rows[rows].double(),
        [factor.double() for factor in layer.factors],
        None if layer.bias is None else layer.bias.double(),
        backend="reference",
        activation=layer.activation,
        in_features=layer.in_features,
        out_features=layer.out_features,
    )
    if not reference.any() and not out_rows.any():
        # A layer of zeros is right, though it says nothing.
        return ""
    bound = tolerance(
        x.dtype,
        max(pattern.c for pattern in layer.chain),
        len(layer.chain),
        float32_precision=torch.get_float32_matmul_precision(),
    )
    return agreement(out_rows[rows], reference, bound).reason
