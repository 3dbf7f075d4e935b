"""How many of the lowest blocks stay frozen for a while, as far as other callbacks have it in their plans."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from lightning_ft.callbacks._trainer import training_progress
from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.phases import Stage, due_stage
from lightning_ft.core.schedule import Progress
from lightning_ft.functional.prefix_layout import blocks_of

Plan = Sequence[Stage]


def thawing_plans(trainer: Trainer, module: LightningModule) -> list[Plan]:
    """The plans of the callbacks that unfreeze by time. Call before they freeze, in ``on_fit_start``."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, GradualUnfreezing)]  # type: ignore[attr-defined]
    plans = [callback.stages(module) for callback in callbacks]
    return [stages for stages in plans if any(stage.begins is not None for stage in stages)]


def depth_that_lasts(
    trainer: Trainer, batch_idx: int, groups: LayerGroups, plans: Sequence[Plan], depth: int, epochs: float
) -> int:
    """How many of the lowest ``depth`` frozen blocks the plans leave frozen for so many epochs, or to the end."""
    now = training_progress(trainer, batch_idx)
    ahead = _ahead(trainer, now, epochs)
    blocks = blocks_of(groups)
    for stages in plans:
        coming = stages[due_stage(stages, now) : due_stage(stages, ahead) + 1]
        training = {name for stage in coming for name in stage.groups}
        lowest = next((i for i, name in enumerate(blocks) if name in training), len(blocks))
        depth = 0 if "embeddings" in training else min(depth, lowest)
    return depth


def _ahead(trainer: Trainer, now: Progress, epochs: float) -> Progress:
    """The last moment of the stretch."""
    last_epoch, last_step = trainer.max_epochs or -1, trainer.max_steps or -1
    if last_epoch > 0:
        epochs = min(epochs, last_epoch - now.epoch)
    # The thaw at the very end of the stretch is not part of it.
    epoch = now.epoch + max(0.0, epochs - 1e-6)
    batches = trainer.num_training_batches if math.isfinite(trainer.num_training_batches) else 0
    step = now.step + max(0.0, epochs * batches / trainer.accumulate_grad_batches - 1e-6)
    parts = [done / last for done, last in ((epoch, last_epoch), (step, last_step)) if last > 0]
    return Progress(int(step), epoch, min(1.0, max(parts)) if parts else None)
