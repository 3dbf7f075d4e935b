"""Texts with a gap to fill in, and their tokens."""

from __future__ import annotations

import string
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["literal", "text", "space", "mask"]


class Pattern:
    """A text with columns of a row in it and a gap, such as ``"{text} It was {mask} ."``.

    A column's name in braces stands for its text, ``{mask}`` for the gap; braces of the text itself are doubled. Words
    of several tokens need as many masks, one beside the other (``{mask}{mask}``). White space before a gap belongs to
    the word in it, as byte-level and SentencePiece vocabularies have it.

    Args:
        template: The text.

    Raises:
        ValueError: No gap, gaps apart from each other, no column, or braces that do not match.

    Example:
        >>> pattern = Pattern("{text} It was {mask} .")
        >>> pattern.columns, pattern.masks
        (['text'], 1)
        >>> "".join(pattern.pieces({"text": "A gem."}, word="great"))
        'A gem. It was great .'
    """

    def __init__(self, template: str) -> None:
        self.template = template
        parts: list[tuple[Kind, str]] = []
        try:
            for literal, name, spec, conversion in string.Formatter().parse(template):
                if literal:
                    parts.append(("literal", literal))
                if name is not None:
                    if not name or spec or conversion:
                        raise ValueError("a column's name and nothing else must stand between braces")
                    parts.append(("mask", "") if name == "mask" else ("text", name))
        except ValueError as error:
            raise ValueError(f"pattern {template!r}: {error}. Braces of the text are written {{{{ and }}}}") from None
        kinds = [kind for kind, _ in parts]
        if "mask" not in kinds:
            raise ValueError(f"pattern {template!r} has no {{mask}}: put one where the label's word belongs")
        if "text" not in kinds:
            raise ValueError(f"pattern {template!r} names no column: put one in braces, such as {{text}}")
        first, last = kinds.index("mask"), len(kinds) - 1 - kinds[::-1].index("mask")
        if any(kind == "text" or value.strip() for kind, value in parts[first:last]):
            raise ValueError(f"pattern {template!r} has masks apart from each other: they must hold one word together")
        self.masks = kinds.count("mask")
        self.parts = [*_split_space(parts[:first]), *[("mask", "")] * self.masks, *parts[last + 1 :]]
        self.columns = list(dict.fromkeys(value for kind, value in self.parts if kind == "text"))

    def pieces(self, texts: Mapping[str, str], *, mask: str = "", word: str | None = None) -> list[str]:
        """The text of each part.

        Args:
            texts: The text of each column.
            mask: What stands in each gap, without white space before it.
            word: What fills the whole gap instead.
        """
        fills = iter([mask] * self.masks if word is None else [word] + [""] * (self.masks - 1))
        shown = {"space": word is not None, "literal": True}
        return [
            texts[value] if kind == "text" else next(fills) if kind == "mask" else value if shown[kind] else ""
            for kind, value in self.parts
        ]

    @property
    def before_word(self) -> tuple[str, str]:
        """What stands before a word in the gap: a text that shows how a tokenizer sees the word, and white space."""
        place = [kind for kind, _ in self.parts].index("mask")
        space = self.parts[place - 1][1] if place and self.parts[place - 1][0] == "space" else ""
        rest = self.parts[: place - bool(space)]
        # After a column's text some sign stands for it; no tokenizer joins a full stop to the word behind it.
        return ("" if not rest else rest[-1][1] if rest[-1][0] == "literal" else "."), space


def _split_space(parts: Sequence[tuple[Kind, str]]) -> list[tuple[Kind, str]]:
    """White space at the end of what stands before the gap as a part of its own."""
    if not parts or parts[-1][0] != "literal":
        return list(parts)
    text = parts[-1][1]
    bare = text.rstrip()
    ending: list[tuple[Kind, str]] = [("literal", bare), ("space", text[len(bare) :])]
    return [*parts[:-1], *[part for part in ending if part[1]]]


def parse_patterns(patterns: str | Sequence[str]) -> list[Pattern]:
    """Patterns of the same number of masks.

    Raises:
        ValueError: No pattern, one of them twice, or patterns of different numbers of masks.
    """
    parsed = [Pattern(patterns)] if isinstance(patterns, str) else [Pattern(template) for template in patterns]
    templates = [pattern.template for pattern in parsed]
    if not parsed or len(set(templates)) < len(parsed):
        raise ValueError(f"patterns must be one text or several different ones, got {templates}")
    if len({pattern.masks for pattern in parsed}) > 1:
        raise ValueError(f"patterns={templates} must have the same number of masks, got {[p.masks for p in parsed]}")
    return parsed


