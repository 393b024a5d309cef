"""The registry of backends, and the choice between them."""

from __future__ import annotations

from structlayers.backends import bmm, cuda, dense, einsum, reference, sparse, tuning
from structlayers.backends.auto import choose
from structlayers.backends.base import Backend
from structlayers.errors import BackendError
from structlayers.problem import Problem

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (reference.BACKEND, einsum.BACKEND, bmm.BACKEND, sparse.BSR, sparse.CSR, dense.BACKEND, cuda.BACKEND)
}


def check_backend(name: str) -> str:
    """The name itself if it is "auto" or a backend's; :class:`BackendError` otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"backend = {name!r}: expected one of {['auto', *BACKENDS]}")
    return name


def resolve(name: str, problem: Problem) -> Backend:
    """The backend that computes ``problem`` when ``name`` is asked for.

    What was asked for by name is what runs: :class:`BackendError` gives the reason where it cannot. "auto" is the
    estimate of :func:`~structlayers.backends.auto.choose`, or what was measured where the tuning cache has an entry.
    """
    check_backend(name)
    if name == "auto":
        compiled = cuda.reason_against(problem) is None
        return BACKENDS[choose(problem, compiled, tuning.lookup(problem))]
    backend = BACKENDS[name]
    reason = backend.reason_against(problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot compute {problem}: {reason}")
    return backend


def available_backends(problem: Problem) -> list[str]:
    """Names of the backends that can compute ``problem`` on this machine."""
    return [name for name, backend in BACKENDS.items() if backend.reason_against(problem) is None]
