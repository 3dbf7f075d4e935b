"""Two processes draw the same gates and projections, never part, and do what one does with the batches of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.callbacks.subspace_ranks import MAKES, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.callbacks.subspace_ranks:run", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MAKES)
def test_ranks_never_part_and_do_what_one_process_does(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert len(first["parameters"]) == 12
    for what in ("parameters", "read"):
        assert all(torch.equal(a, b) for a, b in zip(first[what], second[what], strict=True))
    assert first["kept"] == second["kept"]
    single = train(name, strategy="auto", devices=1)
    for what in ("parameters", "read"):
        for a, b in zip(first[what], single[what], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.equal(first["read"][0], first["read"][-1])
