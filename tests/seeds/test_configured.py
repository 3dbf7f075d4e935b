"""Studies of real trainings, by a configuration and from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from lightning import Trainer

from lightning_ft.callbacks.seed_pruning import SeedPruning
from lightning_ft.cli import run
from lightning_ft.data.multiple_choice import MultipleChoiceData
from lightning_ft.functional.seed_pruning import cost, rung_step
from lightning_ft.modules import MultipleChoice
from lightning_ft.seeds.board import Board
from lightning_ft.seeds.cells import SeedSettings
from lightning_ft.seeds.command import _spelt, command
from lightning_ft.seeds.configured import ConfiguredTest, ConfiguredTrain, check_seeds, configuration, facts_of
from lightning_ft.seeds.job import Job
from lightning_ft.seeds.pool import Assignment, run_study
from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.storage import open_storage
from lightning_ft.seeds.study import study_record
from lightning_ft.seeds.worker import Patience, work
from tests.data.test_multiple_choice_data import rows as choice_rows
from tests.pretrained import pretrained
from tests.seeds.kills import children
from tests.test_cli import project

__all__ = ["project"]
# What Lightning and jsonargparse say of each other's older spellings is no concern of this.
pytestmark = pytest.mark.filterwarnings("ignore")
# A model that has hardly begun answers one class alone, which this metric does not take for a failure.
SETTINGS = SeedSettings(runs=4, keep=2, stop_at=0.3, metric="val_auroc")
STEPS = 10  # 75 rows in batches of 4 and windows of 2, one epoch


@pytest.fixture
def configured(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One epoch of a tiny model with dropout, accumulation 2, validation in mid-epoch."""
    settings = yaml.safe_load((project / "config.yaml").read_text())
    settings["trainer"] |= {"callbacks": [], "max_epochs": 1}
    (project / "plain.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(project)
    return project


def weights(file: Path) -> dict[str, Any]:
    saved = torch.load(file, weights_only=True)
    return {name: saved[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def plain_fit(config: str, out: Path, seed: int, *more: str) -> Path:
    """A run that no study ever touched, with the seeds of run ``seed``."""
    callback = "--trainer.callbacks+=lightning_ft.callbacks.ExactResume"
    seeds = ["--model.init_args.head_seed", str(seed), "--data.init_args.seed", str(seed)]
    place = ["--trainer.default_root_dir", str(out), "--seed_everything", str(seed)]
    run(["fit", "--config", config, *place, *seeds, callback, "--trainer.callbacks.seed", str(seed), *more])
    return out / "run_0" / "checkpoints" / "last.ckpt"


def study_of(out: Path, settings: SeedSettings, config: str = "plain.yaml") -> SeedStudy:
    board = Board(open_storage(None, out), "seeds", settings)
    work(board, ConfiguredTrain(config), out, test=ConfiguredTest(config), patience=Patience(poll=0.05))
    return study_record(board.storage, "seeds", out)


def board_facts(out: Path) -> dict[str, Any]:
    return Board(open_storage(None, out), "seeds").cells().attrs(0, "rung")["facts"]


def test_finished_runs_are_those_that_were_never_stopped(configured: Path) -> None:
    study = study_of(configured / "study", SETTINGS)
    step = rung_step(STEPS, 0.3)
    assert study.horizon == STEPS
    assert study.chance == 0.5
    facts = board_facts(configured / "study")
    assert facts["constants"] == [0.5]
    for number in study.runs:
        assert number.evaluations[0].step == step
        assert (number.evaluations[-1].step == STEPS) == (number.state == "finished")
    assert sum(one.steps for one in study.runs) == 4 * step + 2 * (STEPS - step)
    finished = [one for one in study.runs if one.state == "finished"]
    assert len(finished) == 2
    for one in finished:
        assert one.checkpoint is not None
        same(Path(one.checkpoint), plain_fit("plain.yaml", configured / f"plain{one.number}", one.number))
    chosen = study.runs[study.chosen or 0]
    assert chosen.test is not None
    assert [one.number for one in study.runs if one.test is not None] == [study.chosen]
    # Logs and configurations stay; of checkpoints there are those of the finished runs.
    assert len(list((configured / "study" / "runs").glob("**/*.ckpt"))) == 2


class DiesSilent(ConfiguredTrain):
    """Each phase of each run ends, and its worker with it, before that is told."""

    def __call__(self, job: Job) -> Any:
        evaluations = super().__call__(job)
        if job.folder.name.endswith("_0"):
            raise SystemExit
        return evaluations


def test_a_run_whose_worker_died_before_it_could_say_so_is_not_lost(configured: Path) -> None:
    out, settings = configured / "study", replace(SETTINGS, runs=2, keep=1)
    board = Board(open_storage(None, out), "seeds", settings)
    deaths = 0
    while True:
        try:
            work(board, DiesSilent("plain.yaml"), out, test=ConfiguredTest("plain.yaml"), patience=Patience(poll=0.05))
        except SystemExit:
            deaths += 1
            continue
        break
    assert deaths == 3
    study = study_record(board.storage, "seeds", out)
    chosen = study.runs[study.chosen or 0]
    assert chosen.test is not None
    assert chosen.checkpoint is not None
    same(Path(chosen.checkpoint), plain_fit("plain.yaml", configured / "plain", chosen.number))
    assert sum(one.steps for one in study.runs) == STEPS + rung_step(STEPS, 0.3)


class Peek(ConfiguredTrain):
    """What three streams change: weights before the first batch, the first batch, the first loss."""

    def __call__(self, job: Job) -> Any:
        from lightning.pytorch import Callback

        from lightning_ft.cli import FineTuningCLI

        seen: dict[str, Any] = {}
        original = FineTuningCLI._fit_settings

        class Look(Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                if not seen:
                    seen["head"] = module.model.classifier.weight.detach().clone()
                    seen["rows"] = batch["row"].tolist() if "row" in batch else batch["input_ids"].tolist()
                    seen["noise"] = torch.rand(4).tolist()

        def with_look(cli: Any, settings: Any, callbacks: list[Any]) -> Any:
            callbacks.append(Look())
            return original(cli, settings, callbacks)

        FineTuningCLI._fit_settings = with_look  # type: ignore[method-assign]
        try:
            super().__call__(job)
        finally:
            FineTuningCLI._fit_settings = original  # type: ignore[method-assign]
        return seen


def test_each_seed_moves_its_own_stream_alone(configured: Path) -> None:
    def look(name: str, init: int, order: int, dropout: int) -> Any:
        # Validation rows that are drawn must not depend on the order either.
        line = ("--data.init_args.val", "null", "--data.init_args.val_fraction", "0.2")
        return Peek("plain.yaml", line)(Job(0, "rung", init, order, dropout, SETTINGS, configured / name))

    base = look("base", 1, 1, 1)
    for name, seeds in {"head": (2, 1, 1), "rows": (1, 2, 1), "noise": (1, 1, 2)}.items():
        other = look(name, *seeds)
        changed = {key for key in base if not _equal(base[key], other[key])}
        assert changed == {name}


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other)) if not isinstance(one, list) else one == other


def test_the_command(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "--config",
        "plain.yaml",
        "--runs",
        "3",
        "--keep",
        "1",
        "--stop-at",
        "0.3",
        "--out",
        "out",
        "--workers",
        "0",
        "--metric",
        "val_auroc",
    ]
    command(line)
    said = capsys.readouterr()
    assert "3 runs to 0.3 of their length, 1 to the end: the cost of 1.6 full runs" in said.err
    study = SeedStudy.load(configured / "out" / "study.json")
    assert sum(one.state == "finished" for one in study.runs) == 1
    command([*line, "--threads=1"])  # it is over
    assert SeedStudy.load(configured / "out" / "study.json") == study
    with pytest.raises(ValueError, match=r"with other settings: keep=1 \(now 2\)"):
        command([*line, "--keep", "2"])
    with pytest.raises(SystemExit):
        command([*line, "--budget", "10"])
    assert "leave --runs and --keep out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--out", "out"])
    assert "--config names the configuration" in capsys.readouterr().err


