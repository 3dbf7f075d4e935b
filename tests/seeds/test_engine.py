"""Claims, leases, decisions and the work itself, with runs that cost nothing."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lightning_ft.functional.seed_pruning import cost, rung_step
from lightning_ft.seeds.board import Board
from lightning_ft.seeds.cells import Cell, Cells, SeedSettings
from lightning_ft.seeds.job import Job, checkpoint_file
from lightning_ft.seeds.lease import Lease, LeaseLostError, Watch, name_of_worker
from lightning_ft.seeds.record import Evaluation, SeedStudy
from lightning_ft.seeds.storage import open_storage
from lightning_ft.seeds.study import study_record
from lightning_ft.seeds.summary import summarise
from lightning_ft.seeds.worker import Patience, _carry_out, tidy, work
from tests.seeds.toy import HORIZON, ToyTest, ToyTrain, toy_score

QUICK = Patience(lease=60, poll=0.01)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def board(out: Path, **settings: Any) -> Board:
    return Board(open_storage(None, out), "toys", SeedSettings(**{"runs": 8, "keep": 2, **settings}))


def run_all(out: Path, train: Any = None, test: Any = None, **settings: Any) -> SeedStudy:
    shared = board(out, **settings)
    work(shared, train or ToyTrain(out / "log"), out, test=test, patience=QUICK)
    return study_record(shared.storage, "toys", out)


def steps(out: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (out / "log").read_text().splitlines())


def test_a_study_finishes_the_best_and_spends_what_it_should(tmp_path: Path) -> None:
    study = run_all(tmp_path, test=ToyTest(tmp_path / "log"))
    at_rung = {run: toy_score(run, run, 5) for run in range(8)}
    best = sorted(at_rung, key=at_rung.__getitem__, reverse=True)[:2]
    assert {run.number for run in study.runs if run.state == "finished"} == set(best)
    assert study.chosen == best[0]
    assert sum(run.steps for run in study.runs) == cost(8, 0.25, 2) * HORIZON
    assert [run.test for run in study.runs if run.test is not None] == [1000.0 + best[0]]
    assert sum(line.endswith("test 0") for line in (tmp_path / "log").read_text().splitlines()) == 1
    for run in study.runs:
        kept = run.number in best
        assert [one.step for one in run.evaluations] == ([4, 5, 8, 12, 16, 20] if kept else [4, 5])
        # Of those that lost, nothing is left.
        assert len(list((tmp_path / "runs" / f"{run.number:03d}").glob("*/checkpoints/*"))) == kept
        assert (run.checkpoint is not None) == kept
    assert SeedStudy.load(_saved(study, tmp_path)) == study


def _saved(study: SeedStudy, folder: Path) -> Path:
    study.save(folder / "study.json")
    return folder / "study.json"


def test_ranks_by_the_last_evaluation_and_not_by_the_best(tmp_path: Path) -> None:
    """Run 0 was best early; run 1 is better at the rung."""

    def train(job: Job) -> list[Evaluation]:
        job.progress.report([], horizon=8)
        return [Evaluation(1, 0.9 - job.run / 10, 0.5), Evaluation(2, 0.5 + job.run / 10, 0.5)]

    assert run_all(tmp_path, train, runs=2, keep=1).chosen == 1


def test_ties_go_to_the_lower_loss(tmp_path: Path) -> None:
    def train(job: Job) -> list[Evaluation]:
        job.progress.report([], horizon=8)
        return [Evaluation(2, 0.5, 0.6 - job.run / 10)]

    assert run_all(tmp_path, train, runs=3, keep=1).chosen == 2


def test_collapsed_runs_are_dropped_with_the_reason(tmp_path: Path) -> None:
    class Train(ToyTrain):
        def __call__(self, job: Job) -> Any:
            found = list(super().__call__(job))
            job.progress.report(found, horizon=HORIZON, chance=0.45, constants=(0.33,), classes=2)
            if job.run == 3:
                found[-1] = Evaluation(found[-1].step, 0.45, 0.2)
            elif job.run == 4:
                found[-1] = Evaluation(found[-1].step, 0.4, math.log(2))
            elif job.run == 5:
                found[-1] = Evaluation(found[-1].step, 0.33, 1.2)
            return found

    study = run_all(tmp_path, Train(tmp_path / "log", nan=(2,)), runs=6, keep=4)
    states = {run.number: (run.state, run.reason) for run in study.runs}
    assert states[2] == ("collapsed", "score is nan")
    assert states[3] == ("collapsed", "score 0.45 is that of always answering the commonest class")
    assert states[4] == ("collapsed", "loss 0.6931 is that of chance, ln 2 = 0.6931")
    assert states[5] == ("collapsed", "score 0.33 is that of always answering one class")
    assert {states[0][0], states[1][0]} == {"finished"}
    assert study.chance == 0.45


class Forgets(ToyTrain):
    """The run that is best at the rung answers one class alone in the end."""

    def __call__(self, job: Job) -> Any:
        found = list(super().__call__(job))
        job.progress.report(found, horizon=HORIZON, chance=0.25, constants=(0.3, 0.2))
        if job.phase == "rest" and job.run == best(job.settings):
            found[-1] = Evaluation(HORIZON, 0.2, 0.9)
        return found


def best(settings: SeedSettings) -> int:
    """The best run at the rung."""
    step = rung_step(HORIZON, settings.stop_at)
    return max(range(settings.runs), key=lambda run: toy_score(*settings.seeds(run)[:2], step))


def test_a_kept_run_may_collapse_later_and_is_not_chosen(tmp_path: Path) -> None:
    study = run_all(tmp_path, Forgets(tmp_path / "log"), runs=5, keep=2)
    first = best(SeedSettings(runs=5, keep=2))
    run = study.runs[first]
    assert (run.state, run.reason) == ("collapsed", "score 0.2 is that of always answering one class, in the end")
    assert study.chosen not in (None, first)
    assert study.runs[study.chosen or 0].state == "finished"
    told = {one["number"]: one for one in summarise(study)["runs"]}
    assert (told[first]["end"], told[first]["steps"]) == (0.2, HORIZON)


def test_where_all_collapse_none_is_chosen(tmp_path: Path) -> None:
    study = run_all(tmp_path, ToyTrain(tmp_path / "log", nan=(0, 1, 2)), ToyTest(tmp_path / "log"), runs=3)
    assert study.chosen is None
    assert {run.state for run in study.runs} == {"collapsed"}


# ---- streams


def test_paired_and_grid_designs_have_streams_of_their_own() -> None:
    paired = SeedSettings(runs=4, keep=1, seed=10)
    assert [paired.seeds(run) for run in range(4)] == [(10, 10, 10), (11, 11, 11), (12, 12, 12), (13, 13, 13)]
    grid = SeedSettings(runs=9, keep=1, design="grid")
    assert {grid.seeds(run)[:2] for run in range(9)} == {(i, o) for i in range(3) for o in range(3)}
    assert [grid.seeds(run)[2] for run in range(9)] == list(range(9))
    coupled = SeedSettings(runs=9, keep=1, design="grid", dropout="order")
    assert all(coupled.seeds(run)[1] == coupled.seeds(run)[2] for run in range(9))


# ---- claims


def test_a_surplus_ask_is_failed(tmp_path: Path) -> None:
    """Two workers see the last cell; one gets it, and Optuna makes up a trial for the other."""
    first, second = board(tmp_path, runs=1, keep=1), board(tmp_path, runs=1, keep=1)
    first.enqueue([Cell(0, "rung")])
    assert first.claim("a") is not None
    assert second.claim("b") is None
    states = Counter(trial.state.name for trial in first.trials() if "decision" not in trial.user_attrs)
    assert states == {"RUNNING": 1, "FAIL": 1}
    assert run_all(tmp_path / "other", runs=1, keep=1).chosen == 0


def test_a_cell_that_two_enqueued_is_trained_once(tmp_path: Path) -> None:
    shared = board(tmp_path)
    shared.enqueue([Cell(run, "rung") for run in (1, 1, 0, 1)])
    study = run_all(tmp_path)
    assert {run.state for run in study.runs} == {"finished", "stopped"}
    lines = Counter((tmp_path / "log").read_text().splitlines())
    assert set(lines.values()) == {1}


def test_each_cell_is_claimed_once_by_many_threads(tmp_path: Path) -> None:
    board(tmp_path, runs=30).enqueue([Cell(run, "rung") for run in range(30)])
    got: list[int] = []

    def claim_all() -> None:
        mine = board(tmp_path, runs=30)
        while mine.cells().waiting():
            if (claim := mine.claim("me")) is not None:
                got.append(claim.cell.run)

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(30))


def test_the_first_decision_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, late = board(tmp_path), board(tmp_path), board(tmp_path)
    assert one.decide("ranking", {"kept": [1]}) == {"kept": [1]}
    assert other.decide("ranking", {"kept": [2]}) == {"kept": [1]}
    # One that looked before the first decision was made, and decides after it.
    looks = [late.cells, lambda: Cells([])]
    monkeypatch.setattr(late, "cells", lambda: (looks.pop() if len(looks) > 1 else looks[0])())
    assert late.decide("ranking", {"kept": [3]}) == {"kept": [1]}
    assert sum(trial.user_attrs.get("decision") == "ranking" for trial in one.trials()) == 2


# ---- leases


def test_a_late_worker_can_say_nothing_any_more(tmp_path: Path) -> None:
    """Its lease ran out while it was away; the run is another worker's, and is told once."""
    now = [0.0]
    shared = board(tmp_path, runs=1, keep=1)
    shared.enqueue([Cell(0, "rung")])
    late = shared.claim("late")
    assert late is not None
    watch = Watch(shared, 10, clock=lambda: now[0])
    assert watch.bury("other", shared.trials()) == 0
    now[0] = 9.9
    assert watch.bury("other", shared.trials()) == 0
    assert late.note(beat=[1, 0, 0.0])  # a sign of life
    now[0] = 15
    assert watch.bury("other", shared.trials()) == 0
    now[0] = 25
    assert watch.bury("other", shared.trials()) == 1
    shared.enqueue([Cell(0, "rung", attempt=1)])
    successor = shared.claim("other")
    assert successor is not None
    assert successor.cell == Cell(0, "rung", 1)

    result = [Evaluation(5, 0.7, 0.3)]
    held = Lease(late, 10)
    with pytest.raises(LeaseLostError, match="another worker has taken run 0 over"):
        held.report(result, horizon=20)
    assert not late.tell(result, {})
    assert not shared.fail(late.trial)
    assert successor.tell(result, {})
    assert [trial.state.name for trial in shared.trials() if "phase" in trial.user_attrs] == ["FAIL", "COMPLETE"]


