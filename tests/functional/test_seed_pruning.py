"""The published rule, its cost, and the ranking at the rung."""

from __future__ import annotations

import math
import random

import pytest

from lightning_ft.functional.seed_pruning import Judged, best_first, budget, collapsed, cost, rank, rung_step


def test_published_numbers() -> None:
    assert cost(40, 0.25, 10) == 17.5
    assert budget(10, 0.25) == (25, 5)
    assert cost(25, 0.25, 5) == 10


@pytest.mark.parametrize("full_runs", [1, 2, 3, 7, 10, 30])
@pytest.mark.parametrize("f", [0.1, 0.2, 0.25, 0.3, 0.5])
def test_a_budget_is_spent_and_never_exceeded(full_runs: int, f: float) -> None:
    t, p = budget(full_runs, f)
    assert p == math.ceil(full_runs / 2)
    assert t >= p
    assert cost(t, f, p) <= full_runs + 1e-9 < cost(t + 1, f, p) + 2e-9


@pytest.mark.parametrize(("arguments", "message"), [((0, 0.25), "full_runs=0 must be 1"), ((4, 1.0), "f=1.0 must be")])
def test_a_budget_that_buys_nothing_is_refused(arguments: tuple[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget(*arguments)


@pytest.mark.parametrize(("horizon", "f", "step"), [(100, 0.07, 7), (30, 0.1, 3), (10, 0.25, 3), (8, 0.25, 2)])
def test_the_rung_is_rounded_up_and_no_further(horizon: int, f: float, step: int) -> None:
    assert rung_step(horizon, f) == step


def test_exactly_the_best_are_kept_in_either_mode() -> None:
    generator = random.Random(0)
    scores = {n: generator.random() for n in range(40)}
    runs = {n: Judged(s, 1 - s) for n, s in scores.items()}
    top = sorted(scores, key=scores.__getitem__, reverse=True)
    ranking = rank(runs, 10)
    assert ranking.kept == tuple(top[:10])
    assert ranking.stopped == tuple(top[10:])
    assert rank(runs, 10, mode="min").kept == tuple(top[::-1][:10])


def test_ties_go_to_the_lower_loss_then_to_the_lower_number() -> None:
    runs = {0: Judged(0.7, 0.5), 1: Judged(0.7, 0.4), 2: Judged(0.7, 0.5), 3: Judged(0.8, 0.9)}
    assert rank(runs, 3).kept == (3, 1, 0)
    assert best_first(runs, "min") == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (Judged(math.nan, 0.5), "score is nan"),
        (Judged(0.7, math.inf), "loss is inf"),
        (Judged(0.53, 0.4), "score 0.53 is that of always answering the commonest class"),
        (Judged(0.31, 0.9), "score 0.31 is that of always answering one class"),
        (Judged(0.47, 0.6935), "loss 0.6935 is that of chance, ln 2 = 0.6931"),
        (Judged(0.54, 0.6931), None),  # it beats chance
        (Judged(0.47, 0.72), None),  # bad, and ranked
    ],
)
def test_failed_runs_are_told_in_words(run: Judged, reason: str | None) -> None:
    assert collapsed(run, chance=0.53, constants=(0.31, 0.2), classes=2) == reason


def test_chance_is_above_where_low_is_good() -> None:
    assert collapsed(Judged(0.4, math.log(3)), chance=0.6, classes=3, mode="min") is None
    assert "ln 3" in str(collapsed(Judged(0.7, math.log(3)), chance=0.6, classes=3, mode="min"))


def test_a_collapsed_run_is_dropped_though_others_score_less() -> None:
    runs = {0: Judged(0.53, 0.69), 1: Judged(0.5, 0.8), 2: Judged(math.nan, 0.1), 3: Judged(0.6, 0.6)}
    ranking = rank(runs, 3, chance=0.53)
    assert ranking.kept == (3, 1)
    assert ranking.stopped == ()
    assert ranking.collapsed.keys() == {0, 2}


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match="keep=0 must be 1 or more"):
        rank({}, 0)
