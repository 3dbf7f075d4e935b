"""One worker of a study: claims what is open, trains it, tells what came out, until all is decided."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_ft.core.files import atomic_file, atomic_folder
from lightning_ft.seeds.board import Board, Claim
from lightning_ft.seeds.cells import Cells, Phase, SeedSettings, finished, missing, open_runs, ranking_of, wanted
from lightning_ft.seeds.job import Job, LeaseLostError, Test, Train, checkpoint_file
from lightning_ft.seeds.lease import Lease, Watch, name_of_worker

QUEUE = 16
"""Cells that wait to be claimed: at each look at the study a database reads all that are not finished."""


@dataclass(frozen=True)
class Patience:
    """How long a worker waits, in seconds.

    Args:
        lease: A run whose worker was silent for so long is taken over.
        barrier: Runs that have not reached the rung when none other has for so long are given up; None to wait for
            all, as long as somebody trains them.
        poll: Between two looks at the study while there is nothing to do.
    """

    lease: float = 60.0
    barrier: float | None = None
    poll: float = 1.0


def work(board: Board, train: Train, out: Path, *, test: Test | None = None, patience: Patience | None = None) -> None:
    """Work at a study until it is over, beside other workers here and on other machines.

    Args:
        board: The study.
        train: Trains a phase of a run.
        out: Folder of checkpoints; where machines share it, a run goes on on another one.
        test: Scores the chosen run on the test data, once.
        patience: How long to wait.

    Raises:
        Exception: What the training raised, while no run of the study has come to the rung: then all would raise.
    """
    patience = patience or Patience()
    watch, barrier = Watch(board, patience.lease), Barrier(patience.barrier)
    with name_of_worker(out) as me:
        while not over(cells := advance(board, barrier, tested=test is not None), board.settings):
            tidy(out, cells, board.settings)
            if watch.bury(me, cells.trials):
                continue
            if not cells.waiting():
                time.sleep(patience.poll)
            elif (claim := board.claim(me)) is not None:
                _carry_out(claim, train, test, out, patience.lease)
        tidy(out, cells, board.settings)


def over(cells: Cells, settings: SeedSettings) -> bool:
    """Whether nothing is left to do."""
    return "chosen" in cells.decided and not open_runs(cells, settings)


def advance(board: Board, barrier: Barrier, *, tested: bool) -> Cells:
    """Put up what is missing, and decide what can be decided; any worker may, and the first one counts.

    Args:
        board: The study.
        barrier: How long to wait at the rung.
        tested: Whether the chosen run is to be tested.
    """
    cells, settings = board.cells(), board.settings
    if (new := missing(cells, settings)) and (room := QUEUE - cells.waiting()) > 0:
        # All workers may stand here at once: each puts up one, so that they seldom do the same, and goes on to claim.
        board.enqueue([random.choice(new)] if cells.attempts else new[:room])
        return board.cells()
    still = open_runs(cells, settings)
    if settings.rule == "rung" and "ranking" not in cells.decided:
        late = barrier.late(settings.runs - len(still), still)
        if still == late:
            board.decide("ranking", ranking_of(cells, settings, late))
            _give_up(board)
            return advance(board, barrier, tested=tested)
    elif "chosen" not in cells.decided and not still:
        best = finished(cells, settings)
        board.decide("chosen", {"run": best[0] if best else None, "test": tested and bool(best)})
        return advance(board, barrier, tested=tested)
    return cells


def _give_up(board: Board) -> None:
    """Nobody need train what no decision waits for any longer."""
    cells = board.cells()
    needed = {trial.number for phase in wanted(cells, board.settings) if (trial := cells.last(*phase)) is not None}
    for trial in board.trials():
        if not trial.state.is_finished() and trial.number not in needed:
            board.fail(trial)


class Barrier:
    """Times how long none has come to the rung.

    Args:
        seconds: After which the missing ones are late; None for never.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self._here, self._since = -1, clock()

    def late(self, here: int, still: list[int]) -> list[int]:
        """Runs that are not waited for any longer, of those that are missing."""
        if here != self._here:
            self._here, self._since = here, self.clock()
        waited = self.seconds is not None and here > 0 and self.clock() - self._since >= self.seconds
        return still if waited else []


