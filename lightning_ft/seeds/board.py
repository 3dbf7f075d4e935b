"""The study as all workers share it: who trains what, and what was found; on Optuna's storage."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_ft.seeds.cells import Cell, Cells, SeedSettings
from lightning_ft.seeds.record import Evaluation

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

_SURPLUS = "surplus"


class Board:
    """A study in a storage. Each change is one operation of the storage, atomic in a journal and in a database.

    A cell (a run, a phase of it, an attempt) is a trial of Optuna that was enqueued. To claim it is to turn it from
    WAITING to RUNNING, which succeeds for one worker alone. To take it over is to turn it from RUNNING to FAIL, which
    excludes that its late owner ever completes it: only then the next attempt is enqueued. So no phase of a run is told
    twice. What is decided once for all is a finished trial of its own: the first one counts.

    Args:
        storage: See :func:`~lightning_ft.seeds.storage.open_storage`.
        name: Of the study, made when there is none.
        settings: What the study is told; None to take those of a study that is there.

    Raises:
        ValueError: The study has other settings.
        KeyError: There is no such study, and no settings were given.
    """

    def __init__(self, storage: BaseStorage, name: str, settings: SeedSettings | None = None) -> None:
        import optuna

        self.storage = storage
        self.name = name
        with _quiet():
            if settings is None:
                self.study = optuna.load_study(study_name=name, storage=storage)
            else:
                self.study = optuna.create_study(
                    study_name=name,
                    storage=storage,
                    direction="maximize" if settings.mode == "max" else "minimize",
                    sampler=optuna.samplers.RandomSampler(),  # nothing is sampled
                    load_if_exists=True,
                )
        self.settings = self._agree(settings)

    def _agree(self, settings: SeedSettings | None) -> SeedSettings:
        mine = None if settings is None else json.loads(json.dumps(asdict(settings)))
        if mine is None:
            agreed = self.cells().decided.get("settings")
            if agreed is None:
                raise KeyError(f"there is no study of seeds named {self.name!r} in this storage")
        else:
            agreed = self.decide("settings", mine)
        if mine is not None and mine != agreed:
            told = {**mine, **mine.pop("told")}
            known = {**agreed, **agreed["told"]}
            other = [
                f"{name}={known.get(name)!r} (now {told.get(name)!r})"
                for name in sorted({*told, *known} - {"told"})
                if known.get(name) != told.get(name)
            ]
            raise ValueError(
                f"study {self.name!r} was begun with other settings: {', '.join(other)}. Give the same ones to go on "
                "with it, or another --study and --out"
            )
        return SeedSettings(**agreed)

    # ---- reading

    def trials(self) -> list[FrozenTrial]:
        """All trials, as they stand now."""
        return self.study.get_trials(deepcopy=False)

    def cells(self) -> Cells:
        """The study as it stands now."""
        return Cells(self.trials())

    # ---- changing

    def decide(self, name: str, value: Any) -> Any:
        """Decide something once for all; what an earlier worker decided counts."""
        from optuna.trial import TrialState, create_trial

        if (known := self.cells().decided.get(name)) is None:
            trial = create_trial(state=TrialState.FAIL, user_attrs={"decision": name, "value": value})
            self.study.add_trial(trial)
            known = self.cells().decided[name]
        return known

    def enqueue(self, cells: Sequence[Cell]) -> None:
        """Put cells up for workers."""
        for cell in cells:
            init, order, dropout = self.settings.seeds(cell.run)
            seeds = {"init": init, "order": order, "dropout": dropout}
            with _quiet():
                self.study.enqueue_trial({}, user_attrs={**asdict(cell), **seeds})

    def claim(self, worker: str) -> Claim | None:
        """A cell that is this worker's alone; None if another worker was faster. Call where something waits."""
        with _quiet():
            trial = self.study.ask()
        cell, cells = Cell.of(trial), self.cells()  # type: ignore[arg-type]
        if cell is None or trial.number not in cells.numbers:
            # Another worker was faster, or enqueued the same: Optuna made up a trial, or this one is its double.
            trial.set_user_attr(_SURPLUS, True)
            self.fail(trial)
            return None
        trial.set_user_attr("worker", worker)
        return Claim(self, trial, cell, cells)

    def fail(self, trial: Trial | FrozenTrial, error: str | None = None) -> bool:
        """End a trial without a result; whether it was still open. Without an error its cell is tried again."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            if error is not None:
                self.storage.set_trial_user_attr(trial._trial_id, "error", error)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        return True


class Claim:
    """A cell in a worker's hands. Whatever it says is refused once another one has taken the cell over.

    Args:
        board: The study.
        trial: The trial, which runs.
        cell: The cell.
        cells: The study, as it was then.
    """

    def __init__(self, board: Board, trial: Trial, cell: Cell, cells: Cells) -> None:
        self.board = board
        self.trial = trial
        self.cell = cell
        self.cells = cells

    def note(self, **values: Any) -> bool:
        """Write something down; False if the cell was taken over."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            for name, value in values.items():
                self.board.storage.set_trial_user_attr(self.trial._trial_id, name, value)
        except UpdateFinishedTrialError:
            return False
        return True

    def tell(self, evaluations: Sequence[Evaluation], facts: Mapping[str, Any], **more: Any) -> bool:
        """The result, once for all; False if the cell was taken over.

        A score that is no finite number, which Optuna would refuse, and a run that was stopped are told as pruned.
        """
        if not self.note(evaluations=rows(evaluations), facts=dict(facts), **more):
            return False
        return self.tell_score(math.nan if "stopped" in more else evaluations[-1].score)

    def tell_score(self, score: float) -> bool:
        """A score alone; False if the cell was taken over."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        state, values = (TrialState.COMPLETE, [score]) if math.isfinite(score) else (TrialState.PRUNED, None)
        try:
            self.board.storage.set_trial_state_values(self.trial._trial_id, state, values)
        except UpdateFinishedTrialError:
            return False
        return True


def rows(evaluations: Sequence[Evaluation]) -> list[list[float]]:
    """Evaluations as they are stored."""
    return [[one.step, one.score, one.loss] for one in evaluations]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's news of each trial, and its warnings of what is experimental."""
    import warnings

    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
