"""The tolerance table passes right results of every dtype and fails wrong ones."""

import pytest
import torch

from structlayers.tolerances import model_tolerance, tolerance


def _relative_error(dtype: torch.dtype, length: int, n_factors: int) -> float:
    """Error of a product of random square matrices in ``dtype`` against float64 on the same numbers."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(32, length, generator=generator, dtype=torch.float64).to(dtype)
    weights = [
        (torch.randn(length, length, generator=generator, dtype=torch.float64) / length**0.5).to(dtype)
        for _ in range(n_factors)
    ]
    out, ref = x, x.double()
    for weight in weights:
        out, ref = out @ weight.T, ref @ weight.double().T
    return float((out.double() - ref).norm() / ref.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "n_factors"), [(1, 1), (3, 2), (64, 1), (512, 1), (128, 4)])
def test_right_products_pass_with_room(dtype, length, n_factors):
    assert _relative_error(dtype, length, n_factors) <= 0.6 * tolerance(dtype, length, n_factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_arithmetic_of_the_next_coarser_format_fails(dtype):
    # TF32 in place of float32, bfloat16 in place of float16, and 1/32 of the outputs wrong in place of bfloat16.
    wrong = {torch.float32: 3e-4, torch.float16: 4e-3, torch.bfloat16: (2 / 32) ** 0.5}[dtype]
    assert tolerance(dtype, 4096, 1) < wrong


def test_tolerance_grows_with_length_and_factors():
    assert tolerance(torch.float32, 100) < tolerance(torch.float32, 10_000)
    assert tolerance(torch.float32, 100, 3) == pytest.approx(3 * tolerance(torch.float32, 100))


def test_tf32_is_allowed_only_when_it_was_asked_for():
    assert tolerance(torch.float32, 64) < 1e-4 < tolerance(torch.float32, 64, float32_precision="high")
    assert tolerance(torch.float64, 64, float32_precision="high") == tolerance(torch.float64, 64)


def test_model_tolerance_adds_in_squares_up_to_a_ceiling():
    assert model_tolerance(1e-3, 16) == pytest.approx(4e-3)
    assert model_tolerance(0.02, 10_000) == 0.2


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: tolerance(torch.int32, 4), "torch.int32"),
        (lambda: tolerance(torch.float32, 0), "reduction_length = 0"),
        (lambda: tolerance(torch.float32, 4, 0), "n_factors = 0"),
        (lambda: tolerance(torch.float32, 4, float32_precision="low"), "'low'"),
        (lambda: model_tolerance(1e-3, 0), "n_layers"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
