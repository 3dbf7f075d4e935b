"""Start many runs, finish the best: what it costs, how many to start, and which to finish."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

_ROUNDING = 1e-9  # 0.07 * 100 is a little more than 7


@dataclass(frozen=True)
class Judged:
    """How a run stands: its *last* evaluation, not the best one so far.

    Args:
        score: The metric.
        loss: On the same rows.
    """

    score: float
    loss: float


@dataclass(frozen=True)
class Ranking:
    """What becomes of runs at the rung.

    Args:
        kept: Those that go on, best first.
        stopped: The others that learned something, best first.
        collapsed: Those that failed, with the reason.
    """

    kept: tuple[int, ...]
    stopped: tuple[int, ...]
    collapsed: Mapping[int, str]


def cost(t: int, f: float, p: int) -> float:
    """t·f + p·(1 − f): what t runs to the fraction f, of which p are finished, cost in full runs.

    Example:
        >>> cost(40, 0.25, 10)
        17.5
    """
    return t * f + p * (1 - f)


def budget(full_runs: float, f: float) -> tuple[int, int]:
    """How many runs to start (t) and to finish (p) for the cost of a number of full runs.

    p = ⌈B / 2⌉ and t = ⌊(B − p (1 − f)) / f⌋, with B the number of full runs: the setting that did best in most of the
    published experiments.

    Args:
        full_runs: B.
        f: Where runs are ranked, as a fraction of a full run.

    Raises:
        ValueError: B buys no run, or ``f`` is out of range.

    Example:
        >>> budget(10, 0.25)
        (25, 5)

    Reference:
        Dodge et al. 2020, "Fine-Tuning Pretrained Language Models: Weight Initializations, Data Orders, and Early
        Stopping".
    """
    if not 0 < f < 1:
        raise ValueError(f"f={f!r} must be a fraction of a run in (0, 1), such as 0.25")
    if not 1 <= full_runs < math.inf:
        raise ValueError(f"full_runs={full_runs!r} must be 1 or more: what the search may cost, in full runs")
    p = math.ceil(full_runs / 2 - _ROUNDING)
    return math.floor((full_runs - p * (1 - f)) / f + _ROUNDING), p


def rung_step(horizon: int, f: float) -> int:
    """⌈f·T⌉: the optimiser step, of T in all, after which a run is judged.

    Example:
        >>> rung_step(100, 0.07)
        7
    """
    return math.ceil(f * horizon - _ROUNDING)


def collapsed(
    run: Judged,
    *,
    chance: float | None = None,
    constants: Collection[float] = (),
    classes: int | None = None,
    mode: Literal["max", "min"] = "max",
    tolerance: float = 0.01,
) -> str | None:
    """Why a run has failed, in words; None for one that has learned something.

    It has failed if the score or the loss is no finite number; if the score is that of answering one class always; or
    if the loss lies at ln C, that of knowing nothing, while the score is no better than chance.

    Args:
        run: Its last evaluation.
        chance: The score of always answering the commonest class, if it is known.
        constants: Those of always answering one of the others.
        classes: C, if the task has classes.
        mode: Whether a high or a low score is good.
        tolerance: How near the loss must be to ln C, as a fraction of it.

    Example:
        >>> collapsed(Judged(score=0.53, loss=0.62), chance=0.53)
        'score 0.53 is that of always answering the commonest class'
        >>> collapsed(Judged(score=0.61, loss=0.66), chance=0.53, classes=2) is None
        True
    """
    for name, value in {"score": run.score, "loss": run.loss}.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    for constant in constants if chance is None else (chance, *constants):
        if math.isclose(run.score, constant, rel_tol=1e-5, abs_tol=1e-6):
            which = "the commonest" if constant == chance else "one"
            return f"score {run.score:.4g} is that of always answering {which} class"
    if classes is None or classes < 2 or abs(run.loss - math.log(classes)) > tolerance * math.log(classes):
        return None
    if chance is not None and (run.score > chance if mode == "max" else run.score < chance):
        return None  # whatever its loss, it answers better than chance
    return f"loss {run.loss:.4g} is that of chance, ln {classes} = {math.log(classes):.4g}"


def rank(
    runs: Mapping[int, Judged],
    keep: int,
    *,
    mode: Literal["max", "min"] = "max",
    chance: float | None = None,
    constants: Collection[float] = (),
    classes: int | None = None,
) -> Ranking:
    """Which runs to finish: the best by score, ties by the lower loss, then by number; failed ones are dropped first.

    Args:
        runs: Last evaluation by the run's number.
        keep: How many to finish at most.
        mode: Whether a high or a low score is good.
        chance: See :func:`collapsed`.
        constants: See :func:`collapsed`.
        classes: See :func:`collapsed`.

    Raises:
        ValueError: ``keep`` is less than 1.

    Example:
        >>> scores = {0: 0.5, 1: 0.7, 2: 0.7, 3: 0.6}
        >>> rank({n: Judged(s, loss=1 / (n + 1)) for n, s in scores.items()}, keep=2).kept
        (2, 1)
    """
    if keep < 1:
        raise ValueError(f"keep={keep!r} must be 1 or more: how many runs are finished")
    judge = partial(collapsed, chance=chance, constants=constants, classes=classes, mode=mode)
    reasons = {n: judge(run) for n, run in sorted(runs.items())}
    healthy = best_first({n: runs[n] for n, reason in reasons.items() if reason is None}, mode)
    failed = {n: reason for n, reason in reasons.items() if reason is not None}
    return Ranking(tuple(healthy[:keep]), tuple(healthy[keep:]), failed)


def best_first(runs: Mapping[int, Judged], mode: Literal["max", "min"]) -> Sequence[int]:
    """Numbers of runs with finite scores, the best first; ties by the lower loss, then by number."""
    sign = -1 if mode == "max" else 1
    return sorted(runs, key=lambda n: (sign * runs[n].score, runs[n].loss, n))
