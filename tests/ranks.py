"""Run a function in two processes that form a DDP group."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import socket
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.warm import ended, start

RANKS = 2


def run_ranks(function: str, folder: Path) -> list[Any]:
    """What a function without arguments, named ``module:function``, returns on each rank.

    Once in several hundred runs torch itself dies: a thread of its gloo backend (``pt_gloo_runloop``) finds the heap
    of the C library broken in ``malloc``, in whatever test it is. A group with such an end is started once more, and
    that is printed; a second one fails, as does anything else at once.

    Args:
        function: It trains with ``strategy=DDPStrategy(process_group_backend="gloo"), devices=2, accelerator="cpu"``
            and returns what a weights-only load admits.
        folder: An empty folder.
    """
    codes, said = _attempt(function, folder)
    if -signal.SIGSEGV in codes:
        print(f"{function}: a process was ended by SIGSEGV, and is started once more\n{said}", flush=True)
        codes, said = _attempt(function, folder)
    assert codes == [0] * RANKS, said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _attempt(function: str, folder: Path) -> tuple[list[int | None], str]:
    """Exit codes, and the end of each rank's output: one that lost its peer would else hide why the peer died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(RANKS)]
    processes = [
        start(main, rank, port, folder, function, cwd=Path(__file__).parents[1], environment=environment, log=log)
        for rank, log in enumerate(logs)
    ]
    codes = ended(*processes)
    ends = zip(codes, (log.read_text(errors="replace") for log in logs), strict=True)
    return codes, "\n".join(f"rank {rank}, exit {code}:\n{text[-4000:]}" for rank, (code, text) in enumerate(ends))


def main(rank: int, port: int, out: Path, function: str) -> None:
    """What each process does."""
    faulthandler.enable()
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ.update(settings, LOCAL_RANK=str(rank), RANK=str(rank), HF_HUB_OFFLINE="1")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    torch.set_num_threads(1)
    module, name = function.split(":")
    torch.save(getattr(importlib.import_module(module), name)(), out / f"{rank}.pt")
