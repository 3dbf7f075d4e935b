"""The words that stand for labels, as tokens in a pattern's gap: what cloze data and the cloze head share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_ft.core.pattern import Pattern, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def parse_verbalizer(verbalizer: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """The words of each label, as lists.

    Raises:
        ValueError: Fewer than two labels, a label without words, an empty word, or a word that stands for two labels.

    Example:
        >>> parse_verbalizer({"pos": "great", "neg": ["bad", "dull"]})
        {'pos': ['great'], 'neg': ['bad', 'dull']}
    """
    words = {str(name): [given] if isinstance(given, str) else list(given) for name, given in verbalizer.items()}
    if len(words) < 2:
        raise ValueError(f"verbalizer={dict(verbalizer)} must give words for two labels or more")
    of: dict[str, str] = {}
    for label, given in words.items():
        if not given or not all(isinstance(word, str) and word.strip() == word != "" for word in given):
            raise ValueError(
                f"verbalizer gives label {label!r} the words {given!r}: give one or more, without white space around"
            )
        for word in given:
            if word in of:
                raise ValueError(f"verbalizer gives {word!r} twice, to {of[word]!r} and {label!r}: choose another word")
            of[word] = label
    return words


def is_decoder(tokenizer: PreTrainedTokenizerBase, patterns: Sequence[Pattern], decoder: bool | None) -> bool:
    """Whether the gap is the next token, and not a mask: as ``decoder`` says, else whether there is no mask token.

    Raises:
        ValueError: There must be a mask token and is none, or a decoder would not see all of a pattern.
    """
    if decoder is None:
        decoder = tokenizer.mask_token is None
    if not decoder and tokenizer.mask_token is None:
        raise ValueError(
            f"decoder=False needs a mask token; the tokenizer {tokenizer.name_or_path!r} has none: leave decoder out"
        )
    for pattern in patterns if decoder else ():
        if pattern.parts[-1][0] != "mask" or pattern.masks > 1:
            raise ValueError(
                f"pattern {pattern.template!r}: a decoder sees only what stands before the gap, which is one token: "
                "end the pattern with one {mask}"
            )
    return decoder


def word_tokens(
    verbalizer: Mapping[str, Sequence[str]], pattern: Pattern, tokenizer: PreTrainedTokenizerBase, *, decoder: bool
) -> list[list[list[int]]]:
    """The tokens of every label's words as they stand in a pattern's gap, ``[label][word][token]``.

    Args:
        verbalizer: The words of each label.
        pattern: The pattern.
        tokenizer: A fast tokenizer.
        decoder: Whether a prompt goes before the words, see :func:`~lightning_ft.core.pattern.encode_prompt`.

    Raises:
        ValueError: A word that the vocabulary lacks, that takes more tokens than there are masks, or the same ones as
            another word; more masks than any word needs; or words that a decoder's prompt would end differently for.
    """
    gaps = {word: _in_gap(word, pattern, tokenizer) for words in verbalizer.values() for word in words}
    tokens = {word: ids for word, (_, ids) in gaps.items()}
    first = next(iter(gaps))
    if decoder and (odd := next((word for word in gaps if gaps[word][0] != gaps[first][0]), None)) is not None:
        raise ValueError(
            f"verbalizer: in pattern {pattern.template!r} the white space before {first!r} and before {odd!r} makes "
            "different tokens, so that they would go on from different prompts: choose other words"
        )
    longest = max(map(len, tokens.values()))
    if longest < pattern.masks:
        raise ValueError(
            f"pattern {pattern.template!r} has {pattern.masks} masks, and no word of the verbalizer takes more than "
            f"{longest}: write {longest}"
        )
    seen: dict[tuple[int, ...], str] = {}
    for word, ids in tokens.items():
        if (other := seen.setdefault(tuple(ids), word)) != word:
            raise ValueError(f"verbalizer: {other!r} and {word!r} are the same to this tokenizer: choose another word")
    return [[tokens[word] for word in words] for words in verbalizer.values()]


def _in_gap(word: str, pattern: Pattern, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the white space before a word that are not the word's own, and those of the word."""
    before, space = pattern.before_word
    start = len(before) + len(space)
    encoded = encode_plain([before + space + word], tokenizer)
    pairs = list(zip(encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True))
    inside = [(token, span) for token, span in pairs if span[1] > start]
    ids = [token for token, _ in inside]
    space_ids = [token for token, span in pairs if len(before) <= span[0] and span[1] <= start]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"verbalizer: the tokenizer has no token for {word!r} (it makes {pieces}): choose another")
    if inside[0][1][0] < len(before):
        raise ValueError(
            f"verbalizer: in pattern {pattern.template!r} the tokenizer joins {word!r} to what stands before it "
            f"({pieces}): put a space before {{mask}}"
        )
    if len(ids) > pattern.masks:
        raise ValueError(
            f"verbalizer: {word!r} is {len(ids)} tokens, {pieces}, and pattern {pattern.template!r} has a gap for "
            f"{pattern.masks}: choose a shorter word, or for a masked language model write {{mask}} {len(ids)} times"
        )
    return space_ids, ids
