"""Workers killed at random: every cell is told once, none is lost, none twice, and the outcome is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ft.seeds.board import Board
from lightning_ft.seeds.cells import SeedSettings
from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.storage import open_storage
from lightning_ft.seeds.study import study_record
from lightning_ft.seeds.worker import Patience, work
from tests.seeds.kills import killed_study, told
from tests.seeds.postgres import postgres_server
from tests.seeds.toy import ToyTest, ToyTrain


def outcome(study: SeedStudy) -> object:
    """What must not depend on who trained when."""
    return study.chosen, [(run.number, run.state, run.evaluations, run.test) for run in study.runs]


def undisturbed(out: Path, runs: int) -> SeedStudy:
    board = Board(open_storage(None, out), "toys", SeedSettings(runs=runs, keep=runs // 4, told={"kind": "toy"}))
    work(board, ToyTrain(out / "log"), out, test=ToyTest(out / "log"), patience=Patience(poll=0.1))
    return study_record(board.storage, "toys")


def check(out: Path, url: str | None, runs: int, *, every: float, least: int) -> None:
    study, trials, killed = killed_study(out / "killed", url, runs, every=every)
    assert killed >= least
    kept = {run.number for run in study.runs if run.state == "finished"}
    cells_of_study = {*((run, "rung") for run in range(runs)), *((run, "rest") for run in kept), (study.chosen, "test")}
    assert told(trials) == dict.fromkeys(cells_of_study, 1)
    assert outcome(study) == outcome(undisturbed(out / "undisturbed", runs))
    spent = sum(run.steps for run in study.runs)
    print(f"{runs} runs, {killed} kills, {len(cells_of_study)} cells told once each, {spent} steps spent")


@pytest.mark.kill
def test_journal_survives_random_kills(tmp_path: Path) -> None:
    check(tmp_path, None, 40, every=25, least=8)


@pytest.mark.postgres
@pytest.mark.timeout(1800)
def test_postgresql_survives_random_kills(tmp_path: Path) -> None:
    with postgres_server() as url:
        check(tmp_path, url, 200, every=40, least=20)
