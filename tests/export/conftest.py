"""Tiny models that write text, exported once for all tests of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers as hf

from lightning_ft.core.report import Report
from lightning_ft.export import export_onnx
from tests.pretrained import pretrained


class Written(NamedTuple):
    """A Hugging Face folder, what was exported from it, and the report."""

    source: Path
    folder: Path
    report: Report

    def model(self) -> Any:
        """The model, read anew."""
        paired = (self.folder / "encoder.onnx").exists()
        kind = hf.AutoModelForSeq2SeqLM if paired else hf.AutoModelForCausalLM
        return kind.from_pretrained(self.source).eval()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Written]:
    """A function from the name of a family to its export."""

    @functools.cache
    def make(kind: Any) -> Written:
        place = tmp_path_factory.mktemp(kind)
        # Large weights: with the usual 0.02 nothing would depend on the prompt.
        large: dict[str, Any] = {
            "t5": {"initializer_factor": 3.0, "tie_word_embeddings": False},
            "bart": {"init_std": 0.3},
        }.get(kind, {"initializer_range": 0.3})
        paired = kind in ("t5", "bart")
        auto = hf.AutoModelForSeq2SeqLM if paired else hf.AutoModelForCausalLM
        source = Path(pretrained(place / "source", kind, auto, **large))
        return Written(source, place / "out", export_onnx(source, place / "out", max_length=24))

    return make