def test_only_one_takes_over(tmp_path: Path) -> None:
    shared, other = board(tmp_path, runs=1, keep=1), board(tmp_path, runs=1, keep=1)
    shared.enqueue([Cell(0, "rung")])
    assert shared.claim("dead") is not None
    seen = [one.trials() for one in (shared, other)]
    assert [Watch(shared, 0).bury("dead", seen[0]), Watch(other, 0).bury("dead", seen[1])] == [1, 0]


def test_a_name_returns_when_its_owner_ends(tmp_path: Path) -> None:
    with name_of_worker(tmp_path) as first, name_of_worker(tmp_path) as second:
        assert first != second
    with name_of_worker(tmp_path) as again:
        assert again == first


def test_an_idle_worker_of_another_folder_takes_nothing_over(tmp_path: Path) -> None:
    """Machines may have one name, and their workers one storage: what a name holds is not of whoever has it there."""
    shared = board(tmp_path, runs=1, keep=1)
    shared.enqueue([Cell(0, "rung")])
    with name_of_worker(tmp_path / "here") as mine, name_of_worker(tmp_path / "there") as other:
        assert shared.claim(mine) is not None
        assert Watch(shared, 60).bury(other, shared.trials()) == 0
        assert Watch(shared, 60).bury(mine, shared.trials()) == 1


