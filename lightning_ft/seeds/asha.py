"""Asynchronous successive halving, by Optuna's own pruner: each run is judged among those that came as far before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_ft.functional.seed_pruning import rung_step

if TYPE_CHECKING:
    from lightning_ft.seeds.board import Board, Claim


def goes_on(claim: Claim, score: float, step: int, horizon: int) -> bool:
    """Whether a run is among the best 1/η of those that reached this rung so far.

    The pruner's resource is ηⁱ at the i-th rung: steps are rounded, and it would miss a rung that lies one step before.

    Args:
        claim: The run.
        score: Its score now.
        step: Where it stands.
        horizon: T.

    Reference:
        Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning".
    """
    from optuna.pruners import SuccessiveHalvingPruner

    settings = claim.board.settings
    passed = sum(step >= rung_step(horizon, at) for at in settings.rungs)
    _take_over(claim, passed - 1)
    claim.trial.report(score, settings.reduction ** (passed - 1))
    pruner = SuccessiveHalvingPruner(min_resource=1, reduction_factor=settings.reduction)
    trial = claim.board.storage.get_trial(claim.trial._trial_id)
    return not pruner.prune(_Living(claim.board), trial)  # type: ignore[arg-type]


def _take_over(claim: Claim, passed: int) -> None:
    """The rungs that earlier attempts passed before the checkpoint from which this one went on."""
    storage, trial = claim.board.storage, claim.trial._trial_id
    for earlier in claim.cells.attempts[claim.cell.run, claim.cell.phase]:
        for rung in range(passed):
            if (value := earlier.system_attrs.get(name := f"completed_rung_{rung}")) is not None:  # the pruner's name
                storage.set_trial_system_attr(trial, name, value)


class _Living:
    """A study without the attempts that died: their runs are judged by the attempts that followed."""

    def __init__(self, board: Board) -> None:
        self._storage = board.storage
        self._board = board
        self.direction = board.study.direction

    def get_trials(self, deepcopy: bool = False) -> list[Any]:
        """Trials that compete."""
        return [trial for trial in self._board.trials() if trial.state.name != "FAIL"]
