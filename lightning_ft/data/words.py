"""Texts as windows of tokens that know which word they begin."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lightning_ft.data.encoding import encode_once, token_counts
from lightning_ft.data.sources import Source, first_true
from lightning_ft.data.tags import Words
from lightning_ft.data.windows import source_rows

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Scripts without spaces: in them each token is a word.
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}


def tokenize_words(
    source: Source,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    words: pa.Array | None = None,
) -> Dataset:
    """Tokenise texts, or rows of words, into overlapping windows; what was tokenised before is read from the disk.

    Rows of words are joined by single spaces and tokenised as the text that makes, so that byte-level tokenizers see
    words as in pretraining, with the space before them (they need no ``add_prefix_space``). In texts, words are what
    the tokenizer's own pre-tokeniser makes, divided further at white space and punctuation, and in scripts without
    spaces at every token: a pre-tokeniser that leaves ``Paris.`` or a whole text in one piece does not decide where
    entities can end. No word is divided between two tokens of one character.

    Args:
        source: The rows.
        column: Its column of texts or of words.
        tokenizer: A fast tokenizer.
        max_length: Tokens of a window, special ones included.
        stride: Tokens that a window shares with the next.
        words: The rows' words, lists of strings; None for texts.

    Returns:
        A row for each window, those of a source row one after another: ``row``, the source row's number;
        ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``; ``words``, as long: at the first token
        that holds characters of a word, 1 + the word's number in its row, negative in windows where it has less
        context than in another; 0 elsewhere. ``starts`` and ``ends``: the character offsets of all words of a row, in
        its first window; empty lists in others.

    Raises:
        TypeError: Texts that are no text.
        ValueError: A tokenizer that is not fast, windows without room beside ``stride``, a null, or a row of which the
            tokenizer makes no token at all.
    """
    import pyarrow as pa

    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} is a slow one ({type(tokenizer).__name__}), which does not tell "
            "where tokens lie in the text: choose a model with a fast tokenizer (tokenizer.json)"
        )
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room <= stride:
        raise ValueError(
            f"max_length={max_length} leaves {room} tokens of text in a window, of which stride={stride} would be "
            "those of the one before: give a smaller stride or a greater max_length"
        )

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
        return _encode(batch[column], rows, tokenizer, max_length, stride)

    table = pa.table({column: source.texts(column) if words is None else words})
    tokens = encode_once(
        table, encode, tokenizer, ["words", max_length, stride], f"Tokenising {source.name}", with_rows=True
    )
    if (window := first_true(pa.array((token_counts(tokens) == 0).numpy()))) is not None:
        row = int(source_rows(tokens)[window])
        raise ValueError(
            f"{source.where(row)}: the tokenizer makes no token of {table[column][row].as_py()!r}: remove the row"
        )
    return tokens


def words_of(tokens: Dataset) -> Words:
    """Where the words of each source row lie, from a table of :func:`tokenize_words`."""
    import pyarrow.compute as pc

    starts, ends = (tokens.data[name].combine_chunks() for name in ("starts", "ends"))
    rows = source_rows(tokens)
    counts = torch.zeros(int(rows.max()) + 1, dtype=torch.int64)
    counts.index_add_(0, rows, torch.tensor(pc.list_value_length(starts).to_numpy()).long())
    offsets = torch.stack([torch.tensor(part.flatten().to_numpy()).long() for part in (starts, ends)], 1)
    return Words(counts, offsets)


def _encode(
    cells: list[Any], rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> dict[str, Any]:
    """A batch of texts, or of lists of words, as :func:`tokenize_words` returns them."""
    import numpy as np

    texts = [cell if isinstance(cell, str) else " ".join(cell) for cell in cells]
    encodings = tokenizer(texts, verbose=False).encodings
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
    result = {
        "row": [rows[row] for row in heads],
        "input_ids": _lists(_flat([encoding.ids for encoding in encodings])[chosen], widths),
        "words": _lists(np.concatenate([signed for _, _, signed in windows]), widths),
        "starts": _lists(starts - bases[owner], counts),
        "ends": _lists(ends - bases[owner], counts),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        result["token_type_ids"] = _lists(_flat([encoding.type_ids for encoding in encodings])[chosen], widths)
    return result


def _mark(
    cells: list[Any], texts: list[str], encodings: list[Any], sizes: np.ndarray, inside: np.ndarray, bases: np.ndarray
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
    alone = _are(codes, _is_alone)
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


def _are(codes: np.ndarray, test: Any) -> np.ndarray:
    """Which characters pass a test."""
    import numpy as np

    distinct, which = np.unique(codes, return_inverse=True)
    return np.array([test(int(code)) for code in distinct], bool)[which]


def code_points(text: str) -> np.ndarray:
    """The number of each character, ``(characters,)``."""
    import numpy as np

    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def are_spaces(codes: np.ndarray) -> np.ndarray:
    """Which characters, by their numbers, are white space."""
    import numpy as np

    table = _space_table()
    result: np.ndarray = table[np.minimum(codes, len(table) - 1)]
    return result


@cache
def _space_table() -> np.ndarray:
    import numpy as np

    return np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last one


@cache
def _is_alone(code: int) -> bool:
    """Whether no word holds the character beside others: it is punctuation, or of a script without spaces."""
    # Marks (vowels of Indic scripts, accents) and joiners belong to the letters beside them.
    letter = unicodedata.category(chr(code))[0] in "LNM" or unicodedata.category(chr(code)) == "Cf"
    return not letter or unicodedata.name(chr(code), "").split(" ")[0].split("-")[0] in _UNSPACED
