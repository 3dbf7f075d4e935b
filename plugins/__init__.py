"""Trainer plugins."""

from lightning_ft.plugins.atomic_checkpoint_io import AtomicCheckpointIO
from lightning_ft.plugins.delta_checkpoint_io import DeltaCheckpointIO

__all__ = ["AtomicCheckpointIO", "DeltaCheckpointIO"]