class Body(NamedTuple):
    """Tokens of a filled pattern, without the special ones around them."""

    ids: list[int]
    """The tokens."""
    gap: list[bool]
    """Which of them stand in the gap."""
    cut: bool
    """Whether text was left out."""


def encode_pattern(
    pattern: Pattern,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    room: int,
    *,
    mask: str = "",
    words: Sequence[str] | None = None,
) -> list[Body]:
    """Tokens of a pattern for each row. Where they are too many, the ends of the longest texts are left out.

    Tokens are told apart by where they lie in the text and not by what they are, so that a mask token in a row's text
    is no gap.

    Args:
        pattern: The pattern.
        tokenizer: A fast tokenizer.
        texts: The texts of each column that the pattern names.
        room: Tokens that a row may have.
        mask: What stands in the gap.
        words: What fills each row's gap instead.

    Raises:
        ValueError: The pattern leaves no room for text.
    """
    columns = [texts[name] for name in pattern.columns]
    rows = [
        pattern.pieces(
            dict(zip(pattern.columns, values, strict=True)), mask=mask, word=None if words is None else words[row]
        )
        for row, values in enumerate(zip(*columns, strict=True))
    ]
    encoded = encode_plain(["".join(pieces) for pieces in rows], tokenizer)
    bodies = []
    for pieces, ids, spans in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = list(accumulate(map(len, pieces)))
        # By a token's last character: white space before a word belongs to it.
        parts = [bisect_right(ends, end - 1) for _, end in spans]
        kept = _fit(pattern, parts, room)
        bodies.append(
            Body([ids[i] for i in kept], [pattern.parts[parts[i]][0] == "mask" for i in kept], cut=len(kept) < len(ids))
        )
    return bodies


def encode_prompt(
    pattern: Pattern, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[str]], room: int, *, word: str
) -> list[Body]:
    """Tokens of what stands before the gap at a pattern's end, for a decoder to go on from.

    White space before the gap belongs to the prompt where it is a token of its own (a line break, for many
    vocabularies), and to the word where it is not: which of them, a word that stands there tells.

    Args:
        pattern: A pattern that ends with the gap.
        tokenizer: A fast tokenizer.
        texts: The texts of each column that the pattern names.
        room: Tokens that a row may have.
        word: A word of one token for the gap.

    Raises:
        ValueError: The pattern leaves no room for text.
    """
    if not pattern.before_word[1]:
        return encode_pattern(pattern, tokenizer, texts, room)
    words = [word] * len(next(iter(texts.values())))
    bodies = encode_pattern(pattern, tokenizer, texts, room + 1, words=words)
    kept = [[token for token, gap in zip(body.ids, body.gap, strict=True) if not gap] for body in bodies]
    return [Body(ids, [False] * len(ids), body.cut) for ids, body in zip(kept, bodies, strict=True)]


def _fit(pattern: Pattern, parts: Sequence[int], room: int) -> list[int]:
    """Which tokens stay, given the part that each lies in."""
    counts = {part: sum(1 for _ in run) for part, run in groupby(parts)}
    texts = [part for part in counts if pattern.parts[part][0] == "text"]
    fixed = len(parts) - sum(counts[part] for part in texts)
    if room <= fixed:
        raise ValueError(
            f"pattern {pattern.template!r} makes {fixed} tokens beside the texts, and max_length leaves {room}: "
            "raise max_length, or shorten the pattern or the demonstrations"
        )
    if len(parts) <= room:
        return list(range(len(parts)))
    allowed = {**counts, **dict(zip(texts, _shares([counts[part] for part in texts], room - fixed), strict=True))}
    starts: dict[int, int] = {}
    return [i for i, part in enumerate(parts) if i - starts.setdefault(part, i) < allowed[part]]


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each fits into `room` when the longest are cut first.

    Example:
        >>> _shares([9, 2, 7], 10)
        [4, 2, 4]
    """
    shares = list(lengths)
    for done, i in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        shares[i] = min(lengths[i], room // (len(lengths) - done))
        room -= shares[i]
    return shares


def encode_plain(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    """``input_ids`` and ``offset_mapping`` of texts, without special tokens.

    Raises:
        ValueError: The tokenizer does not know the latter.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} does not tell where its tokens lie in a text, by which gap and "
            "texts are told apart: use one with a fast version (a tokenizer.json)"
        )
    return tokenizer(  # type: ignore[no-any-return]
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
