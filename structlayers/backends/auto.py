"""``backend="auto"``: a pure function from the problem to the name of a backend."""

from __future__ import annotations

from structlayers.problem import Problem


def choose(problem: Problem) -> str:
    """The backend expected to be fastest."""
    return "bmm"
