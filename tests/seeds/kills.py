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
from unittest import mock

from lightning_ft.seeds.board import Board
from lightning_ft.seeds.cells import SeedSettings
from lightning_ft.seeds.pool import Assignment, run_study
from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.storage import close_storage, open_storage
from lightning_ft.seeds.study import study_record
from lightning_ft.seeds.worker import Patience
from tests.seeds.toy import ToyTest, ToyTrain
from tests.warm import CONTEXT


class Killer(threading.Thread):
    """Kills a worker, chosen at random, after random numbers of steps of all: however slow the machine is.

    Args:
        log: The file that gets a line for each step.
        every: Mean number of steps between two kills.
    """

    def __init__(self, log: Path, every: float) -> None:
        super().__init__(daemon=True)
        self.log, self.every = log, every
        self.killed = 0
        self.over = threading.Event()
        self.random = random.Random(0)

    def run(self) -> None:
        at = 0.0
        while not self.over.wait(0.02):
            if self.log.exists() and self.log.read_bytes().count(b"\n") >= at and (workers := children()):
                os.kill(self.random.choice(workers), signal.SIGKILL)
                self.killed += 1
                at = self.log.read_bytes().count(b"\n") + self.random.expovariate(1 / self.every)


def children() -> list[int]:
    """Processes below this one that multiprocessing made to work, and not its helpers."""
    below: dict[int, list[int]] = {}
    commands: dict[int, bytes] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            commands[int(entry.name)] = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if state != "Z":
            below.setdefault(int(parent), []).append(int(entry.name))
    mine = below.get(os.getpid(), [])
    spawned = [pid for pid in mine if b"spawn_main" in commands[pid]]
    return spawned + [child for pid in mine if b"forkserver" in commands[pid] for child in below.get(pid, [])]


def killed_study(out: Path, url: str | None, runs: int, *, every: float) -> tuple[SeedStudy, Sequence[Any], int]:
    """The study when it is over, all its trials, and how often a worker was killed."""
    settings = SeedSettings(runs=runs, keep=runs // 4, told={"kind": "toy"})
    train, test = ToyTrain(out / "log", seconds=0.02), ToyTest(out / "log")
    patience = Patience(lease=10, poll=0.1)
    killer = Killer(out / "log", every)
    killer.start()
    try:
        with mock.patch("lightning_ft.seeds.pool.CONTEXT", CONTEXT):
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
