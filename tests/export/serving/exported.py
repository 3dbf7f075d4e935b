"""A small exported classifier, what its checkpoint answers, and a world without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_ft.export import export_onnx
from lightning_ft.modules import SequenceClassification
from tests.pretrained import pretrained

LABELS = ["no", "yes", "ćma"]
ALONE = ("onnxruntime", "tokenizers", "numpy", "numpy.libs", "flatbuffers", "google")
"""Packages that a predictor needs, with their own."""


def classifier(place: Path) -> Path:
    """An exported folder, ``place/out``; the checkpoint is beside it, in ``place/model``."""
    path = pretrained(place / "model", "bert", hf.AutoModelForSequenceClassification, initializer_range=0.4)
    module = SequenceClassification(path, LABELS)
    module.model.save_pretrained(place / "model")
    export_onnx(module, place / "out", max_length=32)
    return place / "out"


def as_checkpoint(out: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Answers of the checkpoint that was exported to ``out``, each text by itself."""
    path = out.parent / "model"
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    model = hf.AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=130, return_tensors="pt")
        with torch.inference_mode():
            shares = model(**inputs).logits[0].softmax(-1)
        found.append({"label": LABELS[int(shares.argmax())], "probabilities": shares.tolist()})
    return found


def assert_same(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def link_packages(place: Path) -> Path:
    """A folder with what a predictor needs and no other package, for a path of modules."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    here = Path(spec.origin).parents[1]
    place.mkdir()
    for name in ALONE:
        if (here / name).exists():
            (place / name).symlink_to(here / name)
    return place


def forbid(place: Path, names: Sequence[str]) -> Path:
    """A folder that, on the path of modules, makes importing packages an error in every process of Python."""
    place.mkdir()
    code = f"""\
import sys


class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {tuple(names)!r}:
            raise ImportError(f"{{name}} is not to be imported here")


sys.meta_path.insert(0, Forbidden())
"""
    (place / "sitecustomize.py").write_text(code, encoding="utf-8")
    return place
