"""Texts as tokens, by the tokenizer that lies in the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ft.export.reading.reader import Exported, Item, Part, shown


def open_tokenizer(place: Path) -> Any:
    """The tokenizer of a folder, which cuts and pads nothing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TextEncoder:
    """Texts, or pairs of texts, as one sequence of tokens of limited length.

    Args:
        exported: The folder.
        strategy: Which text of a pair is cut: ``"longest_first"`` or ``"only_first"``.

    Raises:
        ValueError: ``max_length`` has no room for a text.
    """

    def __init__(self, exported: Exported, *, strategy: str = "longest_first") -> None:
        self.limit, self.truncate = exported.max_length, exported.truncate
        self.tokenizer = self._cut = open_tokenizer(exported.place)
        if self.limit is None:
            return
        if self.limit <= (special := self.tokenizer.num_special_tokens_to_add(False)):
            raise ValueError(f"max_length={self.limit} leaves no room for text beside {special} special tokens")
        # An object of its own: switching one between two settings would not be safe among threads.
        self._cut = open_tokenizer(exported.place)
        self._cut.enable_truncation(self.limit, strategy=strategy, direction=exported.truncation_side)

    def __call__(self, where: str, *texts: str) -> Any:
        """The encoding of a text or a pair.

        Raises:
            ValueError: There is no token, or there are too many and they are not to be cut.
        """
        encoding = self.tokenizer.encode(*texts)
        if not encoding.ids:
            raise ValueError(f"{where}: the tokenizer makes no token of it: give a text")
        if self.limit is None or len(encoding.ids) <= self.limit:
            return encoding
        if not self.truncate:
            raise ValueError(
                f"{where}: it has {len(encoding.ids)} tokens, and max_length={self.limit}: shorten it, or set "
                "truncate=True to leave out its end"
            )
        return self._cut.encode(*texts)


def check_texts(where: str, row: Any, texts: Sequence[Any], expected: str) -> list[str]:
    """What was taken from a row, if it is texts.

    Args:
        where: What to call the row.
        row: What the user gave.
        texts: What was taken from it.
        expected: What a row should be.

    Raises:
        TypeError: One of them is not.
        ValueError: One of them has characters that no text has.
    """
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{where}: expected {expected}, got {shown(row)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: half of a surrogate pair stands at character {error.start}, which no text holds: read it "
                "as UTF-8"
            ) from None
    return list(texts)


def single(encoding: Any, row: Any = None) -> Item:
    """An item of one part."""
    return Item([Part([encoding.ids], [encoding.type_ids])], row)
