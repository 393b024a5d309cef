"""What an option may be, and the sentence that says so where it is something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from structlayers.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """The values that an option takes: in words, and as a test of any value at all."""

    expected: str
    holds: Callable[[Any], bool]


def check(values: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str = "") -> None:
    """Raise ``ConfigError``, naming the option behind ``prefix``, for the first value that is not of its kind.

    Options without a kind, and kinds of options that are not there, do not count: ``check(locals(), kinds)`` checks
    the arguments of a function.
    """
    for name, kind in kinds.items():
        if name in values and not kind.holds(values[name]):
            raise ConfigError(f"{prefix}{name} = {values[name]!r}: expected {kind.expected}")


def integer(least: int, most: int | None = None) -> Kind:
    text = f"of at least {least}" if most is None else f"from {least} to {most}"
    return Kind(
        f"an integer {text}", lambda value: _is(Integral, value) and least <= value <= (value if most is None else most)
    )


def number(expected: str, holds: Callable[[float], bool]) -> Kind:
    """A number, but no truth value, for which ``holds``."""
    return Kind(expected, lambda value: _is(Real, value) and holds(value))


def one_of(*known: str) -> Kind:
    return Kind(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known)


def nullable(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.holds(value))


def either(*kinds: Kind) -> Kind:
    return Kind(", or ".join(kind.expected for kind in kinds), lambda value: any(kind.holds(value) for kind in kinds))


def some(kind: Kind) -> Kind:
    """One such value or a list of them, at least one; see :func:`listed`."""

    def holds(value: Any) -> bool:
        return bool(listed(value)) and all(map(kind.holds, listed(value)))

    return Kind(f"{kind.expected}, or a list of such", holds)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
PATTERN = Kind("a pattern", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
SHARE = number("a share from 0 to 1", lambda value: 0 <= value <= 1)
FRACTION = number("a fraction above 0, below 1", lambda value: 0 < value < 1)
NOT_NEGATIVE = number("a number of at least 0", lambda value: 0 <= value < math.inf)
# What NumPy, and so Lightning, takes.
SEED = integer(0, 2**32 - 1)
THREADS = nullable(integer(1))


def listed(value: Any) -> tuple[Any, ...]:
    """A value that may be one or a list: a lone text or mapping is one, None is an empty list."""
    if value is None:
        return ()
    lone = isinstance(value, str | Mapping) or not isinstance(value, Iterable)
    return (value,) if lone else tuple(value)


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """The fnmatch patterns that an option lists; raises ``ConfigError`` for what is no pattern."""
    found = listed(value)
    check({name: value}, {name: Kind("a pattern or a list of patterns", lambda _: all(map(PATTERN.holds, found)))})
    return found


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
