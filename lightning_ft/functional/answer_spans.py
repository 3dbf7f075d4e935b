"""From start and end logits of windows to the best answer spans of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AnswerSpans(NamedTuple):
    """The best spans of rows, best first. Where a row has fewer, its last scores are -inf and their spans (0, 0)."""

    scores: Tensor
    """Start plus end logit, ``(rows, n_best)``."""
    starts: Tensor
    """First character, ``(rows, n_best)``."""
    ends: Tensor
    """One past the last character, ``(rows, n_best)``."""


def best_spans(
    start_logits: Tensor,
    end_logits: Tensor,
    char_starts: Tensor,
    char_ends: Tensor,
    example: Tensor,
    rows: int,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> AnswerSpans:
    """The ``n_best`` spans of each row over all its windows, by start logit + end logit.

    A span begins and ends on tokens of the context, in one window, and has at most ``max_answer_length`` tokens. All
    such spans compete: the scores of a window are a band of its tokens x tokens matrix, of which ``topk`` takes the
    best. The reference scripts pair the ``n_best`` starts with the ``n_best`` ends instead, and find nothing where all
    those starts come after all those ends; with ``n_best`` as large as a window the two agree. A span that several
    windows hold is one span, with its best score; a row can come out with fewer than ``n_best`` spans where characters
    are made of several tokens, whose pairs name one span again and again.

    Args:
        start_logits: ``(windows, width)``.
        end_logits: ``(windows, width)``.
        char_starts: First character of each token in its context, ``(windows, width)``.
        char_ends: One past its last character, ``(windows, width)``; equal to ``char_starts`` for tokens that no answer
            may begin or end on: question, special tokens, padding, white space.
        example: The row that each window belongs to, ``(windows,)``.
        rows: Number of rows.
        n_best: Spans wanted of each row.
        max_answer_length: Tokens of the longest span.

    Example:
        >>> offsets = torch.tensor([[0, 0, 4, 9]]), torch.tensor([[0, 3, 8, 12]])  # [CLS] the film sang
        >>> start, end = torch.tensor([[9.0, 0, 2, 1]]), torch.tensor([[9.0, 1, 1, 2]])
        >>> best_spans(start, end, *offsets, torch.tensor([0]), 1, n_best=2)
        AnswerSpans(scores=tensor([[4., 3.]]), starts=tensor([[4, 9]]), ends=tensor([[12, 12]]))

    Reference:
        Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 4.2.
    """
    width = start_logits.shape[1]
    longest = min(max_answer_length, width)
    inside = char_ends > char_starts
    starts = start_logits.float().masked_fill(~inside, -torch.inf)
    ends = end_logits.float().masked_fill(~inside, -torch.inf)
    # Element (window, token, more): the span of `token` and `more` tokens after it.
    band = starts[:, :, None] + _ahead(ends, longest, -torch.inf)
    scores, flat = band.flatten(1).topk(min(n_best, width * longest))
    first = flat // longest
    last = first + flat % longest
    # Padding of the band lies past the last token; its scores are -inf.
    spans = char_starts.gather(1, first), char_ends.gather(1, last.clamp(max=width - 1))
    return _best_of_rows(scores, *spans, example[:, None].expand_as(scores), rows, n_best)


def lowest_of_rows(values: Tensor, example: Tensor, rows: int) -> Tensor:
    """The lowest value over the windows of each row, ``(rows,)``; infinite for a row without windows.

    Args:
        values: ``(windows,)``.
        example: The row that each window belongs to, ``(windows,)``.
        rows: Number of rows.

    Example:
        >>> lowest_of_rows(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 0, 1]), 2)
        tensor([1., 2.])
    """
    return values.new_full((rows,), torch.inf).scatter_reduce_(0, example, values, "amin")


def _ahead(values: Tensor, count: int, fill: float) -> Tensor:
    """Each token's value and those of the ``count - 1`` tokens after it, ``(windows, width, count)``."""
    return torch.nn.functional.pad(values, (0, count - 1), value=fill).unfold(1, count, 1)


def _best_of_rows(scores: Tensor, starts: Tensor, ends: Tensor, row: Tensor, rows: int, n_best: int) -> AnswerSpans:
    """The best distinct candidates of each row; all candidates are ``(windows, candidates)``."""
    scores, order = scores.flatten().sort(descending=True, stable=True)
    starts, ends, row = starts.flatten()[order], ends.flatten()[order], row.flatten()[order]
    repeated = _repeated((row * (ends.max() + 1) + starts) * (ends.max() + 1) + ends)
    row = row.masked_fill(repeated | (scores == -torch.inf), rows)  # a row past the last, which is cut off below
    row, order = row.sort(stable=True)
    begins = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    rank = torch.arange(len(row), device=row.device) - begins[row]
    place = row * n_best + rank
    kept = (row < rows) & (rank < n_best)
    # One place past the end takes what is not kept: no shapes that depend on the data, so no wait for the device.
    place = place.masked_fill(~kept, rows * n_best)
    table = [
        values.new_full((rows * n_best + 1,), empty).scatter_(0, place, values[order])[:-1].view(rows, n_best)
        for values, empty in ((scores, -torch.inf), (starts, 0), (ends, 0))
    ]
    return AnswerSpans(*table)


def _repeated(keys: Tensor) -> Tensor:
    """Which elements equal an earlier one."""
    ordered, order = keys.sort(stable=True)
    same = torch.zeros_like(keys, dtype=torch.bool)
    same[1:] = ordered[1:] == ordered[:-1]
    return torch.empty_like(same).scatter_(0, order, same)
