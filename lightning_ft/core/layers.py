"""Where a model's layers are, said once for everything that speaks of depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_ft.core.layer_groups import LayerGroups, block_paths


@dataclass(frozen=True)
class Layers:
    """What tells apart the layers of a model in which :class:`LayerGroups` cannot, or should not, find them by itself.

    Args:
        blocks: Path of the list of blocks, such as ``"backbone.layers"``; several are stacked in the order given.
        head: Path of each module that is the head; ``[]`` if there is none, as in a language model with a tied head.
        groups: For a model without a list of blocks: group name to regular expression, bottom to top.

    Example:
        >>> Layers(head="verdict")
        Layers(blocks=None, head='verdict', groups=None)
    """

    blocks: str | Sequence[str] | None = None
    head: str | Sequence[str] | None = None
    groups: Mapping[str, str] | None = None

    def of(self, module: nn.Module) -> LayerGroups:
        """The layer groups of a module, see :meth:`LayerGroups.of`."""
        return LayerGroups.of(module, blocks=self.blocks, head=self.head, groups=self.groups)

    def block_paths(self, module: nn.Module) -> dict[str, list[str]]:
        """Paths of the blocks by group name, see :func:`lightning_ft.core.layer_groups.block_paths`.

        Raises:
            ValueError: The layers are given as regular expressions, which name parameters and no blocks.
        """
        if self.groups is not None:
            raise ValueError(
                "layers=Layers(groups=...) names parameters and no list of blocks: pass Layers(blocks=...)"
            )
        return block_paths(module, blocks=self.blocks)


def as_layers(layers: Layers | Mapping[str, Any] | None) -> Layers:
    """Layers, or their plain arguments, or nothing given, as :class:`Layers`."""
    return layers if isinstance(layers, Layers) else Layers(**(layers or {}))


def plain_layers(layers: Layers | None) -> dict[str, Any] | None:
    """Layers as a checkpoint holds them; :func:`as_layers` reads them again."""
    if layers is None:
        return None

    def plain(value: str | Sequence[str] | None) -> str | list[str] | None:
        return value if value is None or isinstance(value, str) else list(value)

    groups = None if layers.groups is None else dict(layers.groups)
    return {"blocks": plain(layers.blocks), "head": plain(layers.head), "groups": groups}
