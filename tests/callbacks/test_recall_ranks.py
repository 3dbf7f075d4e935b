from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.callbacks.recall_ranks import CALLBACKS, SHARED, train
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.callbacks.recall_ranks:run", tmp_path_factory.mktemp("recall"))


@pytest.mark.parametrize("sharding", SHARED)
@pytest.mark.parametrize("name", CALLBACKS)
def test_two_processes_do_what_one_does(name: str, sharding: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[f"{sharding}/{name}"] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, train(None, name).weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_each_rank_draws_its_own_units_and_none_parts_from_the_other(ranks: list[dict[str, Any]]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(*(rank["own draws"] for rank in ranks), strict=True))
    assert not set(ranks[0]["draws"]) & set(ranks[1]["draws"])


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_sharded_resume_is_the_uninterrupted_run(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        straight, again = rank[f"straight/{name}"], rank[f"again/{name}"]
        assert all(torch.equal(a, b) for a, b in zip(again, straight, strict=True))
        assert len(again) > 1


def test_fsdp1_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert all("does not run under FullyShardedDataParallel (FSDP1)" in message for message in rank["fsdp1"])
