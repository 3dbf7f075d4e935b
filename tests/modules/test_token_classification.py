"""The head: loss, words merged from windows, metrics, entities, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer
from seqeval import scheme as schemes
from seqeval.metrics import accuracy_score
from seqeval.metrics.v1 import precision_recall_fscore_support
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ft.data.token_classification import TokenClassificationData
from lightning_ft.modules import Architecture
from lightning_ft.modules.token_classification import TokenClassification
from tests.pretrained import check_head, pretrained
from tests.tiny import BERT

LABELS = ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]
WORDS = ["Anna", "Smith", "lives", "in", "New", "York", "the", "film", ",", "London"]
TAGS = ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC", "O", "O", "O", "B-LOC"]


def rows(count: int, longest: int = 10) -> Dataset:
    """Words whose tags they decide themselves; rows of 1 to ``longest``, from any place."""
    places = [[(7 * i + j) % 10 for j in range(1 + i * 5 % longest)] for i in range(count)]
    tokens = [[WORDS[j] for j in row] for row in places]
    return Dataset.from_dict({"tokens": tokens, "tags": [[TAGS[j] for j in row] for row in places]})


def module(**arguments: Any) -> TokenClassification:
    return TokenClassification(Architecture(hf.BertConfig(**BERT)), LABELS, **arguments)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_contract(kind: Any, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", kind, hf.AutoModelForTokenClassification)

    def data() -> TokenClassificationData:
        train, val = rows(24, 6), rows(6, 60)
        result = TokenClassificationData(
            folder, train, val, predict=rows(5, 60).remove_columns("tags"), max_length=40, stride=8, batch_size=6
        )
        result.setup("fit")
        assert result.facts()["labels"].keys() == set(LABELS)
        return result

    def head() -> TokenClassification:
        return TokenClassification(folder, LABELS, learning_rate=1e-3, per_type=True)

    check_head(head, data, hf.AutoModelForTokenClassification, tmp_path / "files")


def test_loss_is_transformers_own() -> None:
    model = module().eval()
    batch = {"input_ids": torch.randint(3, 40, (4, 7)), "labels": torch.randint(0, 5, (4, 7))}
    batch["labels"][:, ::3] = -100
    loss, tokens = model.loss(model(batch), batch)
    torch.testing.assert_close(loss, model.model(**batch).loss)
    assert tokens == (batch["labels"] >= 0).sum()
    half, _ = model.loss(model(batch).half(), batch)
    assert half.dtype == torch.float32
    batch["labels"].fill_(-100)
    loss, tokens = model.loss(model(batch), batch)
    loss.backward()
    assert (loss.item(), tokens) == (0, 0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_configuration_names_the_tags() -> None:
    model = module()
    assert model.model.config.id2label == dict(enumerate(LABELS))
    assert model.model.config.label2id == {name: i for i, name in enumerate(LABELS)}
    assert module(token_weighted=False)._token_mean is None
    with pytest.raises(ValueError, match=r"labels holds 'E-PER', but tags of scheme='BIO'"):
        TokenClassification(Architecture(hf.BertConfig(**BERT)), ["O", "E-PER"])


class Near(nn.Module):
    """Logits that depend on a token, on those up to ``radius`` from it, and on nothing else."""

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.table = nn.Embedding(60_000, 8)
        self.mix = nn.Conv1d(8, len(LABELS), 2 * radius + 1, padding=radius, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        hidden = self.table(input_ids) * attention_mask[..., None]
        return SimpleNamespace(logits=self.mix(hidden.mT).mT)


def near(radius: int) -> TokenClassification:
    model = module()
    model.model = Near(radius)  # type: ignore[assignment]
    return model.eval()


def predict(model: TokenClassification, data: TokenClassificationData) -> list[dict[str, Any]]:
    parts = trainer().predict(model, data) or []
    return [dict(zip(part, values, strict=True)) for part in parts for values in zip(*part.values(), strict=True)]


@pytest.mark.parametrize("radius", [0, 2, 4])
def test_windows_merge_as_if_there_were_one(radius: int, minilm: str) -> None:
    """Words have context of 4 tokens or more in the window they are read from, as the stride of 10 allows."""
    torch.manual_seed(0)
    model = near(radius)
    # Special tokens stand beside the text in every window.
    model.model.table.weight.data[[101, 102]] = 0  # type: ignore[union-attr, index]
    table = rows(9, 300)

    def run(max_length: int, stride: int, **options: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
        data = TokenClassificationData(
            minilm, val=table, predict=table, labels=LABELS, max_length=max_length, stride=stride, **options
        )
        [logged] = trainer().validate(model, data, verbose=False)
        return predict(model, data), dict(logged)

    whole, whole_logged = run(400, 0)
    merged, merged_logged = run(24, 10, batch_size=4)
    assert len({tag for row in whole for tag in row["tags"]}) > 2
    for one, other in zip(whole, merged, strict=True):
        assert one["tags"] == other["tags"]
        assert [e | {"score": 0} for e in one["entities"]] == [e | {"score": 0} for e in other["entities"]]
        assert [e["score"] for e in one["entities"]] == pytest.approx([e["score"] for e in other["entities"]], abs=1e-5)
    assert whole_logged == pytest.approx(merged_logged, abs=1e-5)
    if radius == 4:
        assert [row["tags"] for row in run(24, 2)[0]] != [row["tags"] for row in whole]


@pytest.mark.parametrize("layout", ["words", "text"])
def test_metrics_count_each_word_once(layout: str, minilm: str, real_data: Path) -> None:
    """What is logged is seqeval's score of the predicted tags, which are the words' and not the windows'."""
    lines = [json.loads(line) for line in (real_data / "uner_ewt" / "test.jsonl").read_text().splitlines()[:60]]
    table = Dataset.from_list([{"tokens": row["tokens"], "tags": row["tags"]} for row in lines])
    if layout == "text":
        table = Dataset.from_list([{"text": " ".join(row["tokens"]), "spans": spans(row)} for row in lines])
    options = {"text": "text"} if layout == "text" else {}
    labels = ["O", "B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER"]
    model = TokenClassification(Architecture(hf.BertConfig(**BERT)), labels)
    model.model = Near(1)  # type: ignore[assignment]
    model.model.mix = nn.Conv1d(8, len(labels), 3, padding=1)
    data = TokenClassificationData(
        minilm, test=table, predict=table, labels=labels, max_length=20, stride=6, batch_size=7, **options
    )
    [logged] = trainer().test(model, data, verbose=False)
    found = predict(model, data)
    if layout == "words":
        true, predicted = [row["tags"] for row in lines], [row["tags"] for row in found]
        scores = precision_recall_fscore_support(true, predicted, average="micro", scheme=schemes.IOB2, zero_division=0)
        assert logged["test_accuracy"] == pytest.approx(accuracy_score(true, predicted))
    else:
        gold = [{(s["label"], s["start"], s["end"]) for s in row["spans"]} for row in table]
        got = [{(e["label"], e["start"], e["end"]) for e in row["entities"]} for row in found]
        right = sum(len(a & b) for a, b in zip(gold, got, strict=True))
        all_gold, all_got = sum(map(len, gold)), sum(map(len, got))
        scores = (right / all_got, right / all_gold, 2 * right / (all_got + all_gold))
    assert scores[2] > 0
    values = [logged[f"test_{name}"] for name in ("precision", "recall", "f1")]
    assert values == pytest.approx(list(scores[:3]), abs=1e-6)
    texts = table["text"] if layout == "text" else [" ".join(row["tokens"]) for row in lines]
    assert sum(len(row["entities"]) for row in found) > 20
    for text, row in zip(texts, found, strict=True):
        assert all(text[e["start"] : e["end"]] == e["text"] != "" for e in row["entities"])


