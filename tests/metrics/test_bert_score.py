"""BERTScore against the authors' package, by hand, and apart from the model that holds it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ft.metrics.bert_score import BERTScore, greedy_f1
from lightning_ft.metrics.text import text_metrics

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
    metric = text_metrics(["bertscore"], bertscore_model=minilm)["bertscore"]
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
