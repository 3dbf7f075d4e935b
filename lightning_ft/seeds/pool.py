"""Workers of one machine: processes of their own, begun again when they die."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from lightning_ft.seeds.board import Board
from lightning_ft.seeds.cells import SeedSettings
from lightning_ft.seeds.job import Test, Train
from lightning_ft.seeds.storage import close_storage, open_storage
from lightning_ft.seeds.study import study_record
from lightning_ft.seeds.worker import Barrier, Patience, advance, over, work

# Not forked: a process that has trained with threads or a GPU cannot be.
CONTEXT: BaseContext = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Assignment:
    """What a worker needs to know; it is sent to another process.

    Args:
        name: Of the study.
        settings: Its settings.
        train: Trains a phase of a run: a function of a module, or an object of a class of one.
        out: Folder of the study.
        url: Of its storage; None for a journal in ``out``.
        test: Scores the chosen run on the test data.
        patience: How long to wait for others.
    """

    name: str
    settings: SeedSettings
    train: Train
    out: Path
    url: str | None = None
    test: Test | None = None
    patience: Patience | None = None

    def board(self) -> Board:
        """The study, joined or begun."""
        return Board(open_storage(self.url, self.out), self.name, self.settings)

    def save_record(self, board: Board) -> None:
        """Write ``OUT/study.json``."""
        study_record(board.storage, self.name, self.out).save(self.out / "study.json")


def run_study(assignment: Assignment, *, workers: int = 1) -> None:
    """Work at a study with a number of processes until it is over. Other machines may join it with the same call.

    A process that dies is begun again, and takes over what it held. Of several processes each sees one CUDA device, in
    turn; one alone sees all. The threads of a process are those of the study. What they print goes to ``OUT/workers``.

    Args:
        assignment: The study.
        workers: Processes; 0 works in this one.

    Raises:
        ValueError: The study has other settings.
        RuntimeError: A worker ended by an error: the reason is in the file that is named.
    """
    board = assignment.board()
    if workers == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(assignment.settings.threads)
        try:
            work(board, assignment.train, assignment.out, test=assignment.test, patience=assignment.patience)
        finally:
            torch.set_num_threads(threads)
            assignment.save_record(board)
            close_storage(board.storage)
        return
    advance(board, Barrier(None), tested=assignment.test is not None)  # once, and not by all workers
    processes = [_start(assignment, number, workers) for number in range(workers)]
    try:
        while any(process.exitcode != 0 for process in processes):
            for number, process in enumerate(processes):
                if process.exitcode is not None and process.exitcode > 0:
                    raise RuntimeError(f"a worker ended by an error:\n{_last_words(assignment.out, number)}")
                # A signal has killed it, or the system was out of memory.
                if process.exitcode is not None and process.exitcode < 0 and not over(board.cells(), board.settings):
                    processes[number] = _start(assignment, number, workers)
                elif process.exitcode is not None and process.exitcode < 0:
                    return
            assignment.save_record(board)
            _wait(processes, 1.0)
    finally:
        _stop(processes)
        assignment.save_record(board)
        close_storage(board.storage)


def _wait(processes: list[BaseProcess], seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def _start(assignment: Assignment, number: int, workers: int) -> BaseProcess:
    settings = {"OMP_NUM_THREADS": str(assignment.settings.threads), **(_device(number) if workers > 1 else {})}
    with _environment(settings):
        process: BaseProcess = CONTEXT.Process(target=_worker, args=(assignment, number), daemon=False)  # type: ignore[attr-defined]
        process.start()
    return process


def _device(number: int) -> dict[str, str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    devices = given.split(",")[:count] if given else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _log(out: Path, number: int) -> Path:
    return out / "workers" / f"worker_{number}_{os.getpid()}.log"


def _last_words(out: Path, number: int) -> str:
    file = _log(out, number)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return "\n".join([*lines[-5:], f"(all of it: {file})"])


def _worker(assignment: Assignment, number: int) -> None:
    """What a process of the pool does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    file = assignment.out / "workers" / f"worker_{number}_{parent.pid}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        torch.set_num_threads(assignment.settings.threads)
        _end_with(parent)
        try:
            work(
                assignment.board(),
                assignment.train,
                assignment.out,
                test=assignment.test,
                patience=assignment.patience,
            )
        except Exception:  # noqa: BLE001  # said in the log, which the parent quotes
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def _end_with(parent: BaseProcess) -> None:
    """End when the parent does, however it does: nobody else would know of this process."""
    import threading

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()
