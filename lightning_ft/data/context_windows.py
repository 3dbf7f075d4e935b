"""Questions with their contexts as overlapping windows of tokens, and where answers lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_ft.data.sources import Source
from lightning_ft.functional.context_windows import WindowTokens, check_room, place_tokens, shorten

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
            return_attention_mask=False,
        )
        of = encoded.pop("overflow_to_sample_mapping")
        tokens, starts, ends, outside, cls = place_tokens(
            encoded.encodings, of, contexts, context_first=self.context_first, cls=self.tokenizer.cls_token_id
        )
        self._refuse(np.bincount(tokens.rows[~outside], minlength=len(rows)) == 0, rows, "context", contexts)
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
        check_room(
            questions,
            contexts,
            counts,
            lambda context: count([context])[0],
            lambda place: self.source.where(rows[place]),
            max_length=self.max_length,
            special=self.tokenizer.num_special_tokens_to_add(pair=True),
            stride=self.stride,
        )

    def _refuse(self, bad: np.ndarray, rows: list[int], what: str, texts: Sequence[str]) -> None:
        if bad.any():
            at = int(bad.argmax())
            raise ValueError(
                f"{self.source.where(rows[at])}: the tokenizer makes no token of the {what} {shorten(texts[at])!r}: "
                "remove the row"
            )


def _labels(
    tokens: WindowTokens, inside: np.ndarray, starts: np.ndarray, ends: np.ndarray, cls: np.ndarray
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
