"""What a worker is to train, and what the training says meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lightning_ft.seeds.cells import Phase, SeedSettings
from lightning_ft.seeds.record import Evaluation


class LeaseLostError(RuntimeError):
    """Another worker trains this run: this one was silent for too long."""


class Progress:
    """Hears how a training goes. This one does nothing, for processes that are not to speak."""

    def at(self, step: int) -> None:
        """Call before each batch, with the optimiser steps made.

        Raises:
            LeaseLostError: Another worker has taken over: stop.
        """

    def report(
        self,
        evaluations: Sequence[Evaluation],
        *,
        horizon: int,
        chance: float | None = None,
        constants: Sequence[float] = (),
        classes: int | None = None,
    ) -> None:
        """Call at the start and after each evaluation.

        Args:
            evaluations: All of the run so far, in order of steps.
            horizon: T, optimiser steps of a full run.
            chance: The score of always answering the commonest class, where it is known.
            constants: Those of always answering one of the others.
            classes: How many there are, where there are classes.
        """

    def goes_on(self, score: float, loss: float, step: int) -> bool:
        """Whether the run is worth more, under ASHA."""
        return True


@dataclass(frozen=True)
class Job:
    """A phase of a run.

    Args:
        run: Its number.
        phase: ``"rung"``: train to the first of ``at`` and stop there. ``"rest"``: go on from the checkpoint to the
            end. ``"test"``: score the checkpoint on the test data.
        init: Seed of what is drawn before the first batch: the head's weights.
        order: Seed of the order of the data.
        dropout: Seed of what is drawn in training.
        settings: Of the study.
        folder: The attempt's own, for checkpoints (``checkpoints/last.ckpt``) and logs.
        checkpoint: Where to go on from, of an earlier phase or of an attempt whose worker died; None for the start.
        progress: To be told how it goes.
    """

    run: int
    phase: Phase
    init: int
    order: int
    dropout: int
    settings: SeedSettings
    folder: Path
    checkpoint: Path | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def decide(self) -> Callable[[float, float, int], bool] | None:
        """What :class:`~lightning_ft.callbacks.seed_pruning.SeedPruning` is to decide by, at ``settings.rungs``."""
        if self.settings.rule == "asha":
            return self.progress.goes_on
        return None if self.phase == "rung" else _always


class Train(Protocol):
    """Trains a phase of a run; in processes of its own it must be picklable."""

    def __call__(self, job: Job) -> Sequence[Evaluation]:
        """Every evaluation of the run, from its first step on; the last one counts."""


class Test(Protocol):
    """Scores a finished run on the test data."""

    def __call__(self, job: Job) -> float:
        """The score."""


def _always(score: float, loss: float, step: int) -> bool:
    return True


def checkpoint_file(folder: Path) -> Path:
    """Where an attempt keeps its checkpoint."""
    return folder / "checkpoints" / "last.ckpt"
