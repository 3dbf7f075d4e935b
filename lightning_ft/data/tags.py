"""Tags of words: read, completed to a scheme, made from spans of characters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_ft.data.labels import encode_labels
from lightning_ft.data.sources import Source, as_lists, first_true, is_list, is_text

if TYPE_CHECKING:
    import pyarrow as pa

Scheme = Literal["BIO", "BIOES", "IO"]
# The prefixes of a scheme: of an entity's first word, those between, its last, and an only one.
_PREFIXES = {"BIO": tuple("BIIB"), "BIOES": tuple("BIES"), "IO": tuple("IIII")}


def complete_labels(types: Iterable[str], scheme: Scheme) -> list[str]:
    """All tags of some types: ``O``, then the others sorted.

    Example:
        >>> complete_labels(["PER", "LOC"], "BIO")
        ['O', 'B-LOC', 'B-PER', 'I-LOC', 'I-PER']
    """
    return ["O", *sorted({f"{prefix}-{kind}" for kind in types for prefix in _PREFIXES[scheme]})]


def entity_type(tag: str, scheme: Scheme) -> str | None:
    """The type of a tag; None for ``O``.

    Raises:
        ValueError: It is no tag of the scheme.
    """
    prefix, _, kind = tag.partition("-")
    if tag != "O" and not (kind and prefix in _PREFIXES[scheme]):
        prefixes = " and ".join(f"'{prefix}-…'" for prefix in dict.fromkeys(_PREFIXES[scheme]))
        raise ValueError(f"{tag!r} is no tag of scheme={scheme!r}, whose tags are 'O' and {prefixes}")
    return kind or None


def read_lists(source: Source, column: str, what: str) -> pa.Array:
    """A column of lists of strings, ``(rows,)``.

    Args:
        source: The rows.
        column: The column.
        what: What the lists hold, for messages ("words").

    Raises:
        TypeError: The column holds something else.
        ValueError: A null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = _lists(source, column, f"lists of {what}")
    flat = values.flatten()
    rows = pc.list_parent_indices(values)
    if len(flat) and pa.types.is_null(flat.type):
        flat = flat.cast(pa.string())
    if len(flat) and not is_text(flat.type):
        raise TypeError(
            f"{source.where(rows[0].as_py())}: column {column!r} must hold lists of {what} as strings, got "
            f"{flat[0].as_py()!r} ({flat.type}); numbers of classes need a datasets.ClassLabel, which names them"
        )
    if (index := first_true(flat.is_null())) is not None:
        raise ValueError(f"{source.where(rows[index].as_py())}: column {column!r} holds a null among its {what}")
    return as_lists(values, flat.cast(pa.string()))


