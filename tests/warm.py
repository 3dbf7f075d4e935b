"""Processes of their own that need not import torch, Lightning and transformers first, which takes six seconds each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# Forked from a process that has imported all this and done nothing: no thread runs in it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "lightning_ft.cli",
        "lightning_ft.callbacks",
        "lightning_ft.data",
        "lightning_ft.seeds.pool",
        "optuna.storages",
        "torch.distributed.fsdp",
    ]
)


def start(
    function: Callable[..., Any], *arguments: Any, cwd: Path, environment: Mapping[str, str], log: Path
) -> BaseProcess:
    """Call a function of a module in a process.

    Args:
        function: Its name and arguments are sent there.
        arguments: Its arguments.
        cwd: Working directory.
        environment: All of it.
        log: File that gets what it prints, also what C code does.
    """
    process: BaseProcess = CONTEXT.Process(target=_begin, args=(cwd, dict(environment), log, function, *arguments))  # type: ignore[attr-defined]
    process.start()
    return process


def ended(*processes: BaseProcess, seconds: float = 300) -> list[int | None]:
    """Exit codes. What has not ended in time is killed."""
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _begin(cwd: Path, environment: dict[str, str], log: Path, function: Callable[..., Any], *arguments: Any) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))  # who forked this has read it long ago
    sys.stdin = open(os.devnull)  # noqa: SIM115  # for as long as the process lives
    function(*arguments)
