"""What a study of seeds consists of, and what is to be done next: pure functions of its trials."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lightning_ft.functional.seed_pruning import Judged, best_first, collapsed, rank

Phase = Literal["rung", "rest", "test"]
"""To the rung (under ASHA: to the end or to where it is stopped); from there to the end; the test data."""
Fate = Literal["absent", "waiting", "running", "told", "dead", "failed"]
KNOWN = ("chance", "constants", "classes")
"""Facts by which :func:`~lightning_ft.functional.seed_pruning.collapsed` tells that a run has failed."""
ATTEMPTS = 10
"""So often is a run that took its worker down begun again."""


class TrialLike(Protocol):
    """What is read of ``optuna.trial.FrozenTrial``."""

    number: int
    state: Any
    user_attrs: dict[str, Any]
    system_attrs: dict[str, Any]


@dataclass(frozen=True)
class SeedSettings:
    """What a study is told, and what its results depend on: all who work at it must say the same.

    Args:
        runs: t, how many are started.
        keep: p, how many are finished. Under ASHA every p-th of t goes on at each rung.
        stop_at: f, the fraction of a run after which it is judged.
        metric: The logged value that ranks.
        mode: Whether it is best high or low.
        loss: The logged value that settles ties.
        rule: ``"rung"`` ranks all together; ``"asha"`` decides on each run as it comes.
        design: ``"paired"``: run i has the i-th seed of each stream. ``"grid"``: each initialisation meets each order.
        dropout: ``"own"``: a seed for each run. ``"order"``: that of the order, as in the paper.
        seed: The first seed of each stream.
        threads: Threads of a trial: two give other bits than one.
        told: What else the runs depend on, plain.
    """

    runs: int
    keep: int
    stop_at: float = 0.25
    metric: str = "val_accuracy"
    mode: Literal["max", "min"] = "max"
    loss: str = "val_loss"
    rule: Literal["rung", "asha"] = "rung"
    design: Literal["paired", "grid"] = "paired"
    dropout: Literal["own", "order"] = "own"
    seed: int = 0
    threads: int = 1
    told: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.stop_at < 1:
            raise ValueError(f"stop_at={self.stop_at!r} must be a fraction of a run in (0, 1), such as 0.25")
        if not 1 <= self.keep <= self.runs:
            raise ValueError(f"keep={self.keep!r} must lie between 1 and runs={self.runs!r}: how many are finished")
        if self.threads < 1:
            raise ValueError(f"threads={self.threads!r} must be 1 or more")

    @property
    def reduction(self) -> int:
        """η of ASHA."""
        return max(2, round(self.runs / self.keep))

    @property
    def rungs(self) -> list[float]:
        """The fractions at which a run is judged: f; under ASHA f·ηⁱ."""
        if self.rule == "rung":
            return [self.stop_at]
        count = math.ceil(math.log(1 / self.stop_at, self.reduction) - 1e-9)
        return [self.stop_at * self.reduction**i for i in range(count)]

    def seeds(self, run: int) -> tuple[int, int, int]:
        """Seeds of initialisation, order and dropout of a run.

        Example:
            >>> settings = SeedSettings(runs=6, keep=2, design="grid", dropout="order")
            >>> [settings.seeds(run) for run in range(4)]
            [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 0)]
        """
        width = math.ceil(math.sqrt(self.runs))
        init, order = (run, run) if self.design == "paired" else divmod(run, width)
        dropout = run if self.dropout == "own" else order
        return self.seed + init, self.seed + order, self.seed + dropout


@dataclass(frozen=True)
class Cell:
    """An attempt at a phase of a run."""

    run: int
    phase: Phase
    attempt: int = 0

    @classmethod
    def of(cls, trial: TrialLike) -> Cell | None:
        """The cell of a trial; None for a trial that nobody enqueued: a surplus ask, or a decision."""
        attrs = trial.user_attrs
        return cls(attrs["run"], attrs["phase"], attrs["attempt"]) if "phase" in attrs else None


class Cells:
    """The trials of a study, each cell's one.

    Two workers may enqueue the same cell at the same moment. Storages number trials in one order for all, and whoever
    sees a trial sees those before it: the first of a cell counts, the others are surplus.

    Args:
        trials: All of a study.
    """

    def __init__(self, trials: Sequence[TrialLike]) -> None:
        self.trials = trials
        self.attempts: dict[tuple[int, Phase], list[TrialLike]] = {}
        self.decided: dict[str, Any] = {}
        first: dict[Cell, TrialLike] = {}
        for trial in sorted(trials, key=lambda one: one.number):
            if "decision" in trial.user_attrs:
                self.decided.setdefault(trial.user_attrs["decision"], trial.user_attrs["value"])
            elif (cell := Cell.of(trial)) is not None:
                first.setdefault(cell, trial)
        self.numbers = {trial.number for trial in first.values()}
        for cell in sorted(first, key=lambda one: one.attempt):
            self.attempts.setdefault((cell.run, cell.phase), []).append(first[cell])

    def waiting(self) -> int:
        """How many can be claimed."""
        return sum(trial.state.name == "WAITING" for trial in self.trials)

    def last(self, run: int, phase: Phase) -> TrialLike | None:
        """The latest attempt at a phase of a run."""
        attempts = self.attempts.get((run, phase))
        return attempts[-1] if attempts else None

    def fate(self, run: int, phase: Phase) -> Fate:
        """How a phase of a run stands."""
        trial = self.last(run, phase)
        if trial is None:
            return "absent"
        state = trial.state.name
        if state == "FAIL":
            given_up = "error" in trial.user_attrs or len(self.attempts[run, phase]) >= ATTEMPTS
            return "failed" if given_up else "dead"
        fates: dict[str, Fate] = {"WAITING": "waiting", "RUNNING": "running"}
        return fates.get(state, "told")

    def attrs(self, run: int, phase: Phase) -> dict[str, Any]:
        """What the latest attempt at a phase of a run has noted."""
        trial = self.last(run, phase)
        return {} if trial is None else trial.user_attrs

    def last_evaluation(self, run: int, phase: Phase) -> Judged:
        """The last evaluation of a phase that was told."""
        _, score, loss = self.attrs(run, phase)["evaluations"][-1]
        return Judged(score, loss)

    def fact(self, name: str) -> Any:
        """What a training found out of its data (``"horizon"``, or one of :data:`KNOWN`); None before."""
        for attempts in self.attempts.values():
            for trial in attempts:
                if (found := trial.user_attrs.get("facts", {}).get(name)) is not None:
                    return found
        return None


def wanted(cells: Cells, settings: SeedSettings) -> list[tuple[int, Phase]]:
    """Phases of runs that the study needs as far as it is decided."""
    if (chosen := cells.decided.get("chosen")) is not None:
        return [(chosen["run"], "test")] if chosen["test"] else []
    if (ranking := cells.decided.get("ranking")) is not None:
        return [(run, "rest") for run in ranking["kept"]]
    return [(run, "rung") for run in range(settings.runs)]


def missing(cells: Cells, settings: SeedSettings) -> list[Cell]:
    """Cells that nobody has enqueued yet, among them successors of attempts that died."""
    found = []
    for run, phase in wanted(cells, settings):
        fate = cells.fate(run, phase)
        if fate in ("absent", "dead"):
            found.append(Cell(run, phase, len(cells.attempts.get((run, phase), []))))
    return found


def open_runs(cells: Cells, settings: SeedSettings) -> list[int]:
    """Runs that the next decision waits for."""
    return [run for run, phase in wanted(cells, settings) if cells.fate(run, phase) not in ("told", "failed")]


def ranking_of(cells: Cells, settings: SeedSettings, late: Collection[int] = ()) -> dict[str, Any]:
    """What becomes of the runs at the rung.

    Args:
        cells: The study.
        settings: Its settings.
        late: Runs that are not waited for any longer.
    """
    runs = {
        run: cells.last_evaluation(run, "rung")
        for run in range(settings.runs)
        if run not in late and cells.fate(run, "rung") == "told"
    }
    ranking = rank(runs, settings.keep, mode=settings.mode, **known(cells))
    # A mapping in JSON has names for keys.
    collapsed = [[run, reason] for run, reason in ranking.collapsed.items()]
    return {"kept": list(ranking.kept), "stopped": list(ranking.stopped), "collapsed": collapsed, "late": sorted(late)}


def known(cells: Cells) -> dict[str, Any]:
    """What is known of runs that have learned nothing."""
    return {name: fact for name in KNOWN if (fact := cells.fact(name)) is not None}


def finished(cells: Cells, settings: SeedSettings) -> list[int]:
    """Runs that came to their end and did not fail on the way, the best first."""
    phase: Phase = "rest" if settings.rule == "rung" else "rung"
    facts = known(cells)
    done = {
        run: judged
        for run in range(settings.runs)
        if cells.fate(run, phase) == "told"
        and "stopped" not in cells.attrs(run, phase)
        and collapsed(judged := cells.last_evaluation(run, phase), mode=settings.mode, **facts) is None
    }
    return list(best_first(done, settings.mode))
