"""A study as it stands, as plain data: what its report reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.functional.seed_pruning import collapsed
from lightning_ft.seeds.board import Board
from lightning_ft.seeds.cells import Cells, Phase, SeedSettings, finished, known
from lightning_ft.seeds.job import checkpoint_file
from lightning_ft.seeds.record import Evaluation, SeedRun, SeedStudy, State
from lightning_ft.seeds.worker import place

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


_LATE = "it did not come to the rung in time"


def study_record(storage: BaseStorage, name: str, out: Path | None = None) -> SeedStudy:
    """What a study found so far.

    Args:
        storage: See :func:`~lightning_ft.seeds.storage.open_storage`.
        name: Of the study.
        out: Folder of its checkpoints, to say where they are.

    Raises:
        KeyError: There is no such study.
    """
    board = Board(storage, name)
    cells, settings = board.cells(), board.settings
    best = finished(cells, settings)
    return SeedStudy(
        name,
        settings.metric,
        settings.mode,
        horizon=cells.fact("horizon") or 0,
        stop_at=settings.stop_at,
        keep=settings.keep,
        rule=settings.rule,
        chance=cells.fact("chance"),
        runs=tuple(_run(run, cells, settings, out) for run in range(settings.runs)),
        chosen=best[0] if best else None,
        settings={
            **{name: getattr(settings, name) for name in ("runs", "design", "dropout", "seed", "threads", "loss")},
            **settings.told,
        },
        later=tuple(settings.rungs[1:]),
        reduction=settings.reduction if settings.rule == "asha" else None,
    )


def _run(run: int, cells: Cells, settings: SeedSettings, out: Path | None) -> SeedRun:
    phase: Phase = "rest" if cells.last(run, "rest") is not None else "rung"
    attempts = [*cells.attempts.get((run, "rung"), []), *cells.attempts.get((run, "rest"), [])]
    known: list[list[float]] = next(
        (t.user_attrs["evaluations"] for t in reversed(attempts) if "evaluations" in t.user_attrs), []
    )
    state, reason = _state(run, phase, cells, settings)
    test = cells.last(run, "test")
    file = None if out is None or not attempts else _checkpoint(out, run, cells)
    init, order, dropout = settings.seeds(run)
    return SeedRun(
        run,
        init,
        order,
        dropout,
        state=state,
        evaluations=tuple(Evaluation(int(step), score, loss) for step, score, loss in known),
        steps=sum(_spent(trial)[0] for trial in attempts),
        seconds=sum(_spent(trial)[1] for trial in attempts),
        reason=reason,
        worker=_latest(attempts, "worker"),
        test=test.value if test is not None and cells.fate(run, "test") == "told" else None,  # type: ignore[attr-defined]
        checkpoint=None if file is None else str(file),
    )


def _state(run: int, phase: Phase, cells: Cells, settings: SeedSettings) -> tuple[State, str | None]:
    attrs, fate, ranking = cells.attrs(run, phase), cells.fate(run, phase), cells.decided.get("ranking")
    if ranking is not None and run not in ranking["kept"]:
        if (reason := dict(map(tuple, ranking["collapsed"])).get(run)) is not None:
            return "collapsed", reason
        if run in ranking["stopped"]:
            return "stopped", None
        return "failed", _LATE if run in ranking["late"] else _failure(attrs, cells.attempts[run, phase])
    if fate == "told":
        if phase == "rest" or (settings.rule == "asha" and "stopped" not in attrs):
            last = cells.last_evaluation(run, phase)
            reason = collapsed(last, mode=settings.mode, **known(cells))
            return ("finished", None) if reason is None else ("collapsed", f"{reason}, in the end")
        if settings.rule == "rung":
            return ("at rung", None) if ranking is None else ("waiting", None)
        return ("collapsed", attrs["collapsed"]) if "collapsed" in attrs else ("stopped", None)
    if fate == "failed":
        return "failed", _failure(attrs, cells.attempts[run, phase])
    return ("running", None) if fate == "running" else ("waiting", None)


def _latest(attempts: Sequence[Any], name: str) -> Any:
    return next((trial.user_attrs[name] for trial in reversed(attempts) if name in trial.user_attrs), None)


def _failure(attrs: Mapping[str, Any], attempts: Sequence[Any]) -> str:
    return str(attrs.get("error", f"{len(attempts)} workers died of it"))


def _spent(trial: Any) -> tuple[int, float]:
    """Optimiser steps and seconds of an attempt, as far as it said."""
    _, step, seconds = trial.user_attrs.get("beat", (0, None, 0.0))
    return (0 if step is None else max(0, step - trial.user_attrs.get("begun_at", step))), seconds


def _checkpoint(out: Path, run: int, cells: Cells) -> Path | None:
    phases: tuple[Phase, ...] = ("rest", "rung")
    for phase in phases:
        for attempt in reversed(range(len(cells.attempts.get((run, phase), [])))):
            if (file := checkpoint_file(place(out, run, phase, attempt))).exists():
                return file
    return None
