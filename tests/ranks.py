"""Run a function in two processes that form a DDP group: ``python -m tests.ranks RANK PORT OUT MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import os
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

    Args:
        function: It trains with ``strategy=DDPStrategy(process_group_backend="gloo"), devices=2, accelerator="cpu"``
            and returns what a weights-only load admits.
        folder: An empty folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(rank), str(port), str(folder), function],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
    # The end of each rank's output: one that only lost its peer would else hide why the peer died.
    said = [
        f"rank {rank}, exit {code}:\n{text[-4000:]}"
        for rank, (code, text) in enumerate(zip(codes, outputs, strict=True))
    ]
    assert codes == [0] * RANKS, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


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
