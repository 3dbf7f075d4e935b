"""What all heads share: the contract, weights of micro-batches, gradient checkpointing, rows and their names."""

from __future__ import annotations

from pathlib import Path

import transformers as hf
from datasets import Dataset

from lightning_ft.data import ClassificationData
from lightning_ft.modules import SequenceClassification
from tests.pretrained import CORPUS, check_head, pretrained


def rows(count: int) -> Dataset:
    words = " ".join(CORPUS).split()
    texts = [" ".join(words[i % 40 : i % 40 + 3 + i % 9]) for i in range(count)]
    return Dataset.from_dict(
        {"text": texts, "label": [i % 3 for i in range(count)], "name": [f"r{i}" for i in range(count)]}
    )


def test_contract(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    check_head(
        lambda: SequenceClassification(folder, labels=["0", "1", "2"], learning_rate=1e-3),
        lambda: ClassificationData(folder, rows(48), rows(7), predict=rows(5), batch_size=8),
        hf.AutoModelForSequenceClassification,
        tmp_path,
    )
