"""The one tolerance table: how far a right result may be from the float64 oracle, by dtype and reduction length."""

import math

import torch

# Unit roundoff of the format in which every factor writes its result: half the distance between 1 and the next number.
_OUTPUT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Unit roundoff of the format in which products are summed: 16-bit inputs are accumulated in float32.
_ACCUMULATION_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-24,
}

# What float32 operands are rounded to before they are multiplied, by torch.get_float32_matmul_precision(). "medium" may
# use bfloat16.
_FLOAT32_OPERAND_ROUNDOFF = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}

# A rounded result is off by at most one roundoff. Twice that leaves room for split reductions whose partial sums are
# stored in 16 bits and for rounded intermediates, a little amplified where the next factor cancels. Random data give
# about 0.4 per factor.
_ROUNDING_MARGIN = 2.0

# The summation estimate is a root mean square over random data; outputs of a few numbers may cancel to several times
# less than their terms, and tensor cores truncate where it assumes rounding. TF32 arithmetic still fails a "highest"
# check, by a factor of 2 and more up to reduction length 16,384.
_SUMMATION_MARGIN = 8.0

# Above this relative error an output says little about its reference, so that no number of layers may widen a check
# further.
_MODEL_CEILING = 0.2


def tolerance(
    dtype: torch.dtype, reduction_length: int, n_factors: int = 1, *, float32_precision: str = "highest"
) -> float:
    """Bound the relative error ``||out - ref|| / ||ref||`` of a chain computed in ``dtype``, on the oracle's inputs.

    ``reduction_length`` is the longest sum in it (the largest ``c`` of the chain; the number of rows for a weight
    gradient), ``n_factors`` the number of products in a row, each of which rounds what it writes. ``float32_precision``
    is the setting the float32 product ran under. Raises ``ValueError`` for a dtype or setting without an entry, and for
    a length or number below 1.

    Source: rounding errors of a sum of k terms grow like sqrt(k) u, not k u, when they behave as independent (Higham
    and Mary, SISC 2019).
    """
    if dtype not in _OUTPUT_ROUNDOFF:
        raise ValueError(f"no tolerance for {dtype}; there is one for {', '.join(map(str, _OUTPUT_ROUNDOFF))}")
    if reduction_length < 1 or n_factors < 1:
        raise ValueError(
            f"reduction_length = {reduction_length}, n_factors = {n_factors}: expected numbers of at least 1"
        )
    if float32_precision not in _FLOAT32_OPERAND_ROUNDOFF:
        raise ValueError(
            f"unknown float32_precision {float32_precision!r}; known: {', '.join(_FLOAT32_OPERAND_ROUNDOFF)}"
        )
    # Rounded operands err independently in every term, which leaves the relative error of the sum at one roundoff
    # whatever its length.
    operands = _FLOAT32_OPERAND_ROUNDOFF[float32_precision] if dtype == torch.float32 else 0.0
    summation = math.sqrt(reduction_length) * _ACCUMULATION_ROUNDOFF[dtype]
    return n_factors * (_ROUNDING_MARGIN * (_OUTPUT_ROUNDOFF[dtype] + operands) + _SUMMATION_MARGIN * summation)


def model_tolerance(layer_tolerance: float, n_layers: int) -> float:
    """Bound the relative error of a whole model's output from that of its worst layer: ``sqrt(n_layers) *
    layer_tolerance``, at most 0.2.

    Normalisation and residual sums keep a relative error about as large as it entered, and the errors of different
    layers are independent, so that they add in squares. This bound is loose for deep 16-bit models (0.1 and more),
    where it would miss a small mistake in one layer; therefore every structured layer is also checked alone, on the
    input it really gets, against ``tolerance``. Raises ``ValueError`` if ``n_layers`` is below 1.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers must be at least 1, got {n_layers}")
    return min(math.sqrt(n_layers) * layer_tolerance, _MODEL_CEILING)
