from __future__ import annotations

from typing import Any

import pytest

from lightning_ft.core.schedule import Duration, Progress


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("500 steps", Duration(500, "steps")),
        ("1 step", Duration(1, "steps")),
        ("1e3steps", Duration(1000, "steps")),
        (" 2  epochs ", Duration(2, "epochs")),
        ("0.5 epoch", Duration(0.5, "epochs")),
        (0.1, Duration(0.1, "fraction")),
    ],
)
def test_parses_what_a_person_writes(text: Any, duration: Duration) -> None:
    assert Duration.parse(text, "every") == duration


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "every=3 has no unit: write a fraction of training"),
        *(
            (v, "is not a stretch of training: write")
            for v in ("3", "", "-1 steps", "0 epochs", "1.5 steps", "2 hours")
        ),
        *((v, "is not a stretch of training: write") for v in (0.0, 1.0, -0.1, float("nan"), True, None)),
    ],
)
def test_refuses_the_rest(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Duration.parse(value, "every")


@pytest.mark.parametrize(
    ("duration", "progress", "count"),
    [
        ("5 steps", Progress(4, 0, 0), 0),
        ("5 steps", Progress(5, 0, 0), 1),
        ("5 steps", Progress(14, 0, 0), 2),
        ("2 epochs", Progress(0, 1.999, 0), 0),
        ("2 epochs", Progress(0, 4.0, 0), 2),
        (0.25, Progress(0, 0, 0.75), 3),
        (0.25, Progress(0, 0, 1.0), 4),
    ],
)
def test_counts_whole_stretches(duration: Any, progress: Progress, count: int) -> None:
    assert Duration.parse(duration, "every").count(progress) == count


def test_counts_quotients_as_a_person_does() -> None:
    """0.3 / 0.1 is 2.999… in binary."""
    for parts in range(2, 50):
        counts = [Duration(1 / parts, "fraction").count(Progress(0, 0, i / parts)) for i in range(parts)]
        assert counts == list(range(parts))
        counts = [Duration.parse("0.1 epochs", "every").count(Progress(0, i / 10, None)) for i in range(parts)]
        assert counts == list(range(parts))


def test_refuses_a_fraction_of_endless_training() -> None:
    with pytest.raises(ValueError, match=r"0\.1 is a fraction of a training that has no end: set Trainer\(max_epochs"):
        Duration(0.1, "fraction").count(Progress(3, 0.2, None))


@pytest.mark.parametrize(
    ("value", "steps", "text"),
    [("7 steps", 7, "7 steps"), ("0.5 epochs", 5, "0.5 epochs"), (0.1, 4, "0.1 of training")],
)
def test_in_optimiser_steps(value: Any, steps: float, text: str) -> None:
    duration = Duration.parse(value, "every")
    assert duration.steps(steps_per_epoch=10, total_steps=40) == steps
    assert str(duration) == text


def test_shares_of_what_has_passed() -> None:
    passed = Progress(7, 2.5, 0.25).since(Progress(4, 2.0, 0.125))
    assert passed == Progress(3, 0.5, 0.125)
    assert Duration(4, "steps").share(passed) == 0.75
    assert Duration(2, "epochs").share(passed) == 0.25
    assert Duration(0.5, "fraction").share(passed) == 0.25
    assert Progress(7, 2.5, None).since(Progress(4, 2.0, None)).fraction is None


def test_multiples() -> None:
    assert Duration(0.4, "fraction").times(3).count(Progress(9, 9, 1.0)) == 0
    assert [Duration(0.1, "fraction").times(k).count(Progress(0, 0, k / 10)) for k in range(1, 10)] == [1] * 9
