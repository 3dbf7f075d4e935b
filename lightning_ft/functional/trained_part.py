"""Which parameters go on training when a model's pretrained part is frozen."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_ft.core.base_weights import base_names, mark_base
from lightning_ft.core.layers import Layers


def train_only(module: nn.Module, parameters: Iterable[nn.Parameter], layers: Layers) -> dict[str, int]:
    """Freeze all but these and the head, as the base; where an earlier change did that already, leave its part alone.

    Args:
        module: The module.
        parameters: What trains beside the head.
        layers: Where the head is.

    Returns:
        How many values train, and how many there are.
    """
    trained = {*parameters, *layers.of(module).head}
    if not base_names(module):
        mark_base(module, [p for p in module.parameters() if p not in trained])
    return {
        "trainable": trained_size(module),
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def trained_size(module: nn.Module) -> int:
    """Number of values that train, tied ones once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
