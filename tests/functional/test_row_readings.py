"""Answers and entities of single rows, against what is found for many rows on a device, and by trying all spans."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ft.functional.answer_reading import AnswerWindow, read_answer, top_spans
from lightning_ft.functional.answer_spans import best_spans
from lightning_ft.functional.entity_reading import read_entities
from lightning_ft.metrics.entity_f1 import entity_spans, tag_table

LABELS: dict[Any, list[str]] = {
    "BIO": ["O", "B-A", "I-A", "B-B", "I-B"],
    "BIOES": ["O", *(f"{prefix}-{kind}" for kind in "AB" for prefix in "BIES")],
    "IO": ["O", "I-A", "I-B"],
}


@pytest.mark.parametrize("scheme", LABELS)
def test_entities_are_those_that_the_metric_counts(scheme: Any) -> None:
    types, table = tag_table(LABELS[scheme], scheme)
    generator = np.random.default_rng(0)
    tags = torch.tensor(generator.integers(0, len(table), (400, 7)))
    tags[:200] = tags[:200].where(torch.tensor(generator.random((200, 7)) < 0.6), tags[:200, :1])
    starts, ends, kinds = entity_spans(tags, table)
    text, offsets = "abcdefg", [(i, i + 1) for i in range(7)]
    count = 0
    for row, sequence in enumerate(tags.tolist()):
        scores = generator.random(7).tolist()
        found = read_entities(sequence, scores, offsets, text, types, table.tolist())
        wanted = [(int(i), int(ends[row, i]), types[kinds[row, i]]) for i in starts[row].nonzero().flatten()]
        assert [(entity["start"], entity["end"], entity["label"]) for entity in found] == wanted
        for entity in found:
            assert entity["text"] == text[entity["start"] : entity["end"]]
            assert entity["score"] == pytest.approx(np.mean(scores[entity["start"] : entity["end"]]))
        count += len(found)
    assert count > 300


def window(generator: np.random.Generator, width: int, offset: int) -> AnswerWindow:
    """Some tokens of the question, then those of a context of words of two letters."""
    starts = np.maximum(3 * (np.arange(width) - 3 + offset), 0)
    inside = (np.arange(width) >= 3) & (np.arange(width) < width - 1)
    logits = generator.normal(size=(2, width)).astype(np.float32)
    return AnswerWindow(*logits, np.where(inside, starts, 0), np.where(inside, starts + 2, 0), 0)


@pytest.mark.parametrize(("n_best", "longest"), [(1, 1), (3, 4), (20, 30), (200, 5)])
def test_spans_are_those_of_all_rows_together(n_best: int, longest: int) -> None:
    generator = np.random.default_rng(1)
    rows = [[window(generator, 12, 0), window(generator, 12, 4)], [window(generator, 12, 0)]]
    flat = [part for row in rows for part in row]
    tensors = [torch.tensor(np.stack(column)) for column in list(zip(*flat, strict=True))[:4]]
    together = best_spans(*tensors, torch.tensor([0, 0, 1]), 2, n_best=n_best, max_answer_length=longest)
    for row, parts in enumerate(rows):
        found = top_spans(parts, n_best=n_best, max_answer_length=longest)
        known = together.scores[row] > -torch.inf
        wanted = zip(*(values[row][known].tolist() for values in together), strict=True)
        for one, other in zip(found, wanted, strict=True):
            assert one == (pytest.approx(other[0], abs=1e-6), *other[1:])
        # By trying all.
        best: dict[tuple[int, int], float] = {}
        for part in parts:
            for i, j in product(range(12), repeat=2):
                if i <= j < i + longest and part.char_ends[i] and part.char_ends[j]:
                    span = int(part.char_starts[i]), int(part.char_ends[j])
                    best[span] = max(best.get(span, -np.inf), float(part.starts[i] + part.ends[j]))
        tried = sorted(best.values(), reverse=True)[:n_best]
        assert [score for score, *_ in found[: len(tried)]] == pytest.approx(tried[: len(found)], abs=1e-6)


def test_answer_or_none() -> None:
    """One word has the score 5, no answer 3 in one window and 4 in the other: the lower one counts."""
    starts, ends = np.array([0, 2, 0, 0], np.float32), np.array([0, 3, 0, 0], np.float32)
    places = np.array([0, 0, 3, 0]), np.array([0, 2, 5, 0])
    windows = [
        AnswerWindow(starts + np.array([3, 0, 0, 0], np.float32), ends, *places, 0),
        AnswerWindow(starts + np.array([4, 0, 0, 0], np.float32), ends, *places, 0),
    ]
    settings: dict[str, Any] = {"n_best": 2, "max_answer_length": 1, "no_answer": True}
    found = read_answer("my cat", windows, **settings, no_answer_threshold=-1.9)
    shares = np.exp([5, 0, 3]) / np.exp([5, 0, 3]).sum()
    assert (found["answer"], found["start"], found["end"], found["null_score"]) == ("my", 0, 2, -2.0)
    assert [span["text"] for span in found["n_best"]] == ["my", "", "ca"]
    assert [span["score"] for span in found["n_best"]] == pytest.approx([shares[0], shares[2], shares[1]])
    none = read_answer("my cat", windows, **settings, no_answer_threshold=-2.1)
    assert (none["answer"], none["start"], none["end"]) == ("", 0, 0)
    assert none["score"] == pytest.approx(shares[2])
    settings["no_answer"] = False
    sure = read_answer("my cat", windows, **settings, no_answer_threshold=float("inf"))
    assert "null_score" not in sure
    assert sure["score"] == pytest.approx(1 / (1 + np.exp(-5)))


def test_logits_that_are_no_numbers_give_no_answer() -> None:
    nan = np.full(3, np.nan, np.float32)
    windows = [AnswerWindow(nan, nan, np.array([0, 0, 3]), np.array([0, 2, 5]), 0)]
    found = read_answer(
        "my cat", windows, n_best=2, max_answer_length=3, no_answer=False, no_answer_threshold=float("inf")
    )
    assert (found["answer"], found["start"], found["end"]) == ("", 0, 0)
