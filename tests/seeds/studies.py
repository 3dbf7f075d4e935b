"""Studies of seeds as an engine would leave them, for tests of what reads them. Their scores mean nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from lightning_ft.seeds.record import Evaluation, SeedRun, SeedStudy

HOSTILE = '<script>alert("x")</script>&<b>'


def study(scores: dict[tuple[int, int], float], *, keep: int = 2, mode: Literal["max", "min"] = "max") -> SeedStudy:
    """A study of 40 steps, ranked after 10, that is over.

    Args:
        scores: At the rung, by seeds of initialisation and order. The kept runs end 0.1 better.
        keep: How many were finished.
        mode: Whether high or low scores are good.
    """
    sign = 1 if mode == "max" else -1
    order = sorted(range(len(scores)), key=lambda i: -sign * list(scores.values())[i])
    runs = []
    for number, ((init, data), score) in enumerate(scores.items()):
        run = SeedRun(number, init, data, number, "stopped", (at(5, score - 0.1 * sign), at(10, score)), 10, 1.5)
        if number in order[:keep]:
            ends = (*run.evaluations, at(20, score + 0.05 * sign), at(40, score + 0.1 * sign))
            run = replace(run, state="finished", evaluations=ends, steps=40)
        runs.append(run)
    runs[order[0]] = replace(runs[order[0]], test=0.123456)
    return SeedStudy("toy", "val_accuracy", mode, 40, 0.25, keep, runs=tuple(runs), chosen=order[0])


def at(step: int, score: float) -> Evaluation:
    """An evaluation."""
    return Evaluation(step, score, 1.0 - score)


def grid(inits: int = 3, orders: int = 2, **settings: Any) -> SeedStudy:
    """A study of a grid of seeds."""
    return study(
        {(i, j): 0.5 + 0.07 * i - 0.02 * j + 0.01 * (i * j % 2) for i in range(inits) for j in range(orders)},
        **settings,
    )


def with_bad(good: SeedStudy) -> SeedStudy:
    """Its first three runs collapsed, diverged and failed."""
    bad = [
        replace(run, state=state, evaluations=evaluations, steps=10, reason=reason)
        for run, (state, evaluations, reason) in zip(
            good.runs[:3],
            [
                ("collapsed", (at(10, 0.2),), "score 0.2 is that of the commonest class"),
                ("collapsed", (Evaluation(10, float("nan"), float("nan")),), "loss is nan"),
                ("failed", (), "OutOfMemoryError"),
            ],
            strict=True,
        )
    ]
    return replace(good, runs=(*bad, *good.runs[3:]), chance=0.2)


def unfinished(good: SeedStudy) -> SeedStudy:
    """Half way through phase 1: one run at the rung, one running, the others waiting."""
    first, second, *others = good.runs
    runs = (
        replace(first, state="at rung", evaluations=first.evaluations[:2], steps=10, test=None),
        replace(second, state="running", evaluations=second.evaluations[:1], steps=7, worker="host-1", test=None),
        *(replace(run, state="waiting", evaluations=(), steps=0, seconds=0.0, test=None) for run in others),
    )
    return replace(good, runs=runs, chosen=None)


def all_collapsed(good: SeedStudy) -> SeedStudy:
    """None learned anything, some have no score."""
    runs = tuple(
        replace(run, state="collapsed", evaluations=(at(10, float("nan") if run.number % 2 else 0.2),), test=None)
        for run in good.runs
    )
    return replace(good, runs=runs, chosen=None)
