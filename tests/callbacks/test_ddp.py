"""Two processes with DDP against one, on the same global batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp_worker import NOT_WRAPPED, RANKS, REFUSED, SCENARIOS, UNCHECKED, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
TENSORS = [4, 12, 12, 12, 1]
"""Of each unit: classifier and final norm, three blocks, the embedding."""
GRADUAL = [4, 16, 28, 40, 41]
CHAIN = [4, 1, 12, 41]
TRAINABLE = {
    "phases": [2, 14, 38, 41],
    "chain-thaw": CHAIN,
    "chain-thaw-metric": CHAIN,
    # 14 tensors belong to norms, four of them to each block.
    "norms": [16, 24, 32, 40, 41],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.ddp_worker"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)],
            cwd=root,
            env=environment,
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
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(outputs)[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_never_part_and_do_what_one_process_does(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first["trace"], second["trace"], strict=True))

    single = train(SCENARIOS[name], strategy="auto", devices=1)
    assert first["trainable"] == second["trainable"] == single["trainable"]
    assert [count for count, _ in groupby(single["trainable"])] == TRAINABLE.get(name, GRADUAL)
    for a, b in zip(first["trace"], single["trace"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_ranks_part_where_the_model_is_not_wrapped_anew(ranks: list[dict[str, Any]]) -> None:
    """What the test above would show without ``rewrap_ddp``; it compares what can differ."""
    (name,) = UNCHECKED
    first, second = (rank[name] for rank in ranks)
    equal = [torch.equal(a, b) for a, b in zip(first["trace"], second["trace"], strict=True)]
    assert first["trainable"][:3] == [TENSORS[0], TENSORS[0], TENSORS[0] + TENSORS[1]]
    assert equal == [True, True, *[False] * (len(equal) - 2)]
    assert (first["trace"][-1] - second["trace"][-1]).abs().max() > 1e-3


def test_the_audit_stops_ranks_that_have_parted(ranks: list[dict[str, Any]]) -> None:
    (name,) = NOT_WRAPPED
    for rank in ranks:
        assert "GradualUnfreezing: at step 4 the trainable parameters differ between ranks" in rank[name]["error"]
        assert len(rank[name]["trace"]) == 4


def test_what_cannot_work_is_refused_with_the_remedy(ranks: list[dict[str, Any]]) -> None:
    remedies = {"static-graph": "remove static_graph=True", "missing-metric": "logged were: score. Name one of these"}
    assert remedies.keys() == REFUSED.keys()
    for rank in ranks:
        assert all(remedy in rank[name]["error"] for name, remedy in remedies.items())
