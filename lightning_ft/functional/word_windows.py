"""Texts as windows of tokens that know which word they begin: the arrays, without tables and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ft.functional.characters import are, are_spaces, code_points, is_alone

if TYPE_CHECKING:
    import numpy as np


def word_windows(
    cells: Sequence[str] | Sequence[Sequence[str]],
    rows: Sequence[int],
    encode: Callable[[list[str]], Sequence[Any]],
    max_length: int,
    stride: int,
) -> dict[str, Any]:
    """Texts, or lists of words, as overlapping windows of tokens.

    Args:
        cells: The texts; or lists of words, which are joined by single spaces.
        rows: A number for each.
        encode: Makes the ``tokenizers.Encoding`` of each text, special tokens and all.
        max_length: Tokens of a window.
        stride: Tokens that a window shares with the next.

    Returns:
        Of each window ``row``, ``input_ids``, ``token_type_ids``, ``words``, ``starts`` and ``ends``, as
        :func:`lightning_ft.data.words.tokenize_words` describes them.
    """
    import numpy as np

    texts = [cell if isinstance(cell, str) else " ".join(cell) for cell in cells]
    encodings = encode(texts)
    sizes = np.array([len(encoding.ids) for encoding in encodings])
    inside = _flat([[part is not None for part in encoding.sequence_ids] for encoding in encodings]).astype(bool)
    # All texts lie on one axis, with a space between them.
    bases = np.cumsum([0, *(len(text) + 1 for text in texts)])
    marks, starts, ends = _mark(cells, texts, encodings, sizes, inside, bases)
    windows = _windows(sizes, inside, marks, max_length, stride)
    chosen = np.concatenate([part for _, part, _ in windows])
    widths = [len(part) for _, part, _ in windows]
    owner = np.searchsorted(bases, starts, "right") - 1
    heads = np.array([row for row, _, _ in windows])
    # All words of a row go with its first window.
    counts = np.bincount(owner, minlength=len(texts))[heads] * np.diff(heads, prepend=-1).astype(bool)
    return {
        "row": [rows[row] for row in heads],
        "input_ids": _lists(_flat([encoding.ids for encoding in encodings])[chosen], widths),
        "token_type_ids": _lists(_flat([encoding.type_ids for encoding in encodings])[chosen], widths),
        "words": _lists(np.concatenate([signed for _, _, signed in windows]), widths),
        "starts": _lists(starts - bases[owner], counts),
        "ends": _lists(ends - bases[owner], counts),
    }


def _mark(
    cells: Sequence[Any],
    texts: list[str],
    encodings: Sequence[Any],
    sizes: np.ndarray,
    inside: np.ndarray,
    bases: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 + the word's number in its row at each word's first token, else 0; and where all words start and end."""
    import numpy as np

    of = np.repeat(np.arange(len(texts)), sizes)
    codes = code_points(" ".join(texts))
    spans = np.array([span for encoding in encodings for span in encoding.offsets], np.int64).reshape(-1, 2)
    start, end = _trimmed(spans + bases[of][:, None], codes)
    real = np.flatnonzero(inside & (start < end))
    if isinstance(cells[0], str):
        pieces = _flat([[-1 if word is None else word for word in encoding.word_ids] for encoding in encodings])
        word_of, starts, ends = _found(start[real], end[real], pieces[real], of[real], codes)
    else:
        lengths = np.array([len(word) for cell in cells for word in cell], np.int64)
        starts = _joined([len(cell) for cell in cells], lengths, bases)
        ends = starts + lengths
        word_of = np.searchsorted(starts, start[real], "right") - 1
    counts = np.bincount(np.searchsorted(bases, starts, "right") - 1, minlength=len(texts))
    word, first = np.unique(word_of, return_index=True)
    marks = np.zeros(len(of), np.int64)
    marks[real[first]] = 1 + word - (np.cumsum(counts) - counts)[of[real[first]]]
    return marks, starts, ends


def _trimmed(spans: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spans without the white space at their ends, which byte-level and Unigram tokens begin with."""
    import numpy as np

    dark = ~are_spaces(codes)
    index = np.arange(len(codes))
    following = np.minimum.accumulate(np.where(dark, index, len(codes))[::-1])[::-1]
    before = np.maximum.accumulate(np.where(dark, index, -1))
    following, before = np.append(following, len(codes)), np.insert(before, 0, -1)
    start, end = spans.T
    start = np.minimum(following[start], end)
    return start, np.maximum(before[end] + 1, start)


def _found(
    start: np.ndarray, end: np.ndarray, pieces: np.ndarray, of: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words that tokens make up: the word of each token, and first and last characters of each word."""
    import numpy as np

    if not len(start):
        return start, start, start
    alone = are(codes, is_alone)
    reached = np.maximum.accumulate(end)[:-1]
    apart = (start[1:] > reached) | alone[start[1:]] | alone[reached - 1]
    begins = (pieces[1:] != pieces[:-1]) | (of[1:] != of[:-1]) | (apart & (start[1:] >= reached))
    firsts = np.flatnonzero(np.concatenate([[True], begins]))
    return np.cumsum(np.concatenate([[0], begins])), start[firsts], np.maximum.reduceat(end, firsts)


def _joined(counts: Sequence[int], lengths: np.ndarray, bases: np.ndarray) -> np.ndarray:
    """Where the words of each row begin when they are joined by single spaces."""
    import numpy as np

    before = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]]) if len(lengths) else lengths
    of = np.repeat(np.arange(len(counts)), counts)
    row_firsts = (np.cumsum(counts) - counts)[of]
    places: np.ndarray = bases[of] + before - before[row_firsts]
    return places


def _windows(
    sizes: np.ndarray, inside: np.ndarray, marks: np.ndarray, max_length: int, stride: int
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Of each window its text, which of all tokens it holds, and their marks."""
    import numpy as np

    windows = []
    for row, (begin, size) in enumerate(zip((np.cumsum(sizes) - sizes).tolist(), sizes.tolist(), strict=True)):
        whole = np.arange(begin, begin + size)
        if size <= max_length:
            windows.append((row, whole, marks[whole]))
            continue
        content = np.flatnonzero(inside[whole]) + begin
        front, back = whole[: content[0] - begin], whole[content[-1] - begin + 1 :]
        room = max_length - len(front) - len(back)
        parts = [content[k : k + room] for k in range(0, len(content) - stride, room - stride)]
        best, most = np.zeros(len(content), np.int64), np.full(len(content), -1)
        for k, part in enumerate(parts):
            context = np.minimum(np.arange(len(part)), np.arange(len(part))[::-1])
            more = part[context > most[part - content[0]]] - content[0]
            best[more], most[more] = k, context[more - (part[0] - content[0])]
        for k, part in enumerate(parts):
            signed = np.where(best[part - content[0]] == k, marks[part], -marks[part])
            windows.append((row, np.concatenate([front, part, back]), np.pad(signed, (len(front), len(back)))))
    return windows


def _flat(lists: list[list[Any]]) -> np.ndarray:
    import numpy as np

    return np.array([item for items in lists for item in items], np.int64)


def _lists(flat: np.ndarray, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    import numpy as np

    return np.split(flat.astype(np.int32), np.cumsum(lengths)[:-1])