def test_options_have_both_spellings() -> None:
    given = ["--stop-at=0.3", "--barrier-timeout", "5", "--arguments", "--data.train a-b.jsonl --x-y 1", "--out=a-b"]
    asked = ["--stop_at=0.3", "--barrier_timeout", "5", "--arguments", "--data.train a-b.jsonl --x-y 1", "--out=a-b"]
    assert [_spelt(argument) for argument in given] == asked


def test_what_always_answering_one_choice_scores_is_known(tmp_path: Path) -> None:
    rows = choice_rows(8, 4)
    rows = rows.remove_columns("label").add_column("label", [0, 2, 2, 1, 2, 1, 2, 2])
    data = MultipleChoiceData(pretrained(tmp_path, "bert", hf.AutoModelForMultipleChoice), rows, rows, batch_size=4)
    trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    pruning = SeedPruning(decide=lambda *_: True)
    trainer.callbacks.append(pruning)  # type: ignore[attr-defined]
    trainer.fit(module := MultipleChoice(str(tmp_path)), data)
    known = {"horizon": 2, "classes": 4, "chance": 5 / 8, "constants": []}
    assert facts_of(trainer, module, pruning) == known


def test_refuses_data_without_a_seed_and_a_metric_that_is_not_logged(configured: Path) -> None:
    parsed = configuration("plain.yaml", ())
    del parsed.data.init_args["seed"]
    with pytest.raises(ValueError, match="ClassificationData takes no seed"):
        check_seeds(parsed)
    with pytest.raises(ValueError, match="monitor='val_f7' was not logged"):
        study_of(configured / "bad", SeedSettings(runs=1, keep=1, metric="val_f7"))
    assert study_record(open_storage(None, configured / "bad"), "seeds").runs[0].state == "waiting"


