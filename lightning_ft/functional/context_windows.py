"""Where the tokens of windows over contexts lie in the contexts: the arrays, without tables and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ft.functional.characters import are_spaces, code_points

if TYPE_CHECKING:
    import numpy as np


class WindowTokens(NamedTuple):
    """The tokens of all windows in one array, ``(tokens,)``."""

    window_rows: np.ndarray
    """The row of the batch that each window belongs to, ``(windows,)``."""
    begins: np.ndarray
    """Where each window begins, ``(windows,)``."""
    rows: np.ndarray
    """The row of each token."""
    positions: np.ndarray
    """The position of each token in its window."""

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], window_rows: Sequence[int]) -> WindowTokens:
        """The tokens of windows, and the row that each window belongs to."""
        import numpy as np

        counts = np.array([len(tokens) for tokens in ids])
        begins = counts.cumsum() - counts
        positions = np.arange(counts.sum()) - np.repeat(begins, counts)
        return cls(np.array(window_rows), begins, np.repeat(window_rows, counts), positions)

    def lowest(self, values: np.ndarray, where: np.ndarray, default: int | np.ndarray) -> np.ndarray:
        """The lowest value of each window, ``(windows,)``, of those ``where`` is true."""
        import numpy as np

        top = np.iinfo(values.dtype).max
        result = np.minimum.reduceat(np.where(where, values, top), self.begins)
        return np.where(result == top, default, result)

    def highest(self, values: np.ndarray, where: np.ndarray) -> np.ndarray:
        """The highest value of each window, ``(windows,)``, of those ``where`` is true; -1 for none."""
        import numpy as np

        result: np.ndarray = np.maximum.reduceat(np.where(where, values, -1), self.begins)
        return result

    def by_window(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of all tokens, window by window."""
        import numpy as np

        return np.split(values.astype(np.int32), self.begins[1:])


class PlacedTokens(NamedTuple):
    """Tokens of windows, and the characters of the context that they stand for."""

    tokens: WindowTokens
    """Which they are."""
    starts: np.ndarray
    """First character of each, without white space, ``(tokens,)``; 0 outside the context."""
    ends: np.ndarray
    """One past its last, ``(tokens,)``; 0 outside the context."""
    outside: np.ndarray
    """Which are not the context's, or white space alone, ``(tokens,)``."""
    cls: np.ndarray
    """The position that stands for no answer in each window, ``(windows,)``."""


def place_tokens(
    encodings: Sequence[Any], window_rows: Sequence[int], contexts: list[str], *, context_first: bool, cls: int | None
) -> PlacedTokens:
    """Where the tokens of questions with their contexts lie in the contexts.

    Args:
        encodings: The ``tokenizers.Encoding`` of each window.
        window_rows: Which context it is of, ``(windows,)``, from 0 on in order.
        contexts: The texts.
        context_first: Whether the context comes before the question.
        cls: The number of the CLS token; None where there is none. No answer is then the first token that is not the
            context's.
    """
    import numpy as np

    ids = [encoding.ids for encoding in encodings]
    tokens = WindowTokens.of(ids, window_rows)
    side = np.array([-1 if s is None else s for e in encodings for s in e.sequence_ids])
    offsets = np.array(list(chain.from_iterable(encoding.offsets for encoding in encodings)))
    starts, ends = _without_spaces(offsets, tokens.rows, contexts)
    outside = (side != (0 if context_first else 1)) | (ends <= starts)
    starts[outside] = ends[outside] = 0
    # Only one that the tokenizer added: the text "[CLS]" gives one, too.
    is_cls = (np.concatenate(ids) == (-1 if cls is None else cls)) & (side < 0)
    # Without one, the first token that can be no answer: not the context's.
    other = tokens.lowest(tokens.positions, side != (0 if context_first else 1), default=0)
    return PlacedTokens(tokens, starts, ends, outside, tokens.lowest(tokens.positions, is_cls, default=other))


def check_room(
    questions: Sequence[str],
    contexts: Sequence[str],
    counts: Sequence[int],
    count: Callable[[str], int],
    where: Callable[[int], str],
    *,
    max_length: int,
    special: int,
    stride: int,
) -> None:
    """That windows have room for their contexts: tokenizers do not raise there, they panic.

    Args:
        questions: The questions.
        contexts: Their contexts.
        counts: Tokens of each question.
        count: Counts those of a context.
        where: The name of a row, by its place in the lists.
        max_length: Tokens of a window.
        special: How many of them are special ones.
        stride: Tokens of the context that neighbouring windows share.

    Raises:
        ValueError: A question leaves no room.
    """
    for place, (question, context, tokens) in enumerate(zip(questions, contexts, counts, strict=True)):
        room = max_length - special - tokens
        if room <= stride and (room < 1 or count(context) > room):
            raise ValueError(
                f"{where(place)}: the question {shorten(question)!r} takes {tokens} of max_length={max_length} tokens "
                f"and leaves {max(room, 0)} for its context, no more than stride={stride}, which windows share: raise "
                "max_length, lower stride, or shorten it"
            )


def _without_spaces(offsets: np.ndarray, rows: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Character spans of tokens without the white space at their ends, which some tokenizers count in.

    Args:
        offsets: First and one past the last character, ``(tokens, 2)``.
        rows: Which text they are of, ``(tokens,)``. What comes of tokens of another text, the question, means nothing.
        texts: The texts.

    Returns:
        Starts and ends, ``(tokens,)``; a start is not below the end where a token is white space only.
    """
    import numpy as np

    lengths = np.array([len(text) for text in texts])
    base = (lengths.cumsum() - lengths)[rows]
    space = are_spaces(code_points("".join(texts)))
    place = np.arange(len(space))
    after = np.minimum.accumulate(np.where(space, len(space), place)[::-1])[::-1]
    before = np.maximum.accumulate(np.where(space, -1, place))
    fits = (offsets[:, 1] <= lengths[rows]) & (offsets[:, 0] < offsets[:, 1])
    starts, ends = offsets.T.copy()
    starts[fits] = after[(base + starts)[fits]] - base[fits]
    ends[fits] = before[(base + ends)[fits] - 1] + 1 - base[fits]
    return starts, ends


def shorten(text: str) -> str:
    """A text, or its beginning, for a message."""
    return text if len(text) <= 60 else text[:57] + "..."