def test_a_run_goes_on_from_the_checkpoint_of_the_attempt_that_died(tmp_path: Path) -> None:
    class Dies(ToyTrain):
        def __call__(self, job: Job) -> Any:
            if job.run == 2 and job.folder.name != f"{job.phase}_2":
                job = Job(**{**vars(job), "progress": _DiesAt(3 if job.phase == "rung" else 9)})
            return super().__call__(job)

    class _DiesAt:
        def __init__(self, step: int) -> None:
            self.step = step

        def report(self, *_: Any, **__: Any) -> None: ...

        def at(self, step: int) -> None:
            if step >= self.step:
                raise SystemExit

    for _ in range(5):
        try:
            run_all(tmp_path, Dies(tmp_path / "log"), keep=8)
        except SystemExit:
            continue
    study = study_record(board(tmp_path, keep=8).storage, "toys")
    assert {run.state for run in study.runs} == {"finished"}
    # No step twice, and none left out.
    assert steps(tmp_path) == {str(run): HORIZON for run in range(8)}
    assert [one.step for one in study.runs[2].evaluations] == [4, 5, 8, 12, 16, 20]


@pytest.mark.parametrize("phase", ["rung", "rest"])
def test_a_run_whose_worker_died_before_it_could_say_so_keeps_its_checkpoint(tmp_path: Path, phase: str) -> None:
    dead: set[int] = set()

    def train(job: Job) -> Any:
        evaluations = ToyTrain(tmp_path / "log")(job)
        if job.phase == phase and job.run not in dead:
            dead.add(job.run)
            raise SystemExit
        return evaluations

    while True:
        try:
            study = run_all(tmp_path, train, ToyTest(tmp_path / "log"))
        except SystemExit:
            continue
        break
    finished = [run for run in study.runs if run.state == "finished"]
    assert {run.number for run in finished} <= dead
    for run in finished:
        assert run.checkpoint is not None
        assert json.loads(Path(run.checkpoint).read_text())["step"] == HORIZON
        assert steps(tmp_path)[str(run.number)] == HORIZON + (run.number == study.chosen)
    assert [run.test for run in study.runs if run.test is not None] == [1000.0 + (study.chosen or 0)]


