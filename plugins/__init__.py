"""Trainer plugins."""

from lightning_ft.plugins.atomic_checkpoint_io import AtomicCheckpointIO
from lightning_ft.plugins.delta_checkpoint_io import DeltaCheckpointIO
from lightning_ft.plugins.eight_bit import EightBit
from lightning_ft.plugins.four_bit import FourBit
from lightning_ft.plugins.fp16 import FP16

__all__ = ["FP16", "FourBit", "EightBit", "AtomicCheckpointIO", "DeltaCheckpointIO"]
