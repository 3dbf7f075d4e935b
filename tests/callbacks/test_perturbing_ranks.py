"""Two DDP processes against one with the batches of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.perturbing_ranks import METHODS, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("perturbing")
    return run_ranks("tests.callbacks.perturbing_ranks:run", folder)


@pytest.mark.parametrize("name", [*METHODS, "free-lb/2"])
def test_two_processes_do_what_one_does(name: str, ranks: list[dict[str, Any]]) -> None:
    method, _, windows = name.partition("/")
    alone = train(method, accumulate_grad_batches=int(windows or 1))
    for key, value in alone.items():
        assert torch.equal(ranks[0][name][key], ranks[1][name][key])
        torch.testing.assert_close(ranks[0][name][key], value, rtol=0, atol=1e-5)
