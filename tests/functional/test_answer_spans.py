"""Against a search of all spans, and against the logic of the reference script."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ft.functional.answer_spans import best_spans, lowest_of_rows

Window = dict[str, Tensor]
Spans = list[tuple[float, int, int]]


def windows(rows: int, width: int = 16, *, seed: int = 0) -> Window:
    """One to three overlapping windows a row: three question tokens, context of words of one to five characters, with
    a token of white space here and there, and padding.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    result: dict[str, list[Tensor]] = {"char_starts": [], "char_ends": [], "example": []}
    for row in range(rows):
        gaps = torch.randint(1, 6, (40,), generator=generator)
        ends = (gaps + 1).cumsum(0)
        starts = torch.where(torch.rand(40, generator=generator) < 0.1, ends, ends - gaps)
        for number in range(draw(1, 4)):
            count, begin = draw(1, width - 4), number * 6
            for name, values in (("char_starts", starts), ("char_ends", ends)):
                chars = torch.zeros(width, dtype=torch.int64)
                chars[3 : 3 + count] = torch.where(starts < ends, values, 0)[begin : begin + count]
                result[name].append(chars)
            result["example"].append(torch.tensor(row))
    batch = {name: torch.stack(values) for name, values in result.items()}
    for name in ("start_logits", "end_logits"):
        batch[name] = torch.randn(batch["char_starts"].shape, generator=generator)
    return batch


def search(batch: Window, rows: int, n_best: int, longest: int) -> list[Spans]:
    """Every pair of tokens, by three loops."""
    found: list[dict[tuple[int, int], float]] = [{} for _ in range(rows)]
    for w, row in enumerate(batch["example"].tolist()):
        starts, ends = batch["char_starts"][w].tolist(), batch["char_ends"][w].tolist()
        for i in range(len(starts)):
            for j in range(i, min(i + longest, len(starts))):
                if starts[i] < ends[i] and starts[j] < ends[j]:
                    score = float(batch["start_logits"][w, i] + batch["end_logits"][w, j])
                    span = (starts[i], ends[j])
                    found[row][span] = max(score, found[row].get(span, -np.inf))
    ranked = [sorted(((s, *span) for span, s in spans.items()), key=lambda x: -x[0]) for spans in found]
    return [spans[:n_best] for spans in ranked]


def reference(batch: Window, rows: int, n_best: int, longest: int) -> tuple[list[Spans], list[float]]:
    """`postprocess_qa_predictions` of transformers' examples (utils_qa.py), without texts: spans and null scores."""
    every: list[Spans] = []
    nulls = []
    for row in range(rows):
        min_null_score = None
        prelim_predictions = []
        for w in torch.nonzero(batch["example"] == row).flatten().tolist():
            start_logits, end_logits = batch["start_logits"][w].numpy(), batch["end_logits"][w].numpy()
            pairs = zip(batch["char_starts"][w].tolist(), batch["char_ends"][w].tolist(), strict=True)
            offset_mapping = [(s, e) if s < e else None for s, e in pairs]
            feature_null_score = start_logits[0] + end_logits[0]
            if min_null_score is None or min_null_score > feature_null_score:
                min_null_score = feature_null_score
            start_indexes = np.argsort(start_logits)[-1 : -n_best - 1 : -1].tolist()
            end_indexes = np.argsort(end_logits)[-1 : -n_best - 1 : -1].tolist()
            for start_index in start_indexes:
                for end_index in end_indexes:
                    if (
                        start_index >= len(offset_mapping)
                        or end_index >= len(offset_mapping)
                        or offset_mapping[start_index] is None
                        or offset_mapping[end_index] is None
                    ):
                        continue
                    if end_index < start_index or end_index - start_index + 1 > longest:
                        continue
                    span = (offset_mapping[start_index][0], offset_mapping[end_index][1])
                    prelim_predictions.append((float(start_logits[start_index] + end_logits[end_index]), *span))
        every.append(sorted(prelim_predictions, key=lambda x: x[0], reverse=True))
        nulls.append(float(min_null_score))
    return every, nulls


