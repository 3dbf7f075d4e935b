"""BERTScore against the authors' package, by hand, and apart from the model that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn
from torchmetrics import MetricCollection

from lightning_ft.metrics.bert_score import BERTScore, greedy_f1
from lightning_ft.metrics.text import text_metrics
from tests.pretrained import pretrained

TEXTS = ["the cat sat on the mat", "a completely different thing", "he went home"]
REFERENCES = [
    ["a cat is on the mat", "a dog"],
    ["stock markets fell sharply on Monday, analysts said"],
    ["he went home"],
]


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_the_package(minilm: str) -> None:
    package = pytest.importorskip("bert_score")
    for layer in (2, 6):
        expected = package.score(TEXTS, REFERENCES, model_type=minilm, num_layers=layer, device="cpu")[2]
        metric = BERTScore(minilm, layer=layer, batch_size=3)
        metric.update(TEXTS, REFERENCES)
        assert metric.compute().item() == pytest.approx(expected.mean().item(), abs=1e-5)


def test_by_hand() -> None:
    made = torch.tensor([[[1.0, 0], [0, 2], [0, 0]]])  # the last is padding
    wanted = torch.tensor([[[1.0, 1]]])
    # Every cosine is √½.
    score = greedy_f1(made, wanted, torch.tensor([[1, 1, 0]]), torch.tensor([[1]]))
    torch.testing.assert_close(score, torch.tensor([0.5]).sqrt())
    assert greedy_f1(made, wanted, torch.zeros(1, 3), torch.zeros(1, 1)).tolist() == [0]


def test_same_texts_score_1_and_empty_ones_0(minilm: str) -> None:
    metric = text_metrics({"bertscore": {"model": minilm}})["bertscore"]
    metric.update(TEXTS[2:], REFERENCES[2:])
    assert metric.compute().item() == pytest.approx(1, abs=1e-5)
    metric.update([""], [["he went home"]])
    assert metric.compute().item() == pytest.approx(0.5, abs=1e-5)


def test_the_encoder_is_no_part_of_the_model(minilm: str) -> None:
    owner = nn.ModuleDict({"metric": BERTScore(minilm)})
    owner["metric"].update(TEXTS, REFERENCES)
    assert not list(owner.parameters())
    assert not owner.state_dict()


def test_a_missing_encoder_is_named() -> None:
    with pytest.raises(OSError, match="bertscore model 'no/such-encoder'"):
        BERTScore("no/such-encoder").update(["a"], [["b"]])


def test_layer_and_batch_size_can_be_chosen(minilm: str) -> None:
    scores = []
    for options in ({}, {"layer": 2}, {"layer": 2, "batch_size": 1}):
        metric = text_metrics({"bertscore": {"model": minilm, **options}})["bertscore"]
        metric.update(TEXTS, REFERENCES)
        scores.append(metric.compute().item())
    assert scores[0] != scores[1] == pytest.approx(scores[2], abs=1e-6)


def test_a_text_longer_than_the_encoders_table_of_positions_is_cut(tmp_path: Path) -> None:
    """RoBERTa's table has two more rows than it takes tokens, and this tokenizer does not say how many it takes."""
    folder = pretrained(tmp_path, "roberta", hf.AutoModel)
    assert hf.AutoTokenizer.from_pretrained(folder).model_max_length > 10**6
    metric = BERTScore(folder)
    metric.update(["film " * 2000], [["film " * 2000]])
    assert metric.compute().item() == pytest.approx(1, abs=1e-5)


def test_pickle_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    folder = pretrained(tmp_path, "bert", hf.AutoModel)
    model = hf.AutoModel.from_pretrained(folder)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="allow_pickle=True if it holds pickle weights alone"):
        BERTScore(folder).update(["a"], [["b"]])
    BERTScore(folder, allow_pickle=True).update(["a"], [["b"]])


def test_is_not_taken_for_another_metric(minilm: str) -> None:
    """A collection merges metrics whose states agree after the first update, as all do after empty texts."""
    together = MetricCollection(text_metrics({"meteor": {}, "bertscore": {"model": minilm}, "rouge": {}}))
    together.update(["", ""], [["he went home"], ["she did not"]])
    together.update(TEXTS, REFERENCES)
    for name, metric in text_metrics({"meteor": {}, "bertscore": {"model": minilm}}).items():
        metric.update(["", ""], [["he went home"], ["she did not"]])
        metric.update(TEXTS, REFERENCES)
        torch.testing.assert_close(together.compute()[name], metric.compute())
