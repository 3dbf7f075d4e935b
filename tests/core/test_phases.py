from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_ft.core.phases import Phase, Stage, check_order, due_stage
from lightning_ft.core.schedule import Duration, Progress

STAGES = [Stage(("c",)), Stage(("b",), Duration(3, "steps")), Stage(("a",), Duration(0.5, "fraction"))]


@pytest.mark.parametrize(
    ("progress", "due"),
    [
        (Progress(0, 0, 0.0), 0),
        (Progress(2, 0, 0.2), 0),
        (Progress(3, 0, 0.3), 1),
        (Progress(5, 0, 0.5), 2),
        (Progress(1, 0, 0.9), 2),
    ],
)
def test_the_last_stage_whose_time_has_come(progress: Progress, due: int) -> None:
    assert due_stage(STAGES, progress) == due


def test_stages_without_a_time_are_never_due() -> None:
    assert due_stage([Stage(("c",)), Stage(("b",))], Progress(99, 99, 1.0)) == 0


def test_factor_rises_from_zero_and_stays() -> None:
    stage = Stage(("a",), lr=0.4, warmup=Duration(0.2, "fraction"))
    factors = [stage.factor(Progress(0, 0, share)) for share in (0.0, 0.05, 0.2, 0.7)]
    assert factors == pytest.approx([0.0, 0.1, 0.4, 0.4])
    assert Stage(("a",), lr=0.4).factor(Progress(0, 0, None)) == 0.4


def test_order_across_units_where_lengths_are_known() -> None:
    check_order(STAGES, steps_per_epoch=10, total_steps=10)
    check_order(STAGES, steps_per_epoch=math.nan, total_steps=math.nan)
    check_order(STAGES, steps_per_epoch=10, total_steps=math.inf)
    with pytest.raises(ValueError, match=r"one at 3 steps is followed by one at 0\.5 of training: let at= grow"):
        check_order(STAGES, steps_per_epoch=6, total_steps=6)


def test_stages_of_one_unit_are_compared_across_those_of_another() -> None:
    """The length of an epoch is not known, and one in epochs stands between them."""
    stages = [Stage(("c",)), *(Stage(("b",), Duration.parse(at, "at")) for at in ("6 steps", "1 epoch", "5 steps"))]
    with pytest.raises(ValueError, match="one at 6 steps is followed by one at 5 steps: let at= grow"):
        check_order(stages, steps_per_epoch=math.nan, total_steps=math.nan)
    check_order([*stages[:3], Stage(("a",), Duration(7, "steps"))], steps_per_epoch=math.nan, total_steps=math.nan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": 1}, "at=1 has no unit"),
        ({"at": "soon"}, "at='soon' is not a stretch of training"),
        ({"warmup": 5}, "warmup=5 has no unit"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": math.nan}, "lr=nan must be positive"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase("head", **arguments)
