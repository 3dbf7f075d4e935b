"""Metrics of generated texts against the packages that define them, over batches and processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_ft.metrics.text import ROUGE, ChrF, text_metrics

TEXTS = ["the cat sat on the mat .", "", "Größe und Farbe", "a b c d e f g", "no match at all here"]
REFERENCES = [["the cat is on the mat .", "a cat sat on a mat"], ["empty"], ["Große Farbe"], ["a b c d"], ["xyz"]]


@pytest.fixture
def corpus(real_data: Path) -> tuple[list[str], list[list[str]]]:
    """Beginnings of abstracts as summaries, with 1 to 5 references, and the texts above."""
    lines = (real_data / "scitldr" / "dev.jsonl").read_text().splitlines()[:60]
    rows = [json.loads(line) for line in lines]
    return [row["source"][:120] for row in rows] + TEXTS, [row["references"] for row in rows] + REFERENCES


def test_rouge_is_that_of_the_package(corpus: tuple[list[str], list[list[str]]]) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    texts, references = corpus
    expected = {
        name: sum(
            max(scorer.score(other, text)[name].fmeasure for other in known)
            for text, known in zip(texts, references, strict=True)
        )
        / len(texts)
        for name in ROUGE.keys
    }
    metric = ROUGE()
    for start in range(0, len(texts), 7):
        metric.update(texts[start : start + 7], references[start : start + 7])
    metric.update([], [])
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, abs=1e-6)


def test_chrf_and_bleu_are_those_of_sacrebleu(corpus: tuple[list[str], list[list[str]]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    texts, references = corpus
    columns = [[known[i] if i < len(known) else None for known in references] for i in range(max(map(len, references)))]
    metrics = text_metrics(["chrf", "bleu"])
    for start in range(0, len(texts), 7):
        for metric in metrics.values():
            metric.update(texts[start : start + 7], references[start : start + 7])
    assert metrics["chrf"].compute().item() == pytest.approx(sacrebleu.corpus_chrf(texts, columns).score / 100)
    assert metrics["bleu"].compute().item() == pytest.approx(sacrebleu.corpus_bleu(texts, columns).score / 100)


def test_chrf_by_hand() -> None:
    metric = ChrF(order=3)
    metric.update(["the cat"], [["the bat"]])  # 5 of 6 letters, 3 of 5 pairs, 1 of 4 triples, on either side
    assert metric.compute().item() == pytest.approx((5 / 6 + 3 / 5 + 1 / 4) / 3)
    metric = ChrF(order=1)
    metric.update(["a"], [["ab"]])  # P = 1, R = 1/2
    assert metric.compute().item() == pytest.approx(5 * 0.5 / (4 * 1 + 0.5))
    metric = ChrF()
    metric.update([""], [["something"]])
    assert metric.compute() == 0
    with pytest.raises(ValueError, match="order=0 must be 1 or more"):
        ChrF(order=0)


@pytest.mark.parametrize("name", ["rouge", "bleu", "chrf", "meteor"])
def test_parts_add_up_to_the_whole(name: str) -> None:
    """Also where one process has more texts than the other."""
    whole, first, second = (text_metrics([name])[name] for _ in range(3))  # type: ignore[list-item]
    whole.update(TEXTS, REFERENCES)
    first.update(TEXTS[:1], REFERENCES[:1])
    second.update(TEXTS[1:], REFERENCES[1:])
    assert {f.__name__ for f in first._reductions.values() if f is not None} == {"dim_zero_sum"}
    for state in first._defaults:
        setattr(first, state, getattr(first, state) + getattr(second, state))
    torch.testing.assert_close(first.compute(), whole.compute())


def test_unknown_names_and_a_missing_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics=\['rouge', 'blue'\]: 'blue' is not one of \('rouge', 'bleu'"):
        text_metrics(["rouge", "blue"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"write metrics=\{.*\"model\": \.\.\.\}\} with the folder of one"):
        text_metrics(["bertscore"])
    with pytest.raises(ValueError, match=r"rouge takes other options than \{'stem': True\}: .*'stem'"):
        text_metrics({"rouge": {"stem": True}})
