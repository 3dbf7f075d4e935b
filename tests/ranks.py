"""Run a function in two processes that form a DDP group: ``python -m tests.ranks RANK PORT OUT MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

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


def _attempt(function: str, folder: Path) -> tuple[list[int], str]:
    """Exit codes, and the end of each rank's output: one that lost its peer would else hide why the peer died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(rank), str(port), str(folder), function],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    ends = zip(codes, outputs, strict=True)
    return codes, "\n".join(f"rank {rank}, exit {code}:\n{text[-4000:]}" for rank, (code, text) in enumerate(ends))


def main(rank: str, port: str, out: str, function: str) -> None:
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ.update(settings, LOCAL_RANK=rank, RANK=rank, HF_HUB_OFFLINE="1")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    torch.set_num_threads(1)
    module, name = function.split(":")
    torch.save(getattr(importlib.import_module(module), name)(), Path(out) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
