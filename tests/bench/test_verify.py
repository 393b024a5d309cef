import pytest
import torch

from structlayers.bench.verify import agreement, sample_rows


@pytest.fixture
def reference():
    return torch.randn(100, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_rounding_agrees(reference):
    found = agreement(reference.to(torch.bfloat16), reference, 2.0**-7)
    assert found.agrees
    assert 0 < found.error < 2.0**-8


def test_an_error_beyond_the_tolerance_is_named(reference):
    found = agreement(reference * 1.05, reference, 0.01)
    assert not found.agrees
    assert "5.0e-02" in found.reason and "1.0e-02" in found.reason


def test_one_wrong_element_that_the_norm_hides_is_found(reference):
    wrong = reference.clone()
    wrong[-1, -1] += 1.0
    found = agreement(wrong, reference, 0.02)
    assert found.error < 0.02
    assert not found.agrees


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_disagrees(reference, value):
    wrong = reference.clone()
    wrong[3, 5] = value
    assert agreement(wrong, reference, 0.1).reason == "1 of 6400 outputs are NaN or infinite"


def test_another_shape_disagrees(reference):
    assert "(99, 64)" in agreement(reference[1:], reference, 0.1).reason


def test_a_reference_that_checks_nothing_agrees_with_nothing(reference):
    zeros = torch.zeros_like(reference)
    assert "all zeros" in agreement(zeros, zeros, 0.1).reason
    assert "not finite" in agreement(reference, reference / zeros, 0.1).reason


def test_empty_outputs_agree():
    empty = torch.empty(0, 4, dtype=torch.float64)
    assert agreement(empty, empty, 0.1).agrees


@pytest.mark.parametrize(
    ("n", "count", "rows"), [(3, 8, [0, 1, 2]), (10, 4, [0, 1, 8, 9]), (10, 5, [0, 1, 2, 8, 9]), (10, 1, [0])]
)
def test_the_first_and_last_rows_are_compared(n, count, rows):
    assert sample_rows(n, count) == rows
