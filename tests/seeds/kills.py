"""A study of toy runs by four workers, of which one or another is killed again and again."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ft.seeds.board import Board
from lightning_ft.seeds.cells import SeedSettings
from lightning_ft.seeds.pool import Assignment, run_study
from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.storage import close_storage, open_storage
from lightning_ft.seeds.study import study_record
from lightning_ft.seeds.worker import Patience
from tests.seeds.toy import ToyTest, ToyTrain


class Killer(threading.Thread):
    """Kills a worker of this process, chosen at random, at random times.

    Args:
        every: Mean seconds between two kills.
        most: How many at most.
    """

    def __init__(self, every: float, most: int) -> None:
        super().__init__(daemon=True)
        self.every, self.most = every, most
        self.killed = 0
        self.over = threading.Event()
        self.random = random.Random(0)

    def run(self) -> None:
        while self.killed < self.most and not self.over.wait(self.random.expovariate(1 / self.every)):
            # Some are hit while they start, some while they hold a lock, some while they train.
            if workers := _children():
                os.kill(self.random.choice(workers), signal.SIGKILL)
                self.killed += 1


def _children() -> list[int]:
    """Processes of this one that multiprocessing spawned to work, and not its tracker of resources."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if int(status[1]) == os.getpid() and b"spawn_main" in command and status[0] != "Z":
            found.append(int(entry.name))
    return found


def killed_study(
    out: Path, url: str | None, runs: int, *, every: float, most: int
) -> tuple[SeedStudy, Sequence[Any], int]:
    """The study when it is over, all its trials, and how often a worker was killed."""
    settings = SeedSettings(runs=runs, keep=runs // 4, told={"kind": "toy"})
    train, test = ToyTrain(out / "log", seconds=0.02), ToyTest(out / "log")
    patience = Patience(lease=5, poll=0.1)
    killer = Killer(every, most)
    killer.start()
    try:
        run_study(Assignment("toys", settings, train, out, url, test, patience), workers=4)
    finally:
        killer.over.set()
        killer.join()
    storage = open_storage(url, out)
    try:
        board = Board(storage, "toys")
        return study_record(storage, "toys", out), board.trials(), killer.killed
    finally:
        close_storage(storage)


def told(trials: Sequence[Any]) -> Counter[tuple[int, str]]:
    """How often each phase of each run was told, over all trials that there are."""
    return Counter(
        (trial.user_attrs["run"], trial.user_attrs["phase"])
        for trial in trials
        if "phase" in trial.user_attrs and trial.state.name in ("COMPLETE", "PRUNED")
    )
