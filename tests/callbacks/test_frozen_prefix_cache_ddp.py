"""The cache in two processes with DDP, against one process with and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.prefix_ranks import SCENARIOS, run
from tests.ranks import run_ranks
from tests.strangers import ROWS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PREFIX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def ranks(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks("tests.callbacks.prefix_ranks:on_each_rank", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_stay_equal_and_do_what_one_process_does_without_a_cache(name: str, ranks: list[Any]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first["trace"], second["trace"], strict=True))
    single = run(name, cached=False, strategy="auto", devices=1)
    for a, b in zip(first["trace"], single["trace"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    places = [row[0] for row in first["rows"]]
    assert places == (
        ["what enters the head"] if name == "head only" else [f"the output of block {k} of 3" for k in (3, 2, 1)]
    )
    if name != "rows as they come":
        # Half of the rows, those of this rank: the loader of this module is split by hand.
        assert all(row[1:] == [ROWS // 2, 1.0] for row in first["rows"])


def test_one_store_on_disk_serves_what_both_ranks_hold(ranks: list[Any], shared: Path) -> None:
    stores = sorted(path.name for path in shared.iterdir())
    assert len(stores) == 6  # three depths of two sets of rows
    assert not any(name.startswith(".") for name in stores)
