"""From the logits of one row's windows to its answer, in numpy: what modules and exported models answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class AnswerWindow(NamedTuple):
    """A window of a row: its logits, and the characters that its tokens stand for."""

    starts: np.ndarray
    """Logits of the first token, fp32, ``(width,)``."""
    ends: np.ndarray
    """Logits of the last one, ``(width,)``."""
    char_starts: np.ndarray
    """First character of each token in the context, ``(width,)``."""
    char_ends: np.ndarray
    """One past its last; equal to ``char_starts`` where no answer may begin or end, ``(width,)``."""
    cls: int
    """The position that stands for no answer."""


def read_answer(
    context: str,
    windows: Sequence[AnswerWindow],
    *,
    n_best: int,
    max_answer_length: int,
    no_answer: bool,
    no_answer_threshold: float,
) -> dict[str, Any]:
    """The best answer of a row, or that it has none.

    Args:
        context: What answers are cut from.
        windows: All windows of the row.
        n_best: Spans wanted.
        max_answer_length: Tokens of the longest one.
        no_answer: Whether there may be none.
        no_answer_threshold: There is none where the lowest score of no answer exceeds the best span's by more.

    Returns:
        ``answer`` (``""`` for none), ``score``, ``start`` and ``end``, with ``no_answer`` also ``null_score``, and
        ``n_best``, as :meth:`lightning_ft.modules.QuestionAnswering.predictions` describes them.
    """
    import numpy as np

    spans = top_spans(windows, n_best=n_best, max_answer_length=max_answer_length)
    null = min(float(window.starts[window.cls] + window.ends[window.cls]) for window in windows)
    excess = null - (spans[0][0] if spans else -np.inf)
    candidates = [(score, context[start:end], start, end) for score, start, end in spans]
    if no_answer:
        candidates.append((null, "", 0, 0))
    if not candidates:  # logits that are no numbers
        candidates = [(0.0, "", 0, 0)]
    scores = np.array([score for score, *_ in candidates])
    powers = np.exp(scores - scores.max())
    shares = (powers / powers.sum()).tolist()
    named = [
        {"text": text, "score": share, "start": start, "end": end}
        for share, (_, text, start, end) in zip(shares, candidates, strict=True)
    ]
    chosen = named[-1 if no_answer and excess > no_answer_threshold else 0]
    return {
        "answer": chosen["text"],
        "score": chosen["score"],
        "start": chosen["start"],
        "end": chosen["end"],
        **({"null_score": excess} if no_answer else {}),
        "n_best": sorted(named, key=lambda span: -span["score"]),
    }


def top_spans(windows: Sequence[AnswerWindow], *, n_best: int, max_answer_length: int) -> list[tuple[float, int, int]]:
    """The ``n_best`` spans of a row over all its windows: score, first character and one past the last, best first.

    The same spans as :func:`lightning_ft.functional.answer_spans.best_spans` finds for many rows on a device.

    Args:
        windows: All windows of the row.
        n_best: Spans wanted; where characters are made of several tokens, there may be fewer.
        max_answer_length: Tokens of the longest one.
    """
    best: dict[tuple[int, int], float] = {}
    for window in windows:
        for score, start, end in _spans_of(window, n_best, max_answer_length):
            if score > best.get((start, end), -float("inf")):
                best[start, end] = score
    ordered = sorted(best.items(), key=lambda entry: -entry[1])[:n_best]
    return [(score, start, end) for (start, end), score in ordered]


def _spans_of(window: AnswerWindow, n_best: int, max_answer_length: int) -> list[tuple[float, int, int]]:
    """The best ``n_best`` pairs of tokens of a window."""
    import numpy as np

    inside = window.char_ends > window.char_starts
    starts = np.where(inside, window.starts, -np.inf)
    ends = np.where(inside, window.ends, -np.inf)
    longest = min(max_answer_length, len(starts))
    ahead = np.concatenate([ends, np.full(longest - 1, -np.inf, ends.dtype)])
    # Element (token, more): the span of `token` and `more` tokens after it.
    band = starts[:, None] + np.lib.stride_tricks.sliding_window_view(ahead, longest)
    flat = band.ravel()
    chosen = np.argpartition(-flat, n_best - 1)[:n_best] if n_best < len(flat) else np.arange(len(flat))
    chosen = chosen[flat[chosen] > -np.inf]
    chosen = chosen[np.argsort(-flat[chosen], kind="stable")]
    first = chosen // longest
    last = first + chosen % longest
    places = window.char_starts[first].tolist(), window.char_ends[last].tolist()
    return list(zip(flat[chosen].tolist(), *places, strict=True))
