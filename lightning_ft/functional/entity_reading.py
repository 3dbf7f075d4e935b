"""From the tags of a row's words to entities, in plain Python: what modules and exported models answer with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def read_entities(
    tags: Sequence[int],
    scores: Sequence[float],
    offsets: Sequence[Sequence[int]],
    text: str,
    types: Sequence[str],
    table: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """The entities of one row, read strictly.

    Args:
        tags: The number of each word's tag, ``(words,)``.
        scores: Its probability, ``(words,)``.
        offsets: First character of each word and the one after its last, ``(words, 2)``.
        text: What the offsets count in.
        types: Names of the types.
        table: What each tag means, as :func:`lightning_ft.metrics.entity_f1.tag_table` gives it: the number of its
            type, and whether it opens an entity, goes on with one, lets another go on with it, and may be the last.

    Returns:
        ``{"label", "text", "start", "end", "score"}`` of each, in order; the score is the mean of its words'.

    Example:
        >>> table = [[-1, 0, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]  # O, B-PER, I-PER
        >>> read_entities([2, 1, 2], [0.5, 0.5, 1.0], [(0, 2), (3, 6), (7, 10)], "by Ann Lee", ["PER"], table)
        [{'label': 'PER', 'text': 'Ann Lee', 'start': 3, 'end': 10, 'score': 0.75}]
    """
    found = []
    for first, after in _spans(tags, table):
        start, end = offsets[first][0], offsets[after - 1][1]
        found.append(
            {
                "label": types[table[tags[first]][0]],
                "text": text[start:end],
                "start": start,
                "end": end,
                "score": sum(scores[first:after]) / (after - first),
            }
        )
    return found


def _spans(tags: Sequence[int], table: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """First word of each entity and the one after its last."""
    start: int | None = None
    before = [-1, 0, 0, 0, 0]
    for place, tag in enumerate(tags):
        kind, opens, inside, _, _ = now = table[tag]
        if not (inside and before[3] and kind == before[0]):  # it does not go on with what is before it
            if start is not None and before[4]:
                yield start, place
            start = place if opens else None
        before = list(now)
    if start is not None and before[4]:
        yield start, len(tags)