def spans(row: dict[str, Any]) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    for i, tag in enumerate(row["tags"]):
        end = len(" ".join(row["tokens"][: i + 1]))
        if tag[0] == "B":
            result.append({"start": end - len(row["tokens"][i]), "end": end, "label": tag[2:]})
        elif tag[0] == "I":
            result[-1]["end"] = end
    return result


def test_entities_by_hand() -> None:
    """Two rows; the first in two windows, with a word (the third) that has no token, and one read in each window."""
    model = module()
    logits = torch.zeros(3, 5, 5)
    tags = torch.tensor([[0, 2, 4, 1, 0], [0, 1, 4, 4, 0], [0, 3, 1, 3, 0]])
    logits.scatter_(2, tags[..., None], torch.tensor([[0.0, 2, 3, 9, 0], [0, 9, 1, 4, 0], [0, 5, 6, 7, 0]])[..., None])
    model.forward = lambda batch: logits  # type: ignore[method-assign, assignment]
    batch = {
        "example": torch.tensor([0, 0, 1]),
        "row": torch.tensor([4, 7]),
        # Anna Smith - Lee | is in York
        "words": torch.tensor([[0, 1, 2, 0, 0], [0, 0, 4, 5, 0], [0, 1, 2, 3, 0]]),
        "offsets": torch.tensor(
            [
                [[0, 4], [5, 10], [11, 12], [13, 16], [17, 20]],
                [[0, 3], [4, 7], [8, 12], [-1, -1], [-1, -1]],
            ]
        ),
        "tokens": [["Anna", "Smith", "-", "Lee", "Hon"], ["new", "New", "York"]],
        "id": ["a", "b"],
    }
    out = model.predict_step(batch, 0)
    assert (out["row"], out["id"]) == ([4, 7], ["a", "b"])
    assert out["tags"] == [["B-PER", "I-PER", "O", "I-PER", "I-PER"], ["I-LOC", "B-LOC", "I-LOC"]]
    share = [torch.tensor([x, 0, 0, 0, 0]).softmax(0)[0].item() for x in (2.0, 3.0, 6.0, 7.0)]
    expected = [
        [{"label": "PER", "text": "Anna Smith", "start": 0, "end": 10, "score": (share[0] + share[1]) / 2}],
        [{"label": "LOC", "text": "New York", "start": 4, "end": 12, "score": (share[2] + share[3]) / 2}],
    ]
    for row, want in zip(out["entities"], expected, strict=True):
        assert [e | {"score": 0} for e in row] == [e | {"score": 0} for e in want]
        assert [e["score"] for e in row] == pytest.approx([e["score"] for e in want], abs=1e-6)
    assert set(model.predictions({**batch, "text": ["Anna Smith - Lee Hon", "new New York"]})) == {"entities"}


