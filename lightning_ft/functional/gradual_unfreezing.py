"""Gradual unfreezing: which groups train in which phase."""

from __future__ import annotations

from collections.abc import Sequence


def unfreezing_phases(
    groups: Sequence[str], *, start: int = 1, groups_per_step: int = 1
) -> tuple[tuple[str, ...], ...]:
    """The phases of gradual unfreezing, top first: phase s trains the top ``start + s * groups_per_step`` units.

    A unit is a layer group; head and tail (final norm, pooler), which belong together, are one unit.

    Args:
        groups: Group names from bottom to top, as in :class:`~lightning_ft.core.LayerGroups`.
        start: Units that train in the first phase.
        groups_per_step: Units added by each further phase.

    Returns:
        For each phase the names of the groups that train in it, bottom to top; the last phase holds them all.

    Raises:
        ValueError: ``groups`` is empty, or a number is not a positive integer.

    Example:
        >>> for phase in unfreezing_phases(["embeddings", "block.0", "block.1", "tail", "head"]):
        ...     print(*phase)
        tail head
        block.1 tail head
        block.0 block.1 tail head
        embeddings block.0 block.1 tail head

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification".
    """
    for argument, value in {"start": start, "groups_per_step": groups_per_step}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}={value!r} must be a whole number of 1 or more")
    if not groups:
        raise ValueError("groups is empty: there is nothing to unfreeze")
    top = [name for name in groups if name in ("tail", "head")]
    units = [[name] for name in groups if name not in top] + ([top] if top else [])
    counts = [*range(start, len(units), groups_per_step), len(units)]
    return tuple(tuple(name for unit in units[-count:] for name in unit) for count in counts)
