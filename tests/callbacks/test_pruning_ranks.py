"""Pruning on two ranks is pruning on one, and ranks never part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.callbacks.pruning_ranks import MAKES, train
from tests.ranks import run_ranks

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
