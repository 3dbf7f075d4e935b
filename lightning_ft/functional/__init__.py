"""Methods as plain functions on names, tensors and parameters."""

from lightning_ft.functional.gradual_unfreezing import unfreezing_phases
from lightning_ft.functional.learning_rates import decay_groups, depth_multipliers, warmup_then

__all__ = ["decay_groups", "depth_multipliers", "unfreezing_phases", "warmup_then"]
