"""What callbacks ask of a trainer, from ``lightning.pytorch`` or ``pytorch_lightning`` alike."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_ft.core.schedule import Progress


def training_progress(trainer: Trainer, batch_idx: int) -> Progress:
    """Where training stands before the batch ``batch_idx`` of the running epoch."""
    epoch = float(trainer.current_epoch)
    if math.isfinite(trainer.num_training_batches):
        epoch += batch_idx / trainer.num_training_batches
    fractions = []
    if trainer.max_steps is not None and trainer.max_steps > 0:
        fractions.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        fractions.append(epoch / trainer.max_epochs)
    return Progress(trainer.global_step, epoch, min(1.0, max(fractions)) if fractions else None)


def training_length(trainer: Trainer) -> tuple[float, float]:
    """Optimiser steps an epoch, and in all; nan where they cannot be told (manual optimisation, an endless loader)."""
    batches = trainer.num_training_batches
    if not (math.isfinite(batches) and trainer.lightning_module.automatic_optimization):
        return math.nan, math.nan
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
    limit = trainer.max_steps if trainer.max_steps is not None and trainer.max_steps > 0 else math.inf
    return per_epoch, min(per_epoch * epochs, limit)


def rewrap_ddp(trainer: Trainer) -> None:
    """Wrap the model anew after ``requires_grad`` flags changed. Call on all ranks at the same step.

    The reducer of DistributedDataParallel knows only the parameters that required gradients when it wrapped: one
    thawed later is never averaged and the ranks drift apart in silence; one frozen later makes it wait for ever.
    """
    strategy = trainer.strategy
    wrapped = strategy.model
    if not isinstance(wrapped, DistributedDataParallel):
        return
    if wrapped.static_graph:
        raise ValueError(
            "DDPStrategy(static_graph=True) promises a set of trainable parameters that never changes, and this "
            "callback changes it: remove static_graph=True"
        )
    strategy.model = strategy.lightning_module
    # The ranks are equal already: sending all weights again would cost a hundred times the wrapping itself.
    options = getattr(strategy, "_ddp_kwargs", {})
    init_sync = options.get("init_sync")
    options["init_sync"] = False
    try:
        strategy.configure_ddp()  # type: ignore[attr-defined]
    finally:
        if init_sync is None:
            del options["init_sync"]
        else:
            options["init_sync"] = init_sync


class WindowTracker:
    """Tells whether a batch begins a new accumulation window, in automatic and in manual optimisation."""

    def __init__(self) -> None:
        self._step: int | None = None

    def begins(self, trainer: Trainer, batch_idx: int) -> bool:
        """Call once at each ``on_train_batch_start``: True after an optimiser step, and at an epoch's start."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        return stepped or batch_idx == 0
