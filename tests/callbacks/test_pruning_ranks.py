"""Pruning on two ranks is pruning on one, and ranks never part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.callbacks.pruning_ranks import MAKES, train, train_sharded
from tests.ranks import run_ranks
from tests.sharded_worker import SHARDINGS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.callbacks.pruning_ranks:run", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MAKES)
def test_two_ranks_do_what_one_process_does(name: str, ranks: list[dict[str, Any]]) -> None:
    """Without `find_unused_parameters`, with dropped blocks, too."""
    first, second = (rank[name] for rank in ranks)
    assert len(first) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, train(name), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.callbacks.pruning_ranks:run_sharded", tmp_path_factory.mktemp("sharded"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDINGS)
def test_blocks_of_a_sharded_model_are_dropped(name: str, sharded: list[dict[str, Any]]) -> None:
    single = train_sharded(None)
    for rank in sharded:
        assert rank[name].keys() == single.keys()
        for key, value in single.items():
            torch.testing.assert_close(rank[name][key], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_sharded_says_so(sharded: list[dict[str, Any]]) -> None:
    for rank in sharded:
        assert "MovementPruning chooses among all scores of a matrix, and under FSDP" in rank["movement"]
        assert "HeadImportance runs the model by itself, and under FSDP" in rank["heads"]