def read_tags(source: Source, column: str, scheme: Scheme, words: pa.Array, words_column: str) -> pa.Array:
    """The tags of the words of each row, ``(rows,)`` lists of strings.

    Args:
        source: The rows.
        column: Its column of tags.
        scheme: The scheme of the tags.
        words: From :func:`read_lists`.
        words_column: Where the words come from, for messages.

    Raises:
        TypeError: The column holds something else.
        ValueError: More or fewer tags than words, or a tag that is not of the scheme.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    tags = read_lists(source, column, "tags")
    count, expected = pc.list_value_length(tags), pc.list_value_length(words)
    if (row := first_true(pc.not_equal(count, expected))) is not None:
        raise ValueError(
            f"{source.where(row)}: column {words_column!r} holds {expected[row]} words and column {column!r} "
            f"{count[row]} tags: every word needs one"
        )
    flat = tags.flatten()
    for tag in flat.unique().to_pylist():
        try:
            entity_type(tag, scheme)
        except ValueError as error:
            index = first_true(pc.equal(flat, pa.scalar(tag)))
            row = pc.list_parent_indices(tags)[index].as_py()
            raise ValueError(f"{source.where(row)}: column {column!r}: {error}") from None
    return tags


@dataclass(frozen=True)
class Spans:
    """Entities as spans of characters, in the order of rows and in each of characters.

    Args:
        row: Number of the row of each, ``(spans,)``.
        start: Its first character.
        end: The character after its last.
        kind: Its type, ``(spans,)`` strings.
    """

    row: Tensor
    start: Tensor
    end: Tensor
    kind: pa.Array


def read_spans(source: Source, column: str, text: str) -> Spans:
    """The spans of a column of lists of ``{start, end, label}``.

    Args:
        source: The rows.
        column: Its column of spans. Offsets count characters (code points) from 0, the end excluded.
        text: Its column of texts.

    Raises:
        TypeError: The column holds something else.
        ValueError: A null, a span that is empty or not within its text, or two that overlap.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = "lists of {start, end, label}, with whole numbers and a string"
    values = _lists(source, column, wanted)
    flat, rows = values.flatten(), pc.list_parent_indices(values)
    if not len(flat):
        none = torch.zeros(0, dtype=torch.int64)
        return Spans(none, none, none, pa.array([], pa.string()))
    names = [field.name for field in flat.type] if pa.types.is_struct(flat.type) else []
    fields = {name: flat.field(name) for name in ("start", "end", "label") if name in names}
    if (
        len(fields) < 3
        or not is_text(fields["label"].type)
        or not (pa.types.is_integer(fields["start"].type) and pa.types.is_integer(fields["end"].type))
    ):
        place = source.where(rows[0].as_py())
        raise TypeError(f"{place}: column {column!r} must hold {wanted}, got {flat[0].as_py()!r} ({flat.type})")
    start, end = fields["start"].cast(pa.int64()), fields["end"].cast(pa.int64())
    size = pc.utf8_length(source.texts(text)).combine_chunks().take(rows).cast(pa.int64())
    order = pc.sort_indices(pa.table({"row": rows, "start": start}), [("row", "ascending"), ("start", "ascending")])
    last = pc.if_else(pc.equal(rows.take(order)[1:], rows.take(order)[:-1]), end.take(order)[:-1], 0)
    overlaps = pa.concat_arrays([pa.array([False]), pc.less(start.take(order)[1:], last)])
    faults = {
        "start, end and label must not be null": pc.or_(
            pc.or_(start.is_null(), end.is_null()), fields["label"].is_null()
        ),
        "start must be 0 or more, and end more than start": pc.or_(pc.less(start, 0), pc.less_equal(end, start)),
        "it ends after the text, which has {} characters": pc.greater(end, size),
        "label must not be empty": pc.equal(pc.utf8_trim_whitespace(fields["label"]), ""),
    }
    for why, bad in faults.items():
        if (index := first_true(bad)) is not None:
            _fault(source, column, rows[index].as_py(), flat[index].as_py(), why.format(size[index]))
    if (index := first_true(overlaps)) is not None:
        chosen = order[index].as_py()
        _fault(source, column, rows[chosen].as_py(), flat[chosen].as_py(), "it overlaps the one before it")
    row, first, after = (torch.tensor(part.take(order).to_numpy()).long() for part in (rows, start, end))
    return Spans(row, first, after, fields["label"].take(order).cast(pa.string()))


