"""A run that costs nothing: scores that are a function of its seeds and steps, kept in a checkpoint of its own."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ft.core.files import atomic_file
from lightning_ft.functional.seed_pruning import rung_step
from lightning_ft.seeds.job import Job, checkpoint_file
from lightning_ft.seeds.record import Evaluation

HORIZON = 20


def toy_score(init: int, order: int, step: int) -> float:
    """Rises with the steps, to a height that the seeds decide."""
    return (0.5 + ((init * 37 + order * 101) % 89) / 200) * (0.6 + 0.4 * step / HORIZON)


@dataclass(frozen=True)
class ToyTrain:
    """Counts its steps in a file, evaluates at each fourth, and writes down which cells it began.

    Args:
        log: A file that gets a line for each step of each run.
        seconds: Of a step.
        nan: Runs whose score is no number.
    """

    log: Path
    seconds: float = 0.0
    nan: tuple[int, ...] = ()

    def __call__(self, job: Job) -> Sequence[Evaluation]:
        state = {"step": 0, "evaluations": []} if job.checkpoint is None else json.loads(job.checkpoint.read_text())
        evaluations = [Evaluation(*one) for one in state["evaluations"]]
        rungs = [rung_step(HORIZON, at) for at in job.settings.rungs]
        job.progress.report(evaluations, horizon=HORIZON)
        step = state["step"]
        while step < HORIZON:
            job.progress.at(step)
            if step in rungs:  # a checkpoint of the rung is from before the run was judged there
                last = evaluations[-1]
                if job.decide is None or not job.decide(last.score, last.loss, last.step):
                    break
            time.sleep(self.seconds)
            step += 1
            with self.log.open("a") as file:
                file.write(f"{job.run} {job.phase} {step}\n")
            if step in rungs or step % 4 == 0 or step == HORIZON:
                score = math.nan if job.run in self.nan else toy_score(job.init, job.order, step)
                evaluations.append(Evaluation(step, score, 1 - score))
                job.progress.report(evaluations, horizon=HORIZON)
            with atomic_file(checkpoint_file(job.folder)) as file:
                rows = [[one.step, one.score, one.loss] for one in evaluations]
                file.write_text(json.dumps({"step": step, "evaluations": rows}))
        job.progress.at(step)
        return evaluations


@dataclass(frozen=True)
class ToyTest:
    """Scores by the run's number, and writes down that it did."""

    log: Path

    def __call__(self, job: Job) -> float:
        assert job.checkpoint is not None
        assert json.loads(job.checkpoint.read_text())["step"] == HORIZON
        with self.log.open("a") as file:
            file.write(f"{job.run} test 0\n")
        return 1000.0 + job.run