def inherited(tmp_path: Path, *steps: int) -> Path:
    """The checkpoint of a training that says where it is, and saves nothing, from one that is a folder."""
    before = tmp_path / "before" / "last.ckpt"
    before.mkdir(parents=True)
    (before / "rank_0").write_text("a piece")
    shared = board(tmp_path)
    shared.enqueue([Cell(0, "rung")])

    def train(job: Job) -> Any:
        for step in steps:
            job.progress.at(step)
        return [Evaluation(5, 0.5, 0.5)]

    claim = shared.claim("me")
    assert claim is not None
    own = tmp_path / "own"

    def job_of(board: Board, claim: Any, out: Path, progress: Lease) -> Job:
        return Job(0, "rung", 0, 0, 0, board.settings, own, before, progress)

    with mock.patch("lightning_ft.seeds.worker.job_of", job_of):
        _carry_out(claim, train, None, tmp_path, 60)
    return checkpoint_file(own)


def test_a_sharded_checkpoint_is_taken_over_whole(tmp_path: Path) -> None:
    assert (inherited(tmp_path, 5, 5) / "rank_0").read_text() == "a piece"


def test_an_old_checkpoint_never_passes_for_that_of_a_training_that_went_on(tmp_path: Path) -> None:
    assert not inherited(tmp_path, 3, 4, 5).exists()


def test_a_run_that_always_takes_its_worker_down_is_given_up(tmp_path: Path) -> None:
    def train(job: Job) -> Any:
        if job.run == 1:
            raise SystemExit
        return ToyTrain(tmp_path / "log")(job)

    for _ in range(30):
        try:
            study = run_all(tmp_path, train, runs=3, keep=2)
        except SystemExit:
            continue
        break
    assert [run.state for run in study.runs] == ["finished", "failed", "finished"]
    assert study.runs[1].reason == "10 workers died of it"


# ---- errors, barriers, settings


def test_an_error_fails_the_run_and_not_the_study(tmp_path: Path) -> None:
    def train(job: Job) -> Any:
        if job.run == 5 and (tmp_path / "log").exists():
            raise RuntimeError("out of memory")
        return ToyTrain(tmp_path / "log")(job)

    study = run_all(tmp_path, train)
    assert study.runs[5].state == "failed"
    assert study.runs[5].reason == "RuntimeError: out of memory"
    assert sum(run.state == "finished" for run in study.runs) == 2


def test_an_error_before_any_result_is_raised(tmp_path: Path) -> None:
    def train(job: Job) -> Any:
        raise ValueError("metric='val_f7' is not logged")

    with pytest.raises(ValueError, match="val_f7"):
        run_all(tmp_path, train)
    assert {run.state for run in run_all(tmp_path).runs} == {"finished", "stopped"}  # when it is mended
    with pytest.raises(ValueError, match="the training returned no evaluation"):
        run_all(tmp_path / "other", lambda job: [])