# ---- killed


def outcome(study: SeedStudy) -> tuple[Any, ...]:
    return study.chosen, [(one.number, one.state, one.evaluations, one.test) for one in study.runs]


def killed_twice(assignment: Assignment, workers: int, where: str, pauses: tuple[float, ...]) -> int:
    """Run a study and kill one of its workers, each time when it has made so many checkpoints."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        for pause in pauses:
            while not over.wait(0.05) and len(list(assignment.out.glob(where))) < pause:
                pass
            while not over.wait(0.05) and not (alive := children()):
                pass
            if over.is_set():
                return
            os.kill(alive[0], signal.SIGKILL)
            killed.append(alive[0])
            time.sleep(1)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        run_study(assignment, workers=workers)
    finally:
        over.set()
        thread.join()
    return len(killed)


def check_killed(assignment: Assignment, out: Path, whole: SeedStudy, pauses: tuple[float, ...]) -> SeedStudy:
    kills = killed_twice(assignment, 3, "runs/*/*/checkpoints/last.ckpt", pauses)
    assert kills == len(pauses)
    study = study_record(open_storage(None, out), "seeds", out)
    assert outcome(study) == outcome(whole)
    for one, other in zip(study.runs, whole.runs, strict=True):
        if one.state == "finished":
            assert one.checkpoint is not None
            assert other.checkpoint is not None
            same(Path(one.checkpoint), Path(other.checkpoint))
    return study


@pytest.mark.slow
def test_a_run_on_two_devices_is_stopped_and_resumed(configured: Path) -> None:
    """Rank 0 alone speaks to the study; the other one is started for each phase."""
    line = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    settings, out = SeedSettings(runs=2, keep=1, stop_at=0.4, metric="val_auroc"), configured / "ranks"
    board = Board(open_storage(None, out), "seeds", settings)
    before = dict(os.environ)
    train, test = ConfiguredTrain("plain.yaml", line), ConfiguredTest("plain.yaml", line)
    work(board, train, out, test=test, patience=Patience(poll=0.05))
    study = study_record(board.storage, "seeds", out)
    assert os.environ == before
    assert study.horizon == STEPS / 2
    assert sum(one.state == "finished" for one in study.runs) == 1  # the other may have collapsed
    assert [one.steps for one in study.runs if one.state == "finished"] == [STEPS / 2]
    chosen = study.runs[study.chosen or 0]
    assert chosen.test is not None
    assert chosen.checkpoint is not None
    same(Path(chosen.checkpoint), plain_fit_on_two("plain.yaml", configured, chosen.number))


def plain_fit_on_two(config: str, folder: Path, seed: int) -> Path:
    callback = "--trainer.callbacks+=lightning_ft.callbacks.ExactResume"
    seeds = ["--model.init_args.head_seed", str(seed), "--data.init_args.seed", str(seed)]
    place = ["--trainer.default_root_dir", str(folder / "plain"), "--seed_everything", str(seed)]
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = ["fit", "--config", config, *place, *seeds, callback, "--trainer.callbacks.seed", str(seed), *devices]
    subprocess.run([sys.executable, "-m", "lightning_ft", *command], check=True, capture_output=True)
    return folder / "plain" / "run_0" / "checkpoints" / "last.ckpt"


@pytest.mark.kill
def test_workers_that_are_killed_change_nothing(configured: Path) -> None:
    """Three workers, two kills, against one worker that nobody disturbs; and against runs that no study touched."""
    whole = study_of(configured / "whole", SETTINGS)
    train, test = ConfiguredTrain("plain.yaml", (), checkpoint_every=1), ConfiguredTest("plain.yaml")
    out = configured / "killed"
    assignment = Assignment("seeds", SETTINGS, train, out, test=test, patience=Patience(lease=20, poll=0.1))
    study = check_killed(assignment, out, whole, (1, 3))
    assert json.loads((out / "study.json").read_text())["chosen"] == study.chosen


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_real_study_survives_kills(minilm: str, real_data: Path, tmp_path: Path) -> None:
    """MiniLM on 160 questions: eight runs, two kept, three workers, one killed twice."""
    config = real_config(minilm, real_data, tmp_path)
    settings = SeedSettings(runs=8, keep=2, metric="val_auroc")
    whole = study_of(tmp_path / "whole", settings, config)
    assert sum(one.steps for one in whole.runs) == pytest.approx(cost(8, 0.25, 2) * whole.horizon, rel=0.05)
    chosen = whole.runs[whole.chosen or 0]
    assert chosen.checkpoint is not None
    same(Path(chosen.checkpoint), plain_fit(config, tmp_path / "plain", chosen.number))
    train, test, out = ConfiguredTrain(config, (), checkpoint_every=2), ConfiguredTest(config), tmp_path / "killed"
    assignment = Assignment("seeds", settings, train, out, test=test, patience=Patience(lease=30))
    study = check_killed(assignment, out, whole, (2, 5))
    spent = sum(one.steps for one in study.runs)
    assert spent == pytest.approx(cost(8, 0.25, 2) * study.horizon, rel=0.05)
    print(f"T {whole.horizon}, chosen {study.chosen}, scores {[one.last for one in study.runs]}, {spent} steps")


def real_config(minilm: str, data: Path, folder: Path) -> str:
    rows = (data / "trec6" / "train.jsonl").read_text().splitlines()
    held_out = (data / "trec6" / "dev.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[:160]) + "\n")
    (folder / "val.jsonl").write_text("\n".join(held_out[:60]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(held_out[60:120]) + "\n")
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "val", "test")}
    settings = {
        "model": {"class_path": "SequenceClassification", "init_args": {"pretrained": minilm, "learning_rate": 3e-4}},
        "data": {"class_path": "ClassificationData", "init_args": {**files, "max_length": 24, "batch_size": 16}},
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "val_check_interval": 0.5, "gradient_clip_val": 1.0},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)
