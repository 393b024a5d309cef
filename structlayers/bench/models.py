"""A model in its variants (dense twin, backends, layouts, compiled) and its oracle, as contenders of a comparison."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from structlayers.backends import check_backend
from structlayers.bench.compare import Case, Conditions, Contender, Variant, compare, room_to_compile
from structlayers.bench.energy import EnergyColumn
from structlayers.bench.machine import measure_roofline
from structlayers.bench.model_variants import (
    as_one_factor,
    dense_twin,
    dense_with_epilogue,
    frozen,
    has_epilogue,
    oracle,
    structured_layers,
    with_backend,
    with_free_linears,
)
from structlayers.bench.nvml import device_state
from structlayers.bench.rows import Row
from structlayers.bench.sweep import command_line, machine_of
from structlayers.bench.timing import TimingPlan, in_turn
from structlayers.bench.verify import agreement, sample_rows
from structlayers.errors import ConfigError
from structlayers.frozen import FrozenFactors
from structlayers.nn import KSLinear
from structlayers.ops import ks_chain
from structlayers.problem import Layout
from structlayers.tolerances import model_tolerance, tolerance
from structlayers.values import FLAG, check, integer, number

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# "graphed": compiled, and captured as one CUDA graph that is replayed.
GRAPHED = "graphed"
COMPILE_MODES = ("no", "default", GRAPHED, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

_KINDS = {
    "oracle_rows": integer(1),
    **dict.fromkeys(("roofline", "epilogue", "one_factor", "free", "energy"), FLAG),
    "energy_window_s": number("a number of seconds above 0", lambda value: 0 < value < math.inf),
}

# A layer is compared on so many of its input rows: the oracle costs far more than the layer.
_LAYER_ROWS = 64


@dataclass(frozen=True)
class ModelSweep:
    """What to time a model over. Raises ``ConfigError`` or ``BackendError`` for a value that names nothing known.

    ``compiled``: "no" or a mode of ``torch.compile``. ``oracle_rows``: batch entries compared with the oracle (the
    first and the last ones). ``frozen``: whether the structured layers are frozen first. ``epilogue``: also
    dense with the activations of the feed-forwards in cuBLAS's epilogue. ``one_factor``: in float32, also the dense
    weight by our own kernel as one factor. ``free``: also with free linears, for the latency of all the rest.
    ``commit``: names the code in the rows, where it is not in a git repository.
    """

    batch_sizes: Sequence[int] = (1, 64)
    dtypes: Sequence[str] = ("float32",)
    backends: Sequence[str] = ("auto",)
    layouts: Sequence[str] = ("batch_first",)
    compiled: Sequence[str] = ("no",)
    device: str = "cpu"
    oracle_rows: int = 8
    roofline: bool = True
    frozen: Sequence[bool] = (False,)
    epilogue: bool = False
    one_factor: bool = False
    free: bool = False
    energy: bool = False
    energy_window_s: float = 1.0
    commit: str | None = None
    plan: TimingPlan = field(default_factory=TimingPlan)

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "dtypes", "backends", "layouts", "compiled", "frozen"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} = {list(values)}: expected at least one value, none of them twice")
        for n in self.batch_sizes:
            check({"batch size": n}, {"batch size": integer(1)})
        for value in self.frozen:
            check({"freeze": value}, {"freeze": FLAG})
        _known("dtype", self.dtypes, tuple(DTYPES))
        _known("layout", self.layouts, tuple(layout.value for layout in Layout))
        _known("compile", self.compiled, COMPILE_MODES)
        for backend in self.backends:
            check_backend(backend)
        check(vars(self), _KINDS)


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
    done: Callable[[str, int], bool] = lambda dtype, batch: False,
) -> Iterator[list[Row]]:
    """Time ``model`` beside its dense twin, yielding the rows of one dtype and batch size at a time.

    ``make_input(batch)`` gives the input on the CPU; floating-point inputs are cast to the dtype, as the model is.
    ``metrics`` are what is known of the trained model; ``model`` itself is left as it is. Every row of one list comes
    from one interleaved run on one input, but those with free linears, which have an oracle of their own.
    ``done(dtype, batch)`` says what is not to be timed again. A batch that does not fit into the memory gives rows
    that say so, and the next is timed.
    """
    device = torch.device(sweep.device)
    machine = machine_of(device, sweep.commit)
    energy = EnergyColumn(device, sweep.energy_window_s) if sweep.energy else None
    for dtype_name in sweep.dtypes:
        batches = [batch for batch in sweep.batch_sizes if not done(dtype_name, batch)]
        if not batches:
            continue
        dtype = DTYPES[dtype_name]
        roofline = measure_roofline(device, dtype) if sweep.roofline else None
        conditions = Conditions(
            device, dtype, sweep.plan, roofline, machine, metrics or {}, energy, command=command_line()
        )
        # Weights are rounded to the dtype once, here; the oracle has the rounded ones, so that errors are those of the
        # arithmetic.
        base = copy.deepcopy(model).eval().requires_grad_(False).to(device=device, dtype=dtype)
        for batch in batches:
            try:
                x = make_input(batch).to(device)
                if x.is_floating_point():
                    x = x.to(dtype)
                case = _case(base, name, x, sweep.oracle_rows)
            except torch.OutOfMemoryError as error:
                case = _case_without_input(name, batch, error)
            variants = _variants(base, structure, sweep, dtype)
            here = replace(conditions, state=device_state(device))
            with room_to_compile(set(sweep.compiled) != {"no"}):
                rows = compare(case, variants, here)
                if sweep.free and structured_layers(base) and case.x.numel():
                    free = with_free_linears(base)
                    rows += compare(
                        _case(free, name, x, sweep.oracle_rows, like=base), _free_variants(free, sweep), here
                    )
            yield rows


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


def layer_tolerance(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """Tolerance of the worst linear layer of ``model``, structured or not; of ``dtype`` where it has none."""
    precision = torch.get_float32_matmul_precision()
    dtype = next((parameter.dtype for parameter in model.parameters()), dtype)
    return max(
        (tolerance(dtype, length, n, float32_precision=precision) for dtype, length, n in _products(model)),
        default=tolerance(dtype, 1),
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


def _case(base: nn.Module, name: str, x: Tensor, oracle_rows: int, *, like: nn.Module | None = None) -> Case:
    """Outputs of ``base`` for ``x``, with the tolerance of ``like``.

    A model with free linears rounds between them as often as the model that has them does.
    """
    rows, like = sample_rows(x.shape[0], oracle_rows), base if like is None else like

    def run_oracle() -> Tensor:
        part = x[rows]
        return oracle(base)(part.double() if part.is_floating_point() else part)

    n_layers = max(1, sum(1 for _ in _products(like)))
    bound = model_tolerance(layer_tolerance(like, x.dtype if x.is_floating_point() else torch.float32), n_layers)
    return Case(name, x, x.shape[0], run_oracle, lambda out: out[rows], bound)


def _case_without_input(name: str, batch: int, error: Exception) -> Case:
    """A case of which every row says what happened to its input."""

    def fail() -> Tensor:
        raise error

    return Case(name, torch.empty(0), batch, fail, lambda out: out, 0.0)


def _variants(base: nn.Module, structure: str, sweep: ModelSweep, dtype: torch.dtype) -> list[Variant]:
    variants = []
    structured = bool(structured_layers(base))
    for mode in sweep.compiled:
        suffix = _suffix(mode)
        baseline = f"dense{suffix}"

        def add(
            name: str,
            kind: str,
            backend: str,
            make: Callable[[], nn.Module],
            layout: str = Layout.BATCH_FIRST.value,
            mode: str = mode,
            baseline: str = baseline,
            suffix: str = suffix,
        ) -> None:
            variants.append(Variant(name + suffix, kind, backend, layout, _builder(make, mode), mode, baseline))

        add("dense", "dense", "torch", partial(dense_twin, base))
        if not structured:
            continue
        if sweep.epilogue and has_epilogue(base):
            add("dense, epilogue", "dense", "torch", partial(dense_with_epilogue, base))
        if sweep.one_factor and dtype == torch.float32:
            own = "cuda" if sweep.device.startswith("cuda") else "auto"
            add(f"dense as one factor, {own}", "one factor", own, partial(as_one_factor, base, own))
        for backend in sweep.backends:
            for layout in sweep.layouts:
                first = layout == Layout.BATCH_FIRST.value
                name = f"{structure}, {backend}{'' if first else f', {layout}'}"
                for freeze in sweep.frozen:
                    make = partial(_structured, base, backend, layout, freeze)
                    add(f"{name}{', frozen' if freeze else ''}", structure, backend, make, layout)
    return variants


def _structured(base: nn.Module, backend: str, layout: str, freeze: bool) -> nn.Module:
    model = with_backend(base, backend, layout)
    return frozen(model) if freeze else model


def _free_variants(free: nn.Module, sweep: ModelSweep) -> list[Variant]:
    return [
        Variant(
            f"linears free{_suffix(mode)}", "free", "torch", "batch_first", _builder(lambda: free, mode), mode, None
        )
        for mode in sweep.compiled
    ]


def _suffix(mode: str) -> str:
    return "" if mode == "no" else ", compiled" if mode == "default" else f", {mode}"


def _builder(make: Callable[[], nn.Module], mode: str) -> Callable[[], Contender]:
    def build() -> Contender:
        model = make()
        tensors = [*model.parameters(), *model.buffers()]
        has_structure = bool(structured_layers(model))
        constant = [layer for layer in structured_layers(model).values() if layer.is_frozen]
        return Contender(
            call=_compiled(model, mode),
            eager=model,
            parameters=sum(p.numel() for p in model.parameters()) + sum(layer.chain.n_params for layer in constant),
            weight_bytes=sum(t.nbytes for t in tensors) + sum(_frozen_bytes(layer) for layer in constant),
            resolved_backend=(lambda x: resolved_backends(model, x)) if has_structure else (lambda x: "torch"),
            check=(lambda x: check_layers(model, x)) if has_structure else (lambda x: ""),
            allocates=mode != GRAPHED,
        )

    return build


def _frozen_bytes(layer: KSLinear) -> int:
    """Bytes of frozen factors and of what was derived from them: neither are parameters or buffers."""
    assert isinstance(layer.factors, FrozenFactors)
    return layer.factors.report.factor_bytes + layer.factors.report.derived_bytes


def _compiled(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    if mode == "no":
        return model
    if mode != GRAPHED:
        return torch.compile(model, mode=mode, dynamic=False)
    return Graphed(torch.compile(model, dynamic=False))


class Graphed:
    """A call that is captured as a CUDA graph the first time that it gets an input tensor, and replayed after that.

    The output is the same memory every time. Raises ``ConfigError`` for an input that is not on a GPU.
    """

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        self._call = call
        self._input: Tensor | None = None
        self._output: list[Tensor] = []
        self._replay: Callable[[], object] = lambda: None

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            raise ConfigError(f"compile = {GRAPHED!r} captures CUDA graphs; the input is on {x.device.type}")
        if x is not self._input:
            # What the last call of the capture gives is what every replay fills.
            self._replay = in_turn([lambda: self._output.append(self._call(x))], x.device)
            self._input, self._output = x, self._output[-1:]
        self._replay()
        return self._output[0]


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
    # Autocast computes in the output's type; what it rounds before that is within the same bound.
    bound = tolerance(
        out.dtype,
        # A plan may multiply factors into one.
        layer.in_features,
        len(layer.chain),
        float32_precision=torch.get_float32_matmul_precision(),
    )
    return agreement(out_rows[rows], reference, bound).reason