def test_the_barrier_gives_missing_runs_up(tmp_path: Path) -> None:
    """A worker that is alive and does not get on."""
    shared = board(tmp_path, runs=4, keep=1)
    shared.enqueue([Cell(0, "rung")])
    stuck = shared.claim("stuck")
    assert stuck is not None
    patience = Patience(lease=60, barrier=0.2, poll=0.01)
    work(shared, ToyTrain(tmp_path / "log"), tmp_path, patience=patience)
    study = study_record(shared.storage, "toys", tmp_path)
    assert study.runs[0].state == "failed"
    assert study.runs[0].reason == "it did not come to the rung in time"
    assert not stuck.tell([Evaluation(5, 1.0, 0.0)], {})
    assert study.chosen is not None


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    board(tmp_path, told={"config": "abc"})
    board(tmp_path, told={"config": "abc"})
    with pytest.raises(ValueError, match=r"with other settings: config='abc' \(now 'xyz'\), keep=2 \(now 3\)\. Give"):
        board(tmp_path, keep=3, told={"config": "xyz"})
    with pytest.raises(KeyError):
        Board(open_storage(None, tmp_path), "no such study")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_at": 1.0}, "stop_at=1.0 must be a fraction"),
        ({"keep": 9}, "keep=9 must lie between 1 and runs=8"),
        ({"threads": 0}, "threads=0 must be 1 or more"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        board(tmp_path, **settings)


# ---- ASHA


def test_asha_stops_at_rungs_and_finishes_few(tmp_path: Path) -> None:
    study = run_all(tmp_path, rule="asha", runs=16, keep=4)
    assert {run.state for run in study.runs} == {"finished", "stopped"}
    assert {run.last.step for run in study.runs if run.last is not None} == {5, HORIZON}
    # The first is always promoted; then only those that are among the best quarter so far.
    expected, seen = [], []
    for run in dict.fromkeys(int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()):
        seen.append(toy_score(run, run, 5))
        best = sorted(seen, reverse=True)[max(1, len(seen) // 4) - 1]
        if seen[-1] >= best:
            expected.append(run)
    assert [run.number for run in study.runs if run.state == "finished"] == sorted(expected)
    assert study.runs[study.chosen or 0].last.score == max(  # type: ignore[union-attr]
        run.last.score for run in study.runs if run.state == "finished" and run.last is not None
    )
    assert (study.later, study.reduction) == ((), 4)
    often = study_record(board(tmp_path / "often", runs=16, keep=8, stop_at=0.1, rule="asha").storage, "toys")
    assert (often.stop_at, *often.later) == (0.1, 0.2, 0.4, 0.8)
    assert often.reduction == 2


# ---- the journal


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    shared = board(tmp_path)
    shared.enqueue([Cell(0, "rung")])
    with (tmp_path / "study.journal").open("a") as journal:
        journal.write('{"op_code": 8, "worker')
    assert board(tmp_path).claim("me") is not None
    assert all(json.loads(line) for line in (tmp_path / "study.journal").read_text().splitlines())


def test_what_began_since_a_look_at_the_study_is_not_tidied_away(tmp_path: Path) -> None:
    shared = board(tmp_path, runs=1, keep=1)
    shared.enqueue([Cell(0, "rung")])
    claim = shared.claim("me")
    assert claim is not None
    assert claim.tell([Evaluation(5, 0.5, 0.5)], {})
    before = shared.cells()
    for attempt in ("rung_0", "rest_0"):
        file = checkpoint_file(tmp_path / "runs" / "000" / attempt)
        file.parent.mkdir(parents=True)
        file.touch()
    tidy(tmp_path, before, shared.settings)
    assert file.exists()


def test_checkpoints_lie_in_folders_of_attempts(tmp_path: Path) -> None:
    seen: list[Path] = []

    def train(job: Job) -> Any:
        seen.append(job.folder)
        return ToyTrain(tmp_path / "log")(job)

    run_all(tmp_path, train, runs=2, keep=1)
    assert {str(path.relative_to(tmp_path)) for path in seen[:2]} == {"runs/000/rung_0", "runs/001/rung_0"}
    assert seen[2].name == "rest_0"
    assert checkpoint_file(seen[2]).exists()
