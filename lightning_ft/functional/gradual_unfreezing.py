"""Gradual unfreezing: which groups train in which phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.phases import Phase, Stage


def unfreezing_phases(
    groups: Sequence[str],
    *,
    start: int = 1,
    groups_per_step: int = 1,
    until: str | None = None,
    previous: Literal["keep", "freeze"] = "keep",
) -> tuple[tuple[str, ...], ...]:
    """The phases of gradual unfreezing, top first: phase s trains the top ``start + s * groups_per_step`` units.

    A unit is a layer group; head and tail (final norm, pooler), which belong together, are one unit.

    With ``previous="freeze"`` they are those of chain-thaw: the top ``start`` units alone, then the units below them
    from the bottom upwards, ``groups_per_step`` at a time and alone, then everything.

    Args:
        groups: Group names from bottom to top, as in :class:`~lightning_ft.core.LayerGroups`.
        start: Units that train in the first phase.
        groups_per_step: Units added by each further phase.
        until: The lowest group that is ever released; the lowest of all by default.
        previous: Whether what was released stays so (``"keep"``) or freezes again in the next phase (``"freeze"``).

    Returns:
        For each phase the names of the groups that train in it, bottom to top; the last phase holds them all.

    Raises:
        ValueError: ``groups`` is empty, a number is not a positive integer, or ``until`` names none of the groups.

    Example:
        >>> for phase in unfreezing_phases(["embeddings", "block.0", "block.1", "tail", "head"]):
        ...     print(*phase)
        tail head
        block.1 tail head
        block.0 block.1 tail head
        embeddings block.0 block.1 tail head
        >>> unfreezing_phases(["a", "b", "c"], previous="freeze")
        (('c',), ('a',), ('b',), ('a', 'b', 'c'))

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification"; Felbo et al. 2017, "Using
        millions of emoji occurrences to learn any-domain representations" (chain-thaw).
    """
    for argument, value in {"start": start, "groups_per_step": groups_per_step}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}={value!r} must be a whole number of 1 or more")
    if previous not in ("keep", "freeze"):
        raise ValueError(f"previous={previous!r} must be 'keep' or 'freeze'")
    if not groups:
        raise ValueError("groups is empty: there is nothing to unfreeze")
    units = _units(groups, until)
    rest = len(units) - start
    if previous == "keep" or rest < 1:
        counts = [*range(start, len(units), groups_per_step), len(units)]
        bundles = [units[-count:] for count in counts]
    else:
        below = [units[i : min(i + groups_per_step, rest)] for i in range(0, rest, groups_per_step)]
        bundles = [units[rest:], *below, units]
    return tuple(tuple(name for unit in bundle for name in unit) for bundle in bundles)


def _units(groups: Sequence[str], until: str | None) -> list[list[str]]:
    """Units bottom to top, from the one that holds ``until``."""
    top = [name for name in groups if name in ("tail", "head")]
    units = [[name] for name in groups if name not in top] + ([top] if top else [])
    if until is None:
        return units
    if until not in groups:
        raise ValueError(f"until={until!r} must name the lowest group to release, one of {', '.join(groups)}")
    return units[next(i for i, unit in enumerate(units) if until in unit) :]


def explicit_stages(
    phases: Sequence[Phase], groups: LayerGroups, *, previous: Literal["keep", "freeze"] = "keep"
) -> list[Stage]:
    """The stages that a person's phases are for the groups of a model.

    Args:
        phases: What trains, in the order of training.
        groups: The model's.
        previous: Whether a phase trains also what the phases before it trained (``"keep"``) or its own groups alone.

    Raises:
        ValueError: A phase speaks of groups that the model does not have.

    Example:
        >>> from torch import nn
        >>> tower = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> groups = LayerGroups.of(tower, groups={"block.0": "^0", "block.1": "^1", "head": "^2"})
        >>> [stage.groups for stage in explicit_stages([Phase("head"), Phase("top:1", at="1 epoch")], groups)]
        [('head',), ('block.1', 'head')]
    """
    stages: list[Stage] = []
    for number, phase in enumerate(phases):
        try:
            chosen = groups.select(phase.train)
        except ValueError as error:
            raise ValueError(f"phases[{number}].train: {error}") from error
        kept = stages[-1].groups if stages and previous == "keep" else ()
        stages.append(phase.stage(tuple(name for name in groups if name in (*chosen, *kept))))
    return stages
