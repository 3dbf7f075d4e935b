"""Phases of a training: what trains in each, from when on, and at which rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import nan

from lightning_ft.core.schedule import Duration, Progress


@dataclass(frozen=True)
class Phase:
    """One phase, as a person writes it.

    Args:
        train: The groups that train, as :meth:`~lightning_ft.core.LayerGroups.select` reads them: ``"head"``,
            ``"top:2"``, ``"block.2..block.5"``, a regular expression, or a list of these.
        at: When it begins: a fraction of training (``0.3``), ``"500 steps"`` (optimiser steps), ``"1 epoch"``. None for
            the first phase, which begins at the start, and for all where another *when* decides.
        lr: Factor on every learning rate in this phase.
        warmup: Length of a linear rise of that factor from 0, from the phase's beginning.

    Raises:
        ValueError: A time cannot be read, or ``lr`` is not positive.

    Example:
        >>> Phase("top:2", at="1 epoch", lr=0.5, warmup="100 steps").stage(("block.2", "block.3"))
        Stage(groups=('block.2', 'block.3'), begins=Duration(amount=1.0, unit='epochs'), lr=0.5, \
warmup=Duration(amount=100.0, unit='steps'))
    """

    train: str | Sequence[str]
    at: float | str | None = None
    lr: float = 1.0
    warmup: float | str | None = None

    def __post_init__(self) -> None:
        self.stage(())
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr!r} must be positive: it is the factor on the learning rates of this phase")

    def stage(self, groups: tuple[str, ...]) -> Stage:
        """This phase for a model in which ``train`` speaks of ``groups``."""
        begins = None if self.at is None else Duration.parse(self.at, "at")
        return Stage(groups, begins, self.lr, None if self.warmup is None else Duration.parse(self.warmup, "warmup"))


@dataclass(frozen=True)
class Stage:
    """One phase of a given model.

    Args:
        groups: Names of the groups that train, bottom to top.
        begins: When, counted from the start of training. None for the first, and where a metric decides.
        lr: Factor on every learning rate.
        warmup: Length of the rise of that factor from 0.
    """

    groups: tuple[str, ...]
    begins: Duration | None = None
    lr: float = 1.0
    warmup: Duration | None = None

    def factor(self, passed: Progress) -> float:
        """The factor on the learning rates, ``passed`` being the time since the stage began.

        Example:
            >>> stage = Stage(("head",), lr=0.5, warmup=Duration(4, "steps"))
            >>> [stage.factor(Progress(step, 0.0, None)) for step in (0, 1, 4, 9)]
            [0.0, 0.125, 0.5, 0.5]
        """
        return self.lr if self.warmup is None else self.lr * min(1.0, self.warmup.share(passed))


def check_phases(phases: Sequence[Phase]) -> None:
    """Refuse phases that cannot follow one another.

    Raises:
        ValueError: There is none, the first has a time, some others have and some have not, or the times do not grow.
    """
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"phases={phases!r} must be a list of one Phase(train=..., at=...) or more")
    first, *rest = (phase.at for phase in phases)
    if first is not None:
        raise ValueError(f"phases[0] begins at the start of training: leave out its at={first!r}")
    if any(at is None for at in rest) and any(at is not None for at in rest):
        raise ValueError("phases: give at= to all of them but the first, or to none, and every= decides")
    check_order([phase.stage(()) for phase in phases], steps_per_epoch=nan, total_steps=nan)


def one_after_the_other(stages: Sequence[Stage], every: Duration) -> list[Stage]:
    """The stages with a time each: the n-th begins after n times ``every``."""
    return [replace(stage, begins=every.times(i) if i else None) for i, stage in enumerate(stages)]


def due_stage(stages: Sequence[Stage], progress: Progress) -> int:
    """Number of the last stage whose time has come."""
    return max(i for i, s in enumerate(stages) if i == 0 or (s.begins is not None and s.begins.count(progress) >= 1))


def check_order(stages: Sequence[Stage], *, steps_per_epoch: float, total_steps: float) -> None:
    """Refuse stages that do not begin one after the other. Lengths that are not known are nan.

    Raises:
        ValueError: A stage begins no later than one before it.
    """
    times = [stage.begins for stage in stages if stage.begins is not None]
    # All pairs: between two of one unit there may be one of another, whose place is not known yet.
    for one, other in combinations(times, 2):
        if one.unit == other.unit:
            late = one.amount < other.amount
        else:
            early, after = (t.steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps) for t in (one, other))
            late = not after <= early
        if not late:
            raise ValueError(
                f"phases must begin one after the other, and one at {one} is followed by one at {other}: let at= grow"
            )
