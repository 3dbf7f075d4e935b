from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_ft.core.plateau import Plateau, PlateauWatch


def over_after(plateau: Plateau, values: list[float]) -> int | None:
    watch = PlateauWatch(plateau)
    for count, value in enumerate(values, 1):
        watch.improves(value)
        if watch.over:
            return count
    return None


@pytest.mark.parametrize(
    ("plateau", "values", "count"),
    [
        (Plateau(), [3, 2, 1, 1], 4),
        (Plateau(), [3, 2, 1], None),
        (Plateau(patience=2), [3, 4, 2, 3, 3], 5),
        (Plateau(mode="max"), [1, 2, 2], 3),
        (Plateau(min_delta=0.5), [3, 2.5], 2),
        (Plateau(min_delta=0.5), [3, 2.4, 1.8], None),
        # Small steps add up against the best value, not against the last one.
        (Plateau(min_delta=0.5, patience=3), [3, 2.7, 2.4, 2.1], None),
        (Plateau(patience=2), [math.nan, math.nan], 2),
        (Plateau(), [math.inf, math.inf], 2),
    ],
)
def test_is_over_after(plateau: Plateau, values: list[float], count: int | None) -> None:
    assert over_after(plateau, values) == count


def test_goes_on_from_its_state() -> None:
    watch = PlateauWatch(Plateau(patience=2))
    watch.improves(1.0)
    watch.improves(2.0)
    other = PlateauWatch(Plateau(patience=2))
    other.load_state_dict(watch.state_dict())
    assert not other.improves(1.5)
    assert other.over


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "best"}, "mode='best' must be 'min' or 'max'"),
        ({"patience": 0}, "patience=0 must be a whole number of validations"),
        ({"patience": 1.5}, "patience=1.5 must be a whole number of validations"),
        ({"min_delta": -0.1}, "min_delta=-0.1 must be 0 or more"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plateau(**arguments)


def test_says_what_it_waits_for() -> None:
    assert str(Plateau("val_f1")) == "after a validation without a better val_f1"
    assert str(Plateau(patience=3)) == "after 3 validations without a better val_loss"
