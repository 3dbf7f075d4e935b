"""Callbacks that average weights, in two processes: whole models (DDP) and sharded ones (FSDP2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.callbacks.averaging_ranks import MAKES, single
from tests.ranks import run_ranks
from tests.strangers import identical


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.averaging_ranks:run", tmp_path)
    for name in MAKES:
        expected = single(name)
        for how in ("ddp", "fsdp2"):
            one, other = first[f"{how}/{name}"], second[f"{how}/{name}"]
            assert identical(one, other)
            for key, value in expected.items():
                torch.testing.assert_close(one[key], value, rtol=0, atol=1e-5)
        assert identical(first[f"resumed/{name}"], first[f"fsdp2/{name}"])
        saved = first[f"saved/{name}"]
        assert identical({k: saved[k] for k in first[f"fsdp2/{name}"]}, first[f"fsdp2/{name}"])
