"""What an interrupted prediction may go on from: the same inputs, and at least a row for each process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_ft.callbacks import WritePredictions
from lightning_ft.data import (
    ClassificationData,
    ClozeData,
    InstructionData,
    LanguageModelingData,
    MultipleChoiceData,
    QuestionAnsweringData,
    Seq2SeqData,
    TextData,
    TokenClassificationData,
)
from lightning_ft.modules import SequenceClassification
from tests.pretrained import Kind, pretrained, tokenizer
from tests.ranks import run_ranks

TEXTS = ["the film is dull", "a story", "people who sing in London"]
OTHERS = ["the story is good", "a film", "people who live in London"]
COLUMNS: dict[str, list[Any]] = {
    "text": TEXTS,
    "other": OTHERS,
    "first": ["film"] * 3,
    "second": ["story"] * 3,
    "name": ["a", "b", "c"],
}
CLOZE = {"verbalizer": {"bad": "dull", "fine": "well"}}
CHANGES: dict[str, tuple[type[TextData], Kind, dict[str, Any], dict[str, Any]]] = {
    "text": (ClassificationData, "bert", {}, {"text": "other"}),
    "pairs": (ClassificationData, "bert", {}, {"text_pair": "other"}),
    "length": (ClassificationData, "bert", {"max_length": 5}, {"max_length": 6}),
    "names": (ClassificationData, "bert", {"id": "name"}, {"id": "first"}),
    "words": (TokenClassificationData, "bert", {"text": "text"}, {"text": "other"}),
    "prefix": (Seq2SeqData, "t5", {"source": "text", "prefix": "is "}, {"prefix": "the "}),
    "order": (
        QuestionAnsweringData,
        "bert",
        {"question": "text", "context": "other", "max_length": 32, "stride": 8},
        {"context_first": True},
    ),
    "template": (
        InstructionData,
        "gpt2",
        {"instruction": "text", "input": None, "template": "{instruction}\na"},
        {"template": "{instruction}\nb"},
    ),
    "choices": (
        MultipleChoiceData,
        "bert",
        {"context": "text", "choices": ["first", "second"]},
        {"choices": ["second", "first"]},
    ),
    "objective": (LanguageModelingData, "roberta", {"objective": "mlm"}, {"objective": "clm"}),
    "pattern": (ClozeData, "bert", {"patterns": "{text} is {mask}", **CLOZE}, {"patterns": "{text} was {mask}"}),
    "calibration": (ClozeData, "bert", {"patterns": "{text} is {mask}", **CLOZE}, {"calibrate": True}),
    "verbalizer": (
        ClozeData,
        "bert",
        {"patterns": "{text} is {mask}", **CLOZE},
        {"verbalizer": {"bad": "well", "fine": "dull"}},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_predictions_decides_their_identity(change: str, tmp_path: Path) -> None:
    kind, words, options, changes = CHANGES[change]
    tokenizer(words).save_pretrained(tmp_path)
    make: Callable[..., Any] = kind
    rows = Dataset.from_dict(COLUMNS)

    def identity(rows: Dataset, **settings: Any) -> str:
        data = make(str(tmp_path), predict=rows, **{**options, **settings})
        data.setup("predict")
        known: str = data.prediction_identity()
        return known

    same = identity(rows)
    assert same == identity(rows)
    assert same == identity(rows, eval_batch_size=1, batch_size=2, seed=7)
    assert same != identity(rows, **changes)
    assert same != identity(rows.select([0, 2, 1]))


class Count(Callback):
    batches = 0

    def on_predict_batch_end(self, *args: Any) -> None:
        self.batches += 1


class Interrupt(Callback):
    def on_predict_batch_end(self, *args: Any) -> None:
        raise KeyboardInterrupt


def ddp_predict() -> list[int]:
    """For `run_ranks`: a prediction that both ranks leave after their only batch, and its continuation."""
    folder, path = os.environ["FOLDER"], Path(os.environ["FOLDER"]).parent / "p.jsonl"
    counts = [Count(), Count()]
    for callbacks in ([Interrupt(), counts[0]], [counts[1]]):
        data = ClassificationData(folder, predict=numbered(8), eval_batch_size=4)
        trainer = Trainer(
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            accelerator="cpu",
            logger=False,
            callbacks=[WritePredictions(path), *callbacks],
        )
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            module = SequenceClassification(folder, labels=["0", "1"])
            trainer.predict(module, datamodule=data, return_predictions=False)
    return [count.batches for count in counts]


def numbered(count: int) -> Dataset:
    return Dataset.from_dict({"text": [" ".join(TEXTS[i % 3].split() * (1 + i // 3)) for i in range(count)]})


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_go_on_where_no_row_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification))
    (tmp_path / "out").mkdir()
    # Each rank predicts its four rows, and then one of them again.
    assert run_ranks("tests.data.test_prediction:ddp_predict", tmp_path / "out") == [[0, 1], [0, 1]]
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(8))
    assert not list(tmp_path.glob(".*.part"))
