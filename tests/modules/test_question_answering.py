from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer

from lightning_ft import modules
from lightning_ft.data.question_answering import QuestionAnsweringData
from lightning_ft.metrics.squad import Squad
from lightning_ft.modules import load_checkpoint
from lightning_ft.modules.question_answering import QuestionAnswering
from tests.pretrained import CORPUS, Kind, check_head, pretrained

WORDS = [word for word in CORPUS[0].split() if word not in ("the", "a", ".")]  # of which normalisation leaves something


def rows(count: int, *, every: int = 3) -> Dataset:
    """Questions for the word after `word` in a shuffled sentence; every so many have no answer."""
    result = []
    for i in range(count):
        words = [WORDS[(5 * i + 3 * k) % len(WORDS)] for k in range(4 + i % 9)]
        answer = words[1 + i % (len(words) - 1)]
        context = " ".join(words)
        found = {"text": [answer], "answer_start": [context.index(answer)]}
        none = {"text": [], "answer_start": []}
        result.append(
            {
                "question": f"what is {answer} ?",
                "context": context,
                "answers": none if every and i % every == 0 else found,
                "name": f"q{i}",
            }
        )
    return Dataset.from_list(result)


def trainer(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", **{**quiet, **options})


def data(folder: str, train: Any = None, val: Any = None, **options: Any) -> QuestionAnsweringData:
    settings = {"max_length": 16, "stride": 3, "batch_size": 8, **options}
    return QuestionAnsweringData(folder, train, val, **settings)


def batch_of(folder: str, table: Dataset, **options: Any) -> dict[str, Any]:
    made = data(folder, val=table, **options)
    made.setup("validate")
    return next(iter(made.val_dataloader()))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_contract(kind: Kind, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", kind, hf.AutoModelForQuestionAnswering)
    width = {"bert": 16, "gpt2": 24}[kind]
    check_head(
        lambda: QuestionAnswering(folder, learning_rate=1e-3),
        lambda: data(folder, rows(*even(folder, width)), rows(9), predict=rows(7), max_length=width, id="name"),
        hf.AutoModelForQuestionAnswering,
        tmp_path,
    )


def even(folder: str, width: int) -> tuple[int]:
    """As many rows as make an even number of batches of eight windows, four or more."""
    for count in range(16, 60):
        made = data(folder, rows(count), max_length=width)
        made.setup("fit")
        if len(made.train_dataloader()) in (4, 6):
            return (count,)
    raise AssertionError


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "t5", "bart"])
def test_loss_is_the_models_own(kind: Kind, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", kind, hf.AutoModelForQuestionAnswering)
    module = QuestionAnswering(folder).eval()
    batch = batch_of(folder, rows(8), max_length=40)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    width = inputs["input_ids"].shape[1]
    positions = {name: batch[name].clone() for name in ("start_positions", "end_positions")}
    positions["start_positions"][0] = width  # past the window: ignored
    positions["start_positions"][1] = width + 7
    positions["end_positions"][2] = -100  # counts as 0, there as here
    for chosen in (batch, positions):
        labels = {name: chosen[name] for name in positions}
        theirs = module.model(**inputs, **labels)
        outputs = module(inputs)
        loss, items = module.loss(outputs, labels)
        torch.testing.assert_close(outputs, (theirs.start_logits, theirs.end_logits))
        assert abs(loss.item() - theirs.loss.item()) < 1e-6
        assert items == len(inputs["input_ids"])
    nothing = {name: torch.full_like(value, width) for name, value in positions.items()}
    assert module.loss(module(inputs), nothing)[0].item() == 0


class Stub(QuestionAnswering):
    """Logits that a batch brings along, in place of a model's."""

    def forward(self, batch: Any) -> Any:
        return batch["start_logits"], batch["end_logits"]


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return pretrained(tmp_path / "model", "bert", hf.AutoModelForQuestionAnswering)


def three_rows() -> dict[str, Any]:
    """Two windows of the first row and one each of two others; CLS, three words, padding."""
    return {
        "context": ["one two six ten", "one two six", "é two six"],
        "answers": [["two six"], [], ["two"]],
        "example": torch.tensor([0, 0, 1, 2]),
        "cls": torch.zeros(4, dtype=torch.int64),
        "char_starts": torch.tensor([[0, 0, 4, 8], [0, 4, 8, 12], [0, 0, 4, 8], [0, 0, 2, 6]]),
        "char_ends": torch.tensor([[0, 3, 7, 11], [0, 7, 11, 15], [0, 3, 7, 11], [0, 1, 5, 9]]),
        "start_logits": torch.tensor([[4.0, 0, 3, 0], [2, 2, 0, 1], [3, 0, 1, 0], [9, -50, 5, -50]]),
        "end_logits": torch.tensor([[4.0, 0, 1, 2], [0, 0, 4, 1], [3, 0, 1, 1], [9, -50, 5, -50]]),
    }


def test_predictions_by_hand(tiny: str) -> None:
    module = Stub(tiny, n_best=3)
    columns = module.predictions(three_rows())
    # Row 0: "two six" has 3 + 2 in the first window and 2 + 4 in the second; no answer 8 in the first, 2 in the second.
    assert columns["null_score"] == [2 - 6, 6 - 2, 18 - 10]
    assert columns["answer"] == ["two six", "", ""]
    assert list(zip(columns["start"], columns["end"], strict=True)) == [(4, 11), (0, 0), (0, 0)]
    first = columns["n_best"][0]
    assert len(first) == 4
    others = [6.0, 4.0, 4.0, 2.0]  # "six" alone is 0 + 4 in the second window, "two" 3 + 1 in the first
    shares = torch.tensor(others).softmax(0).tolist()
    assert columns["score"][0] == pytest.approx(shares[0])
    assert [span["score"] for span in first] == pytest.approx(shares)
    assert first[0] == {"text": "two six", "score": pytest.approx(shares[0]), "start": 4, "end": 11}
    assert {span["text"] for span in first[1:3]} == {"two", "six"}
    assert first[3]["text"] == ""
    assert columns["n_best"][1][0]["text"] == ""
    assert [
        row[span["start"] : span["end"]]
        for row, n_best in zip(three_rows()["context"], columns["n_best"], strict=True)
        for span in n_best
    ] == [span["text"] for n_best in columns["n_best"] for span in n_best]
    json.dumps(columns)
    for threshold, answers in (
        (4.0, ["two six", "two six", ""]),
        (-4.5, ["", "", ""]),
        (8.0, ["two six", "two six", "two"]),
    ):
        module.no_answer_threshold.fill_(threshold)
        found = module.predictions(three_rows())["answer"]
        assert [found[0], bool(found[1]), found[2]] == [answers[0], bool(answers[1]), answers[2]]
    sure = Stub(tiny, no_answer=False, n_best=2).predictions(three_rows())
    assert sure["answer"][0] == "two six"
    assert sure["answer"][2] == "two"
    assert all(sure["answer"])
    assert "null_score" not in sure
    assert sure["score"][0] == pytest.approx(torch.tensor([6.0, 4.0]).softmax(0)[0].item())
    assert sure["score"][2] == pytest.approx(1)


def test_the_threshold_is_tuned_in_validation_and_carried_along(tiny: str, tmp_path: Path) -> None:
    class Fixed(QuestionAnswering):
        def forward(self, batch: Any) -> Any:
            # Constant weights of the words: what differs is how much speaks for CLS.
            start, end = super().forward(batch)
            ids = batch["input_ids"].float()
            bump = torch.zeros_like(start).scatter_(1, batch["cls"][:, None], 3.0) if "cls" in batch else 0
            return start + torch.sin(ids) + bump, end + torch.cos(ids) + bump

    made = data(tiny, rows(24), rows(12), test=rows(12))
    module = Fixed(tiny, no_answer_threshold=100.0)
    runner = trainer(max_epochs=1)
    runner.fit(module, datamodule=made)
    threshold = module.no_answer_threshold.item()
    assert threshold != 100
    # By hand: from the columns of a prediction, at the threshold and without.
    values = runner.validate(module, datamodule=made, verbose=False)[0]
    assert values["val_best_f1_thresh"] == module.no_answer_threshold.item() == threshold
    assert values["val_f1"] == pytest.approx(values["val_best_f1"])
    made = data(tiny, predict=rows(12))
    predicted = trainer().predict(module, datamodule=made) or []
    answers = [answer for part in predicted for answer in part["answer"]]
    nulls = [value for part in predicted for value in part["null_score"]]
    assert [answer == "" for answer in answers] == [value > threshold for value in nulls]
    metric = Squad()
    metric.update(answers, [row["answers"]["text"] for row in rows(12)])
    assert metric.compute()["f1"].item() == pytest.approx(values["val_f1"])
    tested = runner.test(module, datamodule=data(tiny, test=rows(12)), verbose=False)[0]
    assert tested["test_f1"] == pytest.approx(values["val_f1"])
    assert module.no_answer_threshold.item() == threshold
    runner.save_checkpoint(tmp_path / "a.ckpt")
    modules.Fixed = Fixed  # type: ignore[attr-defined]
    try:
        assert load_checkpoint(tmp_path / "a.ckpt").no_answer_threshold.item() == threshold
    finally:
        del modules.Fixed  # type: ignore[attr-defined]


def test_the_sanity_check_tunes_nothing_and_test_takes_the_threshold_as_it_is(tiny: str) -> None:
    module = QuestionAnswering(tiny, no_answer_threshold=-1e6)
    trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=1, check_val_every_n_epoch=2
    ).fit(module, datamodule=data(tiny, rows(16), rows(8)))
    assert module.no_answer_threshold == -1e6
    (results,) = trainer().test(module, datamodule=data(tiny, test=rows(9)), verbose=False)
    assert results["test_no_ans_exact"] == 100
    assert results["test_has_ans_exact"] == 0
    assert results["test_exact"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("no_answer", [True, False])
def test_without_unanswerable_rows_every_question_is_answered(no_answer: bool, tiny: str) -> None:
    module = QuestionAnswering(tiny, no_answer=no_answer, no_answer_threshold=-1e6)
    runner = trainer(max_epochs=1)
    (values,) = runner.validate(module, datamodule=data(tiny, val=rows(9, every=0)), verbose=False)
    assert module.no_answer_threshold == math.inf
    assert set(values) == {"val_loss", "val_exact", "val_f1"}
    predicted = runner.predict(module, datamodule=data(tiny, predict=rows(9))) or []
    assert all(answer for part in predicted for answer in part["answer"])


def test_learns_answers_and_that_there_are_none(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForQuestionAnswering)
    made = list(_londons(96))
    train, val = Dataset.from_list(made[:80]), Dataset.from_list(made[80:])
    module = QuestionAnswering(folder, learning_rate=1e-2, weight_decay=0.0)
    runner = trainer(max_epochs=10)
    runner.fit(module, datamodule=data(folder, train, val, batch_size=16, max_length=24))
    metrics = {name: value.item() for name, value in runner.callback_metrics.items()}
    assert metrics["val_f1"] > 90
    assert metrics["val_no_ans_exact"] > 80
    assert metrics["val_has_ans_exact"] > 80


def _londons(count: int) -> Iterator[dict[str, Any]]:
    """The answer is "London" in every second row; the others do not have that word."""
    generator = torch.Generator().manual_seed(1)
    others = [word for word in WORDS if word != "London"]
    for i in range(count):
        words = [others[k] for k in torch.randint(len(others), (8,), generator=generator).tolist()]
        at = int(torch.randint(8, (1,), generator=generator))
        found: dict[str, Any] = {"text": [], "answer_start": []}
        if i % 2:
            words[at] = "London"
            found = {"text": ["London"], "answer_start": [" ".join(words).index("London")]}
        yield {"question": "what ?", "context": " ".join(words), "answers": found}


def test_any_number_of_labels_in_the_configuration(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification, num_labels=5)
    module = QuestionAnswering(folder)
    start, end = module(batch_of(folder, rows(3)))
    assert start.shape == end.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_best": 0}, "n_best=0 must be 1 or more"),
        ({"max_answer_length": 0}, "max_answer_length=0 must be 1 or more"),
        ({"no_answer_threshold": math.nan}, "no_answer_threshold must be a number"),
        ({"learning_rate": 0}, "learning_rate=0.0 must be above 0"),
    ],
)
def test_arguments(options: dict[str, Any], message: str, tiny: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionAnswering(tiny, **options)


def test_real_questions(minilm: str, real_data: Path) -> None:
    path = real_data / "squad_v2" / "dev.jsonl"
    lines = path.read_text().splitlines()[:10]
    table = Dataset.from_list([json.loads(line) for line in lines])
    module = QuestionAnswering(minilm)
    made = QuestionAnsweringData(minilm, val=table, predict=table, max_length=96, stride=32, batch_size=4, id="id")
    runner = trainer()
    (values,) = runner.validate(module, datamodule=made, verbose=False)
    predicted = runner.predict(module, datamodule=made) or []
    answers = [answer for part in predicted for answer in part["answer"]]
    assert [name for part in predicted for name in part["id"]] == table["id"][:]
    for answer, row in zip(answers, table, strict=True):
        assert answer in row["context"]
    metric = Squad()
    metric.update(answers, [row["answers"]["text"] for row in table])
    assert metric.compute()["f1"].item() == pytest.approx(values["val_f1"], abs=1e-3)
