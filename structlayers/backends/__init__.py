"""The registry of backends, and the choice between them."""

from __future__ import annotations

from structlayers.backends import bmm, dense, einsum, reference, sparse
from structlayers.backends.auto import choose
from structlayers.backends.base import Backend
from structlayers.errors import BackendError
from structlayers.problem import Problem

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (reference.BACKEND, einsum.BACKEND, bmm.BACKEND, sparse.BSR, sparse.CSR, dense.BACKEND)
}


def check_backend(name: str) -> str:
    """The name itself if it is "auto" or a backend's; :class:`BackendError` otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"backend = {name!r}: expected one of {['auto', *BACKENDS]}")
    return name


def resolve(name: str, problem: Problem) -> Backend:
    """The backend that computes ``problem`` when ``name`` is asked for.

    What was asked for by name is what runs: :class:`BackendError` gives the reason where it cannot.
    """
    check_backend(name)
    if name == "auto":
        return BACKENDS[choose(problem)]
    backend = BACKENDS[name]
    reason = backend.reason_against(problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot compute {problem}: {reason}")
    return backend


def available_backends(problem: Problem) -> list[str]:
    """Names of the backends that can compute ``problem`` on this machine."""
    return [name for name, backend in BACKENDS.items() if backend.reason_against(problem) is None]
