"""A head whose weight is divided by its spectral norm while a fit runs, and in every checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_ft.callbacks._weight_average import CheckpointWriter
from lightning_ft.core.layers import Layers
from lightning_ft.core.sharding import is_sharded
from lightning_ft.functional.spectral_norm import NormalisedLayer, normalised


class NormalisedHead:
    """Checkpoints hold what the model computes with, W/σ(W); W itself, which trains, travels in the callback's state.

    Args:
        head: Path of the linear layer that gives the logits; True to find it.
    """

    def __init__(self, head: bool | str) -> None:
        self.head = head
        self._raw: Tensor | None = None
        self._norm: NormalisedLayer | None = None
        self._writer: CheckpointWriter | None = None

    def attach(self, trainer: Trainer, module: LightningModule, layers: Layers) -> None:
        """Call in ``on_fit_start``, when the weights of a checkpoint are restored.

        Raises:
            ValueError: The layer is not found, or sharded.
        """
        self.release()
        path, layer = find_head(module, self.head, layers)
        if is_sharded(layer.weight):
            raise ValueError(f"spectral_norm reads whole weights, and {path}.weight is sharded: use DDP")
        if self._raw is not None:
            with torch.no_grad():
                layer.weight.copy_(self._raw)
            self._raw = None
        self._norm = NormalisedLayer(layer)
        names = [n for n, p in module.named_parameters(remove_duplicate=False) if p is layer.weight]

        def write(checkpoint: dict[str, Any]) -> None:
            if self._norm is not None:
                state = checkpoint["state_dict"]
                state.update({name: normalised(state[name]) for name in names if name in state})

        self._writer = CheckpointWriter(module, write)

    def release(self) -> None:
        """Call in ``teardown`` and ``on_exception``."""
        if self._norm is not None:
            self._norm.remove()
            self._norm = None
        if self._writer is not None:
            self._writer.remove()
            self._writer = None

    def state(self) -> Tensor | None:
        """W, a copy: when the fit ends the layer holds W/σ(W)."""
        return self._raw if self._norm is None else self._norm.layer.weight.detach().clone()

    def load(self, state: Tensor | None) -> None:
        """Go on from :meth:`state`."""
        self._raw = state


def find_head(module: LightningModule, head: bool | str, layers: Layers) -> tuple[str, nn.Linear]:
    """The linear layer that gives the logits.

    Raises:
        ValueError: There is none, or there are several.
    """
    groups = layers.of(module)
    inside = set(groups.head)
    linear = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    found = {name: child for name, child in linear.items() if child.weight in inside}
    if isinstance(head, str):
        found = {head: linear[head]} if head in linear else {}
    names = list(found or linear)
    if len(found) != 1:
        raise ValueError(
            f"spectral_norm={head!r} must name the linear layer that gives the logits, unless the head has just one: "
            f'spectral_norm="{names[-1] if names else "classifier"}"; there are: {", ".join(names) or "none"}'
        )
    return next(iter(found.items()))
