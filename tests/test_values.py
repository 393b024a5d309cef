"""Options of the wrong kind are named with what was expected; one value stands for a list of one."""

import math

import pytest

from structlayers.errors import ConfigError
from structlayers.values import (
    FLAG,
    SEED,
    TEXT,
    check,
    either,
    integer,
    listed,
    nullable,
    number,
    one_of,
    patterns,
    some,
)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (integer(1), [1, 10**30], [0, 1.0, True, "1", None, math.nan, [1]]),
        (SEED, [0, 2**32 - 1], [-1, 2**32]),
        (number("a number above 0", lambda value: value > 0), [1, 0.5, math.inf], [0, True, "1", None, math.nan, [1]]),
        (FLAG, [True, False], [0, 1, "true", None]),
        (one_of("a", "b"), ["a"], ["c", "", 1, None, ["a"]]),
        (nullable(FLAG), [None, True], [0]),
        (either(FLAG, integer(2)), [True, 2], [1, None]),
        (some(TEXT), ["a", ["a"], ("a", "b")], [None, [], 5, ["a", 5], {"a": 1}]),
    ],
)
def test_kinds(kind, good, bad):
    for value in good:
        check({"option": value}, {"option": kind})
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            check({"option": value, "other": 0}, {"option": kind}, "group.")
        assert str(caught.value) == f"group.option = {value!r}: expected {kind.expected}"


def test_options_without_a_kind_and_kinds_without_an_option_do_not_count():
    check({"other": 1}, {"option": FLAG})


def test_one_value_is_a_list_of_one():
    assert listed("hidden.*") == ("hidden.*",) and listed({"a": 1}) == ({"a": 1},) and listed(5) == (5,)
    assert listed(None) == () and listed(["a", "b"]) == ("a", "b")


def test_patterns():
    assert patterns("include", "hidden.*") == patterns("include", ["hidden.*"]) == ("hidden.*",)
    assert patterns("include", None) == ()
    for value in (5, [5], {"a": 1}):
        with pytest.raises(ConfigError, match=r"include = .*: expected a pattern or a list of patterns"):
            patterns("include", value)
