from __future__ import annotations

import pytest

from lightning_ft.functional.bias_correction import uncorrected


@pytest.mark.parametrize(("step", "rate"), [(1, 3.1623), (12, 6.57), (100, 3.24), (1000, 1.26)])
def test_rate_factor(step: int, rate: float) -> None:
    assert uncorrected(0.9, 0.999, step).rate == pytest.approx(rate, abs=5e-3)


def test_rate_factor_peaks_at_twelve() -> None:
    assert max(range(1, 2000), key=lambda step: uncorrected(0.9, 0.999, step).rate) == 12


def test_epsilon_at_first_step() -> None:
    assert uncorrected(0.9, 0.999, 1).eps == pytest.approx(0.001**-0.5)