def test_rows_without_words_are_predicted(minilm: str) -> None:
    table = Dataset.from_dict({"tokens": [[], ["\u200b"], []]})
    for size, labels in ((32, LABELS), (1, LABELS[::-1])):
        model = near(0)
        model.labels = labels
        found = predict(model, TokenClassificationData(minilm, predict=table, labels=labels, eval_batch_size=size))
        assert [row["tags"] for row in found] == [[], ["O"], []]
        assert [row["entities"] for row in found] == [[], [], []]


def test_batches_of_other_loaders_are_measured_by_token() -> None:
    model = module(per_type=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (8, 6), generator=generator)
    labels = torch.randint(0, 5, (8, 6), generator=generator)
    labels[:, [0, 5]] = -100
    loader = DataLoader([{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)], batch_size=3)
    [logged] = trainer().validate(model, loader, verbose=False)  # type: ignore[arg-type]
    with torch.no_grad():
        predicted = model.eval()({"input_ids": ids}).argmax(-1)
    assert logged["val_accuracy"] == pytest.approx((predicted == labels)[:, 1:5].float().mean().item())
    assert {"val_loss", "val_precision", "val_recall", "val_f1", "val_f1_PER", "val_recall_LOC"} <= set(logged)


def test_learns_entities(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, "bert", hf.AutoModelForTokenClassification)
    data = TokenClassificationData(folder, rows(120), rows(31), batch_size=12)
    model = TokenClassification(folder, data.labels, learning_rate=1e-2, schedule="constant")
    runner = trainer(max_epochs=5)
    runner.fit(model, data)
    assert runner.callback_metrics["val_f1"] > 0.9
