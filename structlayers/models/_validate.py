"""Checks that the model constructors share; each error names the argument, its value and what was expected."""

from collections.abc import Sequence

from structlayers.errors import ConfigError
from structlayers.values import check, integer, number


def positive(**values: int) -> None:
    """Raise ``ConfigError`` unless every value is an integer of at least 1."""
    check(values, dict.fromkeys(values, integer(1)))


def probability(**values: float) -> None:
    """Raise ``ConfigError`` unless every value lies in [0, 1)."""
    check(values, dict.fromkeys(values, number("a number in [0, 1)", lambda value: 0 <= value < 1)))


def divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raise ``ConfigError`` unless ``divisor`` divides ``value``; both names go into the message."""
    if value % divisor:
        raise ConfigError(f"{name}={value} is not a multiple of {divisor_name}={divisor}")


def image_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (channels, height, width), or raise ``ConfigError`` for any other kind of shape."""
    shape = tuple(input_shape)
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ConfigError(f"input_shape={shape}: expected (channels, height, width), each at least 1")
    return shape[0], shape[1], shape[2]


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """Width of a transformer's feed-forward layer, ``dim * mlp_ratio``, which has to be a whole number."""
    check(locals(), {"mlp_ratio": number("a number above 0", lambda value: value > 0)})
    width = dim * mlp_ratio
    if width < 1 or width != int(width):
        raise ConfigError(f"mlp_ratio={mlp_ratio}: dim * mlp_ratio = {width} is not a whole number of at least 1")
    return int(width)
