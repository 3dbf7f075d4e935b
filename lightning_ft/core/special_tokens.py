"""The special tokens that a tokenizer puts around a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids of the special tokens that a tokenizer puts before and after a text.

    They are seen on a text with and without them, of which the tokenizer makes a token: not every one makes some of
    ``"a"``. The tokenizer's own mask of special tokens is not asked: tokenizers written in Python may leave it empty.

    Raises:
        ValueError: It puts some inside the text, or makes no token of any text.
    """
    for text in _probes(tokenizer):
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not bare:
            continue
        framed = list(tokenizer(text)["input_ids"])
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} makes {framed} of a text with special tokens and {bare} "
            "without: its special tokens must stand around the text"
        )
    raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} makes no token of any text: its vocabulary is no use")


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from "aA0"
    special = set(tokenizer.all_special_tokens)
    for token in tokenizer.get_vocab():
        if token not in special:
            yield tokenizer.convert_tokens_to_string([token])