@dataclass(frozen=True)
class Words:
    """Where the words of each row lie.

    Args:
        counts: Words of each row, ``(rows,)``.
        offsets: First character of each word and the one after its last, ``(words of all rows, 2)``.
    """

    counts: Tensor
    offsets: Tensor

    @property
    def first(self) -> Tensor:
        """Position of each row's first word among all, ``(rows,)``."""
        return self.counts.cumsum(0) - self.counts

    @property
    def rows(self) -> Tensor:
        """Number of each word's row, ``(words of all rows,)``."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)


def align_spans(
    source: Source, column: str, text: str, spans: Spans, words: Words, labels: Sequence[str], scheme: Scheme
) -> tuple[Tensor, int]:
    """Spans as tags of words. A span that cuts a word takes the whole of it, unless the span before it has it already.

    Args:
        source: The rows.
        column: Its column of spans, for messages.
        text: Its column of texts.
        spans: From :func:`read_spans`.
        words: The words of each row.
        labels: The tags, in the order of their numbers.
        scheme: Their scheme.

    Returns:
        The number of each word's tag, ``(words of all rows,)``, and how many spans had to be changed to fit words, not
        counting white space at their ends.

    Raises:
        ValueError: A span without a word of its own, or of an unknown type.
    """
    types = sorted({kind for label in labels if (kind := entity_type(label, scheme)) is not None})
    kinds = torch.tensor(_known(source, column, spans, types))
    # One axis for the characters of all rows.
    base = int(max(words.offsets.max() if len(words.offsets) else 0, spans.end.max() if len(spans.end) else 0)) + 1
    start, end = (words.offsets + words.rows[:, None] * base).unbind(1)
    first = torch.searchsorted(end.contiguous(), spans.row * base + spans.start, right=True)
    last = torch.searchsorted(start.contiguous(), spans.row * base + spans.end)
    first[1:] = torch.maximum(first[1:], last[:-1])
    for index in torch.nonzero(first >= last).flatten().tolist():
        item = {"start": int(spans.start[index]), "end": int(spans.end[index]), "label": spans.kind[index].as_py()}
        why = "the tokenizer finds no word in it that is not in the span before it: remove it, or correct it"
        _fault(source, column, int(spans.row[index]), item, why)
    table = torch.tensor(
        [[labels.index(tag) if (tag := f"{p}-{kind}") in labels else -1 for p in _PREFIXES[scheme]] for kind in types]
    ).view(-1, 4)
    size = last - first
    which = torch.repeat_interleave(torch.arange(len(size)), size)
    place = torch.arange(len(which)) - (size.cumsum(0) - size)[which]
    final = place == size[which] - 1
    role = torch.where(place == 0, torch.where(final, 3, 0), torch.where(final, 2, 1))
    tags = torch.full((len(words.offsets),), list(labels).index("O"))
    tags[first[which] + place] = found = table[kinds[which], role]
    if (found < 0).any():
        bad = int(which[found < 0][0])
        kind = spans.kind[bad].as_py()
        raise ValueError(
            f"{source.where(int(spans.row[bad]))}: column {column!r}: the labels {list(labels)} lack a tag of "
            f"scheme={scheme!r} for {kind!r}: give labels=... with all of {complete_labels([kind], scheme)[1:]}"
        )
    return tags, _changed(source, text, spans, words.offsets[first, 0], words.offsets[last - 1, 1])


def _changed(source: Source, text: str, spans: Spans, start: Tensor, end: Tensor) -> int:
    """How many spans differ in more than white space from ``start`` and ``end``."""
    texts, count = source.table[text], 0
    for index in torch.nonzero((spans.start != start) | (spans.end != end)).flatten().tolist():
        whole = texts[int(spans.row[index])].as_py()
        given = whole[int(spans.start[index]) : int(spans.end[index])]
        count += given.strip() != whole[int(start[index]) : int(end[index])]
    return count


def _known(source: Source, column: str, spans: Spans, types: Sequence[str]) -> list[int]:
    """The number of each span's type."""
    import pyarrow as pa

    counts = torch.bincount(spans.row, minlength=len(source))
    ends = pa.array([0, *counts.cumsum(0).tolist()], pa.int32())
    numbers = encode_labels(source, column, pa.ListArray.from_arrays(ends, spans.kind), types)
    return list(numbers.flatten().to_pylist())


def _lists(source: Source, column: str, wanted: str) -> pa.Array:
    values = source.table[column].combine_chunks()
    if (row := first_true(values.is_null())) is not None:
        raise ValueError(f"{source.where(row)}: column {column!r} is null: give an empty list for none")
    if not is_list(values.type):
        raise TypeError(
            f"{source.where(0)}: column {column!r} must hold {wanted}, got {values[0].as_py()!r} ({values.type}); csv "
            "and tsv have no lists: write jsonl or parquet"
        )
    return values


def _fault(source: Source, column: str, row: int, span: Mapping[str, Any], why: str) -> None:
    raise ValueError(f"{source.where(row)}: column {column!r} holds the span {span}: {why}")
