"""Checkpoints that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_ft.core.files import atomic_file
from lightning_ft.functional.delta_checkpoint import from_delta


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, then rename it there.

    Lightning's own writes to the system's temporary folder and moves the file, which across file systems is a copy:
    killed within it, the run is left with half a ``last.ckpt`` in place of the good one. Local files only; other
    addresses (``s3://``) go through Lightning's own. A plugin is bound to its package: for ``lightning.pytorch``, not
    for ``pytorch_lightning``.

    A checkpoint of :class:`~lightning_ft.plugins.DeltaCheckpointIO` is read whole, where its base still lies.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        with atomic_file(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        loaded: dict[str, Any] = from_delta(super().load_checkpoint(path, map_location, weights_only), source=str(path))
        return loaded
