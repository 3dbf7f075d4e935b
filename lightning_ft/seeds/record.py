"""What a study of seeds found so far, as plain data: what its engine writes and its report reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_ft.core.files import atomic_file

State = Literal["waiting", "running", "at rung", "stopped", "collapsed", "finished", "failed"]
"""Waiting for a worker; training; ranked next; lost at the rung; dropped there as a failed run; done; raised."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the dev set, after ``step`` optimiser steps."""

    step: int
    score: float
    loss: float


@dataclass(frozen=True)
class SeedRun:
    """One run.

    Args:
        number: From 0.
        init: Seed of the head's weights.
        order: Seed of the order of the data.
        dropout: Seed of dropout.
        state: Where it stands.
        evaluations: In order of steps.
        steps: Optimiser steps that were spent on it, those that a killed worker lost included.
        seconds: Time of training.
        reason: Why it collapsed or failed, in words.
        worker: Who trains it now, or did last.
        test: Score on the test set, of the chosen run alone.
        checkpoint: Its checkpoint, while there is one.
    """

    number: int
    init: int
    order: int
    dropout: int
    state: State = "waiting"
    evaluations: tuple[Evaluation, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    reason: str | None = None
    worker: str | None = None
    test: float | None = None
    checkpoint: str | None = None

    @property
    def last(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None


@dataclass(frozen=True)
class SeedStudy:
    """A whole study.

    Args:
        name: Of the study.
        metric: The logged value that ranks, such as ``"val_accuracy"``.
        mode: Whether the metric is best high or low.
        horizon: T, optimiser steps of a full run.
        stop_at: f, the fraction of T after which runs are ranked, or first judged.
        keep: p, how many are finished.
        rule: ``"rung"`` (all are ranked together) or ``"asha"``.
        chance: The score of a run that always answers the commonest class, where it is known.
        runs: In order of their numbers.
        chosen: Number of the run with the best last evaluation among the finished; None while there is none.
        settings: What else the study is told by, plain: configuration, threads, seeds.
        later: The further fractions at which ASHA judges.
        reduction: η of ASHA: one run of so many goes on; None for ``"rung"``.
    """

    name: str
    metric: str
    mode: Literal["max", "min"]
    horizon: int
    stop_at: float
    keep: int
    rule: Literal["rung", "asha"] = "rung"
    chance: float | None = None
    runs: tuple[SeedRun, ...] = ()
    chosen: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    later: tuple[float, ...] = ()
    reduction: int | None = None

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with atomic_file(path) as file:
            file.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SeedStudy:
        """Read what :meth:`save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple(
            SeedRun(**{**run, "evaluations": tuple(Evaluation(**one) for one in run["evaluations"])})
            for run in data.pop("runs")
        )
        return cls(runs=runs, later=tuple(data.pop("later", ())), **data)
