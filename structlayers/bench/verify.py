"""The check that stands before every timing: does an output agree with the float64 oracle?"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A norm over many rows hides one wrong row or element, so the worst element is bounded too. Single elements scatter
# more than their norm.
_ELEMENT_MARGIN = 8.0


@dataclass(frozen=True)
class Agreement:
    """How an output compares with its reference; ``reason`` is empty exactly when they agree."""

    error: float  # ||out - ref|| / ||ref||
    worst_element: float  # max |out - ref| / (|ref| + rms(ref))
    tolerance: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason or f"error {self.error:.1e} (tolerance {self.tolerance:.1e})"


def agreement(out: Tensor, reference: Tensor, tolerance: float) -> Agreement:
    """Compare ``out`` with the float64 ``reference`` of the same shape: the relative norm of the error within
    ``tolerance``, the worst element within 8 of it.

    Never raises for a wrong output: the returned reason names the shape, the NaNs, or the error and its bound. A
    reference of zeros checks nothing, so it does not agree with anything.
    """
    nan = float("nan")
    if out.shape != reference.shape:
        return Agreement(
            nan, nan, tolerance, f"shape {tuple(out.shape)}, the oracle's shape is {tuple(reference.shape)}"
        )
    if reference.numel() == 0:
        return Agreement(0.0, 0.0, tolerance)
    ref = reference.detach().to(torch.float64)
    result = out.detach().to(device=ref.device, dtype=torch.float64)
    rms = ref.square().mean().sqrt()
    if not torch.isfinite(rms):
        return Agreement(nan, nan, tolerance, "the oracle's own output is not finite")
    if rms == 0:
        return Agreement(nan, nan, tolerance, "the oracle's output is all zeros: it checks nothing")
    wrong = int((~torch.isfinite(result)).sum())
    if wrong:
        return Agreement(nan, nan, tolerance, f"{wrong} of {result.numel()} outputs are NaN or infinite")
    difference = (result - ref).abs()
    error = float(difference.square().mean().sqrt() / rms)
    worst = float((difference / (ref.abs() + rms)).max())
    reason = ""
    if error > tolerance:
        reason = f"relative error {error:.1e} against the oracle, tolerance {tolerance:.1e}"
    elif worst > _ELEMENT_MARGIN * tolerance:
        reason = f"one output is off by {worst:.1e} of its size, tolerance {_ELEMENT_MARGIN * tolerance:.1e}"
    return Agreement(error, worst, tolerance, reason)


def sample_rows(n: int, count: int) -> list[int]:
    """Choose ``count`` of ``n`` rows to compare where the full check would dominate: the first and the last ones, where
    kernels go wrong.
    """
    if count >= n:
        return list(range(n))
    head = (count + 1) // 2
    return [*range(head), *range(n - (count - head), n)]
