"""Rows in patterns with a gap, as windows of tokens; and what a model without content prefers to put there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ft.core.pattern import Pattern, encode_pattern, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Contexts = Sequence[Sequence[Sequence[Sequence[int]]]]
"""Tokens of demonstrations, ``[draw][pattern][demonstration][token]``."""


class Frame(NamedTuple):
    """What stands around a filled pattern and its demonstrations.

    A masked model reads the row first and each demonstration behind it, ended as the row is; a decoder, which fills in
    what comes last, reads the demonstrations first.

    Example:
        >>> Frame([1], [2], decoder=False).join([7, 8], [[3, 4], [5]])
        [1, 7, 8, 2, 3, 4, 2, 5, 2]
        >>> Frame([1], [9], decoder=True).join([7, 8], [[3, 4], [5]])
        [1, 3, 4, 9, 5, 9, 7, 8]
    """

    before: list[int]
    """Special tokens at the beginning."""
    after: list[int]
    """Special tokens at the end of each text; between demonstrations for a decoder."""
    decoder: bool
    """Whether the model is a decoder."""

    def join(self, ids: Sequence[int], demonstrations: Iterable[Sequence[int]] = ()) -> list[int]:
        """The tokens of a row and its demonstrations as one."""
        shown = [token for demonstration in demonstrations for token in (*demonstration, *self.after)]
        return [*self.before, *shown, *ids] if self.decoder else [*self.before, *ids, *self.after, *shown]

    def add(self, ids: Sequence[int], demonstrations: Iterable[Sequence[int]]) -> list[int]:
        """What :meth:`join` makes of them, for ``ids`` that are framed already."""
        end = len(ids) - (0 if self.decoder else len(self.after))
        return self.join(ids[len(self.before) : end], demonstrations)

    def gap(self, ids: Sequence[int], inside: Sequence[bool]) -> list[int]:
        """1 where a joined row's logits are the gap's, ``inside`` being the row's own tokens that stand in it."""
        if self.decoder:
            return [0] * (len(ids) - 1) + [1]
        start = [0] * len(self.before) + [int(token) for token in inside]
        return start + [0] * (len(ids) - len(start))


def cloze_windows(
    patterns: Sequence[Pattern],
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    texts: Mapping[str, Sequence[str]],
    rows: Sequence[int],
    *,
    room: int,
    word: str,
    contexts: Contexts = (),
) -> dict[str, list[Any]]:
    """Rows under every pattern and in every context, framed; row by row, in each draw by draw and pattern by pattern.

    Args:
        patterns: The patterns.
        tokenizer: A fast tokenizer.
        frame: What stands around.
        texts: The texts of each column that a pattern names.
        rows: A number for each row.
        room: Tokens that a filled pattern may have, without its frame and demonstrations.
        word: A word of one token, which for a decoder shows where the prompt ends.
        contexts: Demonstrations; none for none.

    Returns:
        Of each window ``input_ids``, ``mask_positions`` (1 where the gap is), ``pattern``, ``row`` and ``truncated``.

    Raises:
        ValueError: A pattern leaves no room for text.
    """
    filled = [
        encode_prompt(pattern, tokenizer, texts, room, word=word)
        if frame.decoder
        else encode_pattern(pattern, tokenizer, texts, room, mask=str(tokenizer.mask_token))
        for pattern in patterns
    ]
    out: dict[str, list[Any]] = {n: [] for n in ("input_ids", "mask_positions", "pattern", "row", "truncated")}
    for number, row in enumerate(rows):
        for context in contexts or [[[] for _ in patterns]]:
            for pattern, demonstrations in enumerate(context):
                body = filled[pattern][number]
                ids = frame.join(body.ids, demonstrations)
                out["input_ids"].append(ids)
                out["mask_positions"].append(frame.gap(ids, body.gap))
                out["pattern"].append(pattern)
                out["row"].append(row)
                out["truncated"].append(body.cut)
    return out


def content_free(mask_token: str | None) -> list[str]:
    """Texts without content, those of Zhao et al. 2021."""
    return ["N/A", "", mask_token or "[MASK]"]
