"""Questions with their contexts as overlapping windows of tokens, and where answers lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning_ft.data.sources import Source
from lightning_ft.data.words import are_spaces, code_points

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ContextWindows:
    """Encodes batches of rows; each gives one window or more, one after another.

    Called with the columns ``question`` and ``context``, and ``start`` and ``end``, the characters of the answer (-1
    for none), where there are answers; and with the numbers of the rows. Gives the tokens, ``row``, ``cls``,
    ``start_positions`` and ``end_positions``, and ``char_starts`` and ``char_ends``, of each window.

    Args:
        source: The rows, for messages.
        tokenizer: A fast tokenizer.
        max_length: Tokens of a window.
        stride: Tokens of the context that neighbouring windows share.
        context_first: Put the context before the question.
        offsets: Whether to give ``char_starts`` and ``char_ends``.
    """

    source: Source
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int
    context_first: bool
    offsets: bool

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
        """The windows of a batch.

        Raises:
            ValueError: A question that leaves no room for its context, or a question, context or answer without tokens.
        """
        import numpy as np

        # Some of SQuAD's questions begin with many spaces, of which some tokenizers make tokens.
        questions, contexts = [question.lstrip() for question in batch["question"]], batch["context"]
        self._check_room(questions, contexts, rows)
        encoded = self.tokenizer(
            *((contexts, questions) if self.context_first else (questions, contexts)),
            truncation="only_first" if self.context_first else "only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        tokens = _Tokens.of(encoded["input_ids"], encoded.pop("overflow_to_sample_mapping"))
        side = np.array([-1 if s is None else s for e in encoded.encodings for s in e.sequence_ids])
        offsets = np.array(list(chain.from_iterable(encoded.pop("offset_mapping"))))
        starts, ends = _without_spaces(offsets, tokens.rows, contexts)
        outside = (side != (0 if self.context_first else 1)) | (ends <= starts)
        starts[outside] = ends[outside] = 0
        self._refuse(np.bincount(tokens.rows[~outside], minlength=len(rows)) == 0, rows, "context", contexts)
        # Only one that the tokenizer added: the text "[CLS]" gives one, too.
        is_cls = (np.concatenate(encoded["input_ids"]) == self.tokenizer.cls_token_id) & (side < 0)
        # Without one, the first token that can be no answer: not the context's.
        other = tokens.lowest(tokens.positions, side != (0 if self.context_first else 1), default=0)
        cls = tokens.lowest(tokens.positions, is_cls, default=other)
        result = {**encoded, "row": np.array(rows)[tokens.window_rows], "cls": cls}
        if "start" in batch:
            begin, end = np.array(batch["start"]), np.array(batch["end"])
            inside = (ends > begin[tokens.rows]) & (starts < end[tokens.rows]) & ~outside
            answers = [context[i:j] for context, i, j in zip(contexts, begin, end, strict=True)]
            lost = (begin >= 0) & (np.bincount(tokens.rows[inside], minlength=len(rows)) == 0)
            self._refuse(lost, rows, "answer", answers)
            result |= _labels(tokens, inside, starts, ends, cls)
        if self.offsets:
            result |= {"char_starts": tokens.by_window(starts), "char_ends": tokens.by_window(ends)}
        return result

    def _check_room(self, questions: list[str], contexts: list[str], rows: list[int]) -> None:
        # The tokenizer would panic, which no `except Exception` catches.
        import numpy as np

        def count(texts: list[str]) -> list[int]:
            ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            return [len(tokens) for tokens in ids["input_ids"]]

        counts = count(questions)
        self._refuse(np.array(counts) == 0, rows, "question", questions)
        total = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        for row, question, context, tokens in zip(rows, questions, contexts, counts, strict=True):
            room = total - tokens
            if room <= self.stride and (room < 1 or count([context])[0] > room):
                raise ValueError(
                    f"{self.source.where(row)}: the question {_short(question)!r} takes {tokens} of "
                    f"max_length={self.max_length} tokens and leaves {max(room, 0)} for its context, no more than "
                    f"stride={self.stride}, which windows share: raise max_length, lower stride, or shorten it"
                )

    def _refuse(self, bad: np.ndarray, rows: list[int], what: str, texts: Sequence[str]) -> None:
        if bad.any():
            at = int(bad.argmax())
            raise ValueError(
                f"{self.source.where(rows[at])}: the tokenizer makes no token of the {what} {_short(texts[at])!r}: "
                "remove the row"
            )


@dataclass(frozen=True)
class _Tokens:
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
    def of(cls, ids: list[list[int]], window_rows: list[int]) -> _Tokens:
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
        import numpy as np

        return np.split(values.astype(np.int32), self.begins[1:])


def _labels(
    tokens: _Tokens, inside: np.ndarray, starts: np.ndarray, ends: np.ndarray, cls: np.ndarray
) -> dict[str, np.ndarray]:
    """First and last token of the answer in each window; that of ``cls`` in windows without it, or with a part of it.

    Args:
        tokens: The tokens.
        inside: Those that hold a character of the answer.
        starts: Their first characters.
        ends: One past their last characters.
        cls: What stands for no answer, ``(windows,)``.
    """
    import numpy as np

    begins, stops = tokens.lowest(starts, inside, default=-1), tokens.highest(ends, inside)
    # By the characters of all the row's tokens: those of the answer itself need not be all in tokens.
    rows = tokens.window_rows.max() + 1
    begin, stop = np.full(rows, np.iinfo(begins.dtype).max), np.full(rows, -1)
    held = stops >= 0
    np.minimum.at(begin, tokens.window_rows[held], begins[held])
    np.maximum.at(stop, tokens.window_rows[held], stops[held])
    whole = held & (begins == begin[tokens.window_rows]) & (stops == stop[tokens.window_rows])
    first = tokens.lowest(tokens.positions, inside, default=-1)
    return {
        "start_positions": np.where(whole, first, cls),
        "end_positions": np.where(whole, tokens.highest(tokens.positions, inside), cls),
    }


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


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
