"""Frozen factors: what a layer holds after ``freeze()`` in place of its parameters.

The factors and whatever is derived from them are copies of their own that nothing outside can reach, so that derived
weights cannot be stale: every way to change the factors either raises here or makes the layer unfreeze first.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from structlayers.errors import ConfigError
from structlayers.patterns import Chain
from structlayers.plans import BATCHES, ChainProblem, Form, choose_form, choose_forms, hold
from structlayers.problem import Layout


@dataclass(frozen=True)
class FreezeReport:
    """What a frozen layer holds: the factors, then other forms of them; ``str()`` is a few lines.

    ``form_of_batch``: which form computes a batch of that size, by estimate.
    """

    chain: Chain
    dtype: torch.dtype
    max_bytes: int
    forms: tuple[Form, ...]
    form_of_batch: tuple[tuple[int, int], ...]

    @property
    def factor_bytes(self) -> int:
        return self.chain.n_params * self.dtype.itemsize

    @property
    def derived_bytes(self) -> int:
        """Bytes of the derived weights, each counted once."""
        derived = frozenset().union(*(form.derived for form in self.forms))
        return sum(operand.pattern.nnz for operand in derived) * self.dtype.itemsize

    def __str__(self) -> str:
        lines = [
            f"{self.chain.spec}: {self.derived_bytes:,} bytes derived, at most {self.max_bytes:,}, "
            f"beside {self.factor_bytes:,} of the factors"
        ]
        for number, form in enumerate(self.forms):
            batches = [str(n) for n, chosen in self.form_of_batch if chosen == number]
            lines.append(f"  {form}: " + (f"batches of {', '.join(batches)}" if batches else "no batch"))
        return "\n".join(lines)


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(f"{what}: the factors are frozen; call unfreeze() on the layer first")


class FrozenFactors(nn.Module):
    """The factors of a frozen :class:`structlayers.KSLinear`, in place of its ``nn.ParameterList``.

    They are in the state dict under the same names, as copies. ``self[q]`` is a copy too, and PyTorch refuses to change
    it in place (an inference tensor). There are no parameters and no buffers.
    """

    report: FreezeReport
    # The weights of every form, form after form, and how many each has; the first are the factors. Plain attributes: no
    # walk over parameters and buffers meets them.
    tensors: tuple[Tensor, ...]
    lengths: list[int]
    _requires_grad: list[bool]
    # The parameters that were, and what they were like.
    _former: list[_Former]
    _states: list[tuple[int, int]]
    # What was handed out.
    _shown: list[Tensor] | None

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        chain: Chain,
        layout: Layout,
        max_bytes: int | None = None,
        batches: Sequence[int] | None = None,
    ) -> None:
        """Derive weights of at most ``max_bytes``, those of the dense layer by default, good for ``batches``."""
        super().__init__()
        first = parameters[0]
        dense_bytes = chain.dense_params * first.dtype.itemsize
        limit = dense_bytes if max_bytes is None else max_bytes
        sizes = BATCHES if batches is None else tuple(batches) if isinstance(batches, Iterable) else ()
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ConfigError(f"max_bytes = {max_bytes!r}: expected an integer >= 0, or None for {dense_bytes}")
        if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise ConfigError(f"batches = {batches!r}: expected integers >= 1")
        for parameter in parameters:
            if type(parameter) is not nn.Parameter or parameter.is_meta:
                kind = "meta tensor" if parameter.is_meta else type(parameter).__name__
                raise ConfigError(f"a factor is a {kind}: expected plain parameters with values to freeze")
        problem = ChainProblem.on(first.device, chain, 1, first.dtype, layout)
        forms = choose_forms(problem, limit, sizes)
        with torch.no_grad(), torch.inference_mode(False):
            # Clones in memory of their own: not even an alias that somebody took before reaches them.
            factors = [parameter.detach().clone(memory_format=torch.contiguous_format) for parameter in parameters]
            operands = list(dict.fromkeys(operand for form in forms for operand in form.operands))
            derived = [operand for operand in operands if operand.is_derived]
            values = dict(
                zip(derived, hold(derived, _working(factors), chain.in_features, chain.out_features), strict=True)
            )
            # As parameters their sizes are constants for torch.compile, whatever is dynamic.
            held = {
                operand: nn.Parameter(
                    values[operand].to(first.dtype).contiguous() if operand in values else factors[operand.start],
                    requires_grad=False,
                )
                for operand in operands
            }
        chains = [form.chain for form in forms]
        chosen = tuple((n, choose_form(chains, replace(problem, n=n))[0]) for n in sizes)
        self.report = FreezeReport(chain, first.dtype, limit, forms, chosen)
        self.tensors = tuple(held[operand] for form in forms for operand in form.operands)
        self.lengths = [len(form.operands) for form in forms]
        self._requires_grad = [parameter.requires_grad for parameter in parameters]
        self._former = [_Former(parameter) for parameter in parameters]
        self._states = [_state(parameter) for parameter in parameters]
        self._shown = None

    # ---- for the layer

    def was_overtaken(self) -> bool:
        """Whether somebody changed the parameters that were frozen: the layer is to unfreeze before it computes."""
        for reference, state in zip(self._former, self._states, strict=True):
            parameter = reference()
            if parameter is not None and _state(parameter) != state:
                return True
        return False

    def thaw(self) -> nn.ParameterList:
        """The parameters again: the very ones, as they are now, where somebody still holds them."""
        parameters = []
        for factor, reference, needs in zip(self._own(), self._former, self._requires_grad, strict=True):
            former = reference()
            if former is None:
                former = nn.Parameter(factor.clone(), requires_grad=needs)
                reference.become(former)
            parameters.append(former)
        return nn.ParameterList(parameters)

    def share(self, known: dict[int, _Former]) -> None:
        """Tie these factors to those of other layers that were the same parameters, which somebody still holds.

        ``known``: those met so far by the identity of the parameter; new ones are added.
        """
        for q, former in enumerate(self._former):
            parameter = former()
            if parameter is not None:
                self._former[q] = known.setdefault(id(parameter), former)

    # ---- as a list of tensors

    def _own(self) -> tuple[Tensor, ...]:
        return self.tensors[: self.lengths[0]]

    def _copies(self) -> list[Tensor]:
        """The values that a call computes with, for others to have."""
        factors = list(self.thaw()) if self.was_overtaken() else self._own()
        return [factor.detach().clone() for factor in factors]

    def __len__(self) -> int:
        return self.lengths[0]

    def __getitem__(self, index: int | slice) -> Any:
        if self._shown is None or self.was_overtaken():
            with torch.inference_mode():
                self._shown = self._copies()
        return self._shown[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self[:])

    # ---- what would change them

    def __setitem__(self, index: int, value: object) -> NoReturn:
        _refuse(f"factor {index} cannot be replaced")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) or name.isdigit():
            _refuse(f"factors.{name} cannot be replaced")
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> NoReturn:
        _refuse(f"no parameter {name} can be registered")

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> NoReturn:
        _refuse(f"no buffer {name} can be registered")

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        _refuse("neither dtype nor device can be changed")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            _refuse("no values can be loaded")
        if strict:
            missing_keys += [f"{prefix}{q}" for q in range(len(self))]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for q, (factor, former) in enumerate(zip(self._copies(), self._former, strict=True)):
            destination[f"{prefix}{q}"] = former.saved(destination, f"{prefix}{q}", factor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shown": None}


class _Former:
    """A parameter that was, for every frozen layer that had it: by what it is known that they were tied."""

    def __init__(self, parameter: nn.Parameter | None = None) -> None:
        # The parameter, and the last state dict with the key under which it went there.
        self._parameter: Callable[[], Any] = _gone if parameter is None else weakref.ref(parameter)
        self._state_dict: Callable[[], Any] = _gone
        self._key = ""

    def __call__(self) -> nn.Parameter | None:
        """The parameter, where somebody still holds it."""
        return self._parameter()

    def become(self, parameter: nn.Parameter) -> None:
        """Stand for a parameter that is made in place of the one that is no more."""
        self._parameter = weakref.ref(parameter)

    def saved(self, state_dict: Any, key: str, value: Tensor) -> Tensor:
        """What a state dict is to hold: ``value``, or the equal tensor that it has of this parameter already."""
        if self._state_dict() is state_dict:
            other = state_dict.get(self._key)
            if isinstance(other, Tensor) and torch.equal(other, value):
                return other
        self._state_dict = weakref.ref(state_dict) if isinstance(state_dict, OrderedDict) else _gone
        self._key = key
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has nothing to do with the parameter; copies of tied layers are tied.
        return _Former, ()


def _gone() -> Any:
    """In place of a reference to what is no more."""


def _working(factors: Sequence[Tensor]) -> list[Tensor]:
    """In at least float32, so that products of 16-bit factors are rounded once."""
    return [factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors]


def _state(parameter: Tensor) -> tuple[int, int]:
    """Another one after every change that PyTorch counts. Inference tensors count none, and refuse to be changed."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