def decode(batch: Window, rows: int, n_best: int, longest: int) -> list[Spans]:
    spans = best_spans(**batch, rows=rows, n_best=n_best, max_answer_length=longest)
    assert spans.scores.shape == spans.starts.shape == spans.ends.shape == (rows, n_best)
    result = []
    for scores, starts, ends in zip(*(part.tolist() for part in spans), strict=True):
        row = list(zip(scores, starts, ends, strict=True))
        kept = [span for span in row if span[0] > -np.inf]
        assert row[len(kept) :] == [(-np.inf, 0, 0)] * (len(row) - len(kept))
        result.append(kept)
    return result


@pytest.mark.parametrize("n_best", [1, 5, 200])
@pytest.mark.parametrize("longest", [1, 4, 16, 100])
def test_finds_what_a_search_of_all_spans_finds(n_best: int, longest: int) -> None:
    batch = windows(12, seed=n_best + longest)
    for ours, theirs in zip(decode(batch, 12, n_best, longest), search(batch, 12, n_best, longest), strict=True):
        assert [span[1:] for span in ours] == [span[1:] for span in theirs]
        torch.testing.assert_close([span[0] for span in ours], [span[0] for span in theirs])


@pytest.mark.parametrize("longest", [3, 30])
def test_agrees_with_the_reference_script(longest: int) -> None:
    batch = windows(20)
    exhaustive, nulls = reference(batch, 20, 16, longest)
    for ours, theirs in zip(decode(batch, 20, 20, longest), exhaustive, strict=True):
        distinct = list({span[1:]: span for span in reversed(theirs)}.values())
        expected = sorted(distinct, key=lambda span: -span[0])[:20]
        assert [span[1:] for span in ours] == [span[1:] for span in expected]
        torch.testing.assert_close([span[0] for span in ours], [span[0] for span in expected])
    cls = batch["start_logits"][:, 0] + batch["end_logits"][:, 0]
    torch.testing.assert_close(lowest_of_rows(cls, batch["example"], 20), torch.tensor(nulls))
    # The reference's shortcut never finds better ones, and with few candidates can find none.
    few, _ = reference(batch, 20, 2, longest)
    ours = decode(batch, 20, 2, longest)
    assert all(row[0][0] >= spans[0][0] - 1e-6 for row, spans in zip(ours, few, strict=True) if spans)
    assert any(not spans for spans in few)
    assert all(ours)


def test_a_span_of_two_windows_is_one_span() -> None:
    chars = torch.tensor([[0, 4, 8], [4, 8, 0]]), torch.tensor([[3, 7, 11], [7, 11, 0]])
    logits = torch.tensor([[0.0, 5, 0], [4, 0, 9]]), torch.tensor([[0.0, 5, 2], [6, 0, 9]])
    spans = best_spans(*logits, *chars, torch.tensor([0, 0]), 1, n_best=3, max_answer_length=2)
    # Window 1 gives (4, 7) = 10, (4, 11) = 7, (0, 7) = 5; window 2 gives (4, 7) = 10 again, (4, 11) = 4.
    assert spans.scores.tolist() == [[10, 7, 5]]
    assert spans.starts.tolist() == [[4, 4, 0]]
    assert spans.ends.tolist() == [[7, 11, 7]]


def test_no_candidate_and_bfloat16() -> None:
    zeros, logits = torch.zeros(2, 4, dtype=torch.int64), torch.randn(2, 4).bfloat16()
    ends = zeros.clone()
    ends[1, 2] = 5
    spans = best_spans(logits, logits, zeros, ends, torch.tensor([0, 1]), 2, n_best=3)
    assert spans.scores[0].tolist() == [-torch.inf] * 3
    assert spans.scores[1].tolist() == [2 * logits[1, 2].item(), -torch.inf, -torch.inf]
    assert (spans.starts[1, 0], spans.ends[1, 0]) == (0, 5)
