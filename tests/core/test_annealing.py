from __future__ import annotations

from typing import Any

import pytest

from lightning_ft.core.annealing import Annealing


def test_closed_forms() -> None:
    assert Annealing(10, k=0.1)(1) == pytest.approx(0.2890505, abs=5e-8)
    assert Annealing(250, k=0.1)(250) == 0.5
    line = Annealing(4, curve="linear")
    assert [line(t) for t in (1, 2, 4, 9)] == [0.25, 0.5, 1, 1]
    assert [line.rest(t) for t in (1, 2, 4, 9)] == [0.75, 0.5, 0, 0]


@pytest.mark.parametrize("t", [1, 249, 260, 700, 10**6])
def test_both_parts_are_exact_far_out(t: int) -> None:
    annealing = Annealing(250, k=1.0)
    assert 0 <= annealing(t) <= 1
    assert annealing(t) + annealing.rest(t) == pytest.approx(1, abs=1e-15)
    assert Annealing(250, k=0.1).rest(650) == pytest.approx(4.248354255291589e-18, rel=1e-12)
    assert Annealing(10**6, k=1.0)(1) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t0": 0}, "t0=0 must be positive"),
        ({"t0": float("inf")}, "t0=inf must be positive and finite"),
        ({"t0": 1, "k": -1}, "k=-1 must be positive"),
        ({"t0": 1, "curve": "cosine"}, "curve='cosine' must be one of"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Annealing(**arguments)
