"""Two processes, DDP and sharded, against one with the batches of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.callbacks.perturbing_ranks import METHODS, SHARDED, train
from tests.ddp_worker import Module
from tests.ranks import run_ranks
from tests.sharded_worker import HeadFirst

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
RUNS = [
    *(f"{name}/ddp" for name in METHODS),
    "free-lb/accumulated",
    *(f"{name}/fsdp2" for name in SHARDED),
    "free-lb/fsdp2-whole",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.callbacks.perturbing_ranks:run", tmp_path_factory.mktemp("perturbing"))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(name: str, ranks: list[dict[str, Any]]) -> None:
    method, _, way = name.partition("/")
    module = HeadFirst() if way.startswith("fsdp2") else Module()
    alone = train(method, module, accumulate_grad_batches=2 if way == "accumulated" else 1)
    assert alone
    for first, second, single in zip(ranks[0][name], ranks[1][name], alone, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, single, rtol=0, atol=1e-5)


def test_fsdp1_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "FreeLB does not run under FullyShardedDataParallel (FSDP1)" in rank["fsdp1"]