def _carry_out(claim: Claim, train: Train, test: Test | None, out: Path, lease: float) -> None:
    board, cell = claim.board, claim.cell
    with Lease(claim, lease) as held:
        job = job_of(board, claim, out, held)
        try:
            if cell.phase == "test":
                assert test is not None
                claim.tell_score(test(job))
                return
            try:
                evaluations = train(job)
            finally:
                held.stop()
            if not evaluations:
                raise ValueError("the training returned no evaluation: there is nothing to rank it by")
            if held.idle:
                _inherit(job)
        except LeaseLostError:
            return
        except Exception as error:
            told = any(trial.state.name in ("COMPLETE", "PRUNED") for trial in board.trials())
            # The first error is for whoever started this; when it is mended, the run is begun again.
            board.fail(claim.trial, f"{type(error).__name__}: {error}" if told else None)
            if not told:
                raise
            return
        except BaseException:  # interrupted: another worker need not wait
            board.fail(claim.trial)
            raise
        claim.tell(evaluations, held.facts, **held.ending)


def _inherit(job: Job) -> None:
    """What a training without a step of its own began from is what it ends with; earlier attempts are tidied away."""
    file = checkpoint_file(job.folder)
    if job.checkpoint is None or file.exists():
        return
    if job.checkpoint.is_dir():  # a sharded one
        with atomic_folder(file) as folder:
            shutil.copytree(job.checkpoint, folder, dirs_exist_ok=True)
    else:
        with atomic_file(file) as path:
            shutil.copyfile(job.checkpoint, path)


def job_of(board: Board, claim: Claim, out: Path, progress: Lease) -> Job:
    """What is to be done for a claim, from the latest checkpoint there is."""
    run, phase, attempt = claim.cell.run, claim.cell.phase, claim.cell.attempt
    init, order, dropout = board.settings.seeds(run)
    cells = claim.cells
    before: list[tuple[Phase, int]] = [(phase, earlier) for earlier in reversed(range(attempt))]
    previous: dict[Phase, Phase] = {"rest": "rung", "test": "rest" if board.settings.rule == "rung" else "rung"}
    if phase in previous:
        before.append((previous[phase], len(cells.attempts[run, previous[phase]]) - 1))
    files = [checkpoint_file(place(out, run, *one)) for one in before]
    return Job(
        run,
        phase,
        init,
        order,
        dropout,
        board.settings,
        folder=place(out, run, phase, attempt),
        checkpoint=next((file for file in files if file.exists()), None),
        progress=progress,
    )


def place(out: Path, run: int, phase: Phase, attempt: int) -> Path:
    """The folder of an attempt. Each has its own: one that was thought dead may still write."""
    return out / "runs" / f"{run:03d}" / f"{phase}_{attempt}"


def tidy(out: Path, cells: Cells, settings: SeedSettings) -> None:
    """Delete checkpoints that nobody will ask for: of runs that lost, and of attempts that another one followed."""
    ranking = cells.decided.get("ranking")
    for run in range(settings.runs):
        told: list[Phase] = [phase for phase in ("rest", "rung") if cells.fate(run, phase) == "told"]
        lost = run not in ranking["kept"] if ranking is not None else "stopped" in cells.attrs(run, "rung")
        if not (lost or told):
            continue
        if not lost and told[0] == "rung" and ranking is not None:
            continue  # it trains just now, or will: from whichever checkpoint is the latest
        kept = None if lost else (told[0], len(cells.attempts[run, told[0]]) - 1)
        phases: tuple[Phase, ...] = ("rung", "rest")
        for phase in phases:
            # Not whatever lies there: others may have begun what these cells do not know of.
            for attempt in range(len(cells.attempts.get((run, phase), []))):
                if (phase, attempt) != kept:
                    shutil.rmtree(place(out, run, phase, attempt) / "checkpoints", ignore_errors=True)
