"""Checkpoints that keep only what differs from the pretrained weights."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from typing_extensions import override

from lightning_ft.core.report import Report
from lightning_ft.functional.delta_checkpoint import Base, from_delta, to_delta
from lightning_ft.plugins.atomic_checkpoint_io import AtomicCheckpointIO


class DeltaCheckpointIO(CheckpointIO):
    """Save of each weight what differs from a base, and give it back bit for bit.

    What training did not touch (frozen layers, the base under LoRA, embeddings of tokens that were not met) is a
    reference; see :func:`lightning_ft.functional.encode_delta` for the other forms. Optimiser states and all else are
    kept as they are. The checkpoint holds a hash of the base's content, and opens with no other one. Files are written
    whole or not at all, and read without running any code in them.

    Where the base still lies where it was, such a file opens everywhere in lightning_ft (``--ckpt_path``,
    ``load_checkpoint``, ``export``); :func:`lightning_ft.functional.restore_delta` writes a whole one for others. Each
    save reads the base and compares: a second or so for 100M weights. A plugin is bound to its package: for
    ``lightning.pytorch``, not for ``pytorch_lightning``. Sharded folders (``save_distributed_checkpoint``) do not pass
    through it.

    Args:
        base: The pretrained folder (with ``model.safetensors``) or a ``.safetensors`` file;
            :func:`lightning_ft.functional.save_base` writes one of a module that came from elsewhere.

    Attributes:
        report: Sizes of the last save.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: On load: the checkpoint was saved with another base.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(plugins=[DeltaCheckpointIO("path/to/pretrained")])  # doctest: +SKIP
    """

    def __init__(self, base: str | os.PathLike[str]) -> None:
        self.base = Base(base)
        self._writer = AtomicCheckpointIO()
        # Not the other's reading, which would take the base that the file names for this one.
        self._reader = TorchCheckpointIO()
        self.report: Report | None = None

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        delta, self.report = to_delta(checkpoint, self.base)
        self._writer.save_checkpoint(delta, path, storage_options)

    @override
    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        loaded = self._reader.load_checkpoint(str(path), "cpu", weights_only=True)  # type: ignore[arg-type]
        whole: dict[str, Any] = from_delta(loaded, self.base, source=str(path))
        return whole

    @override
    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        self._writer.remove_checkpoint(str(path))
