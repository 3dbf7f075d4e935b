"""What callbacks ask of a trainer, from ``lightning.pytorch`` or ``pytorch_lightning`` alike."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

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


def run_seed(seed: int | None) -> int:
    """A callback's own seed, else that of ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def refuse_asleep(callback: Callback, asleep: Sequence[str], what: str) -> None:
    """Refuse modules that train and are in eval mode, where the callback would do nothing.

    Args:
        callback: Which acts in train mode only.
        asleep: Paths of such modules.
        what: What they are: ``"layers"``.

    Raises:
        RuntimeError: There are any.
    """
    if asleep:
        raise RuntimeError(
            f"{type(callback).__name__} acts in train mode only, and {len(asleep)} {what} that train are in eval mode "
            f"({', '.join(asleep[:3])}): models come so from from_pretrained(). Call .train() on the model where "
            "you load it"
        )


def refuse_sharded(trainer: Trainer, callback: Callback) -> None:
    """Call in ``on_fit_start``, where weights are computed from others whole.

    Raises:
        ValueError: The strategy shards them.
    """
    if trainer.strategy.restore_checkpoint_after_setup:
        raise ValueError(
            f"{type(callback).__name__} computes whole weights: {type(trainer.strategy).__name__} shards them; use DDP"
        )


def refuse_deepspeed(trainer: Trainer, callback: Callback) -> None:
    """Call in ``on_fit_start``. DeepSpeed steps its own flat copy of what required gradients when it was set up.

    Its optimisers hold none of the module's parameters, so what is thawed, pulled or given a rate of its own later
    would be left alone in silence.

    Raises:
        ValueError: The strategy is DeepSpeed's.
    """
    # By name: neither DeepSpeed nor both Lightnings need be installed.
    if any(kind.__name__ == "DeepSpeedStrategy" for kind in type(trainer.strategy).__mro__):
        raise ValueError(
            f"{type(callback).__name__} does not run under DeepSpeed, which trains a flat copy of the parameters: use "
            "FSDP2, that is Trainer(strategy=ModelParallelStrategy()) and fully_shard in configure_model, or DDP"
        )


def before_sharded_restore(
    trainer: Trainer, callback: Callback, act: Callable[[dict[str, Any]], None]
) -> RemovableHandle | None:
    """Call ``act`` with the callback's saved state just before a sharded strategy restores the optimisers.

    FSDPStrategy and ModelParallelStrategy load weights and optimisers in one go after ``on_fit_start``, and callbacks
    last. An optimiser state of a run in which something had not trained yet is refused there ("Missing optimizer
    state"), and a made-up one put in its place, unless the same parameters are frozen when it is loaded.

    Args:
        trainer: The trainer, in ``on_fit_start``.
        callback: Whose state the checkpoint holds.
        act: Brings the flags to what they were.

    Returns:
        What to remove in ``on_train_start``; None where callbacks are restored first.
    """
    if not trainer.strategy.restore_checkpoint_after_setup:
        return None

    restored: list[Path] = []

    def hook(*_: Any) -> None:
        if trainer.ckpt_path is None or restored:
            return
        restored.append(path := Path(trainer.ckpt_path))
        file = path / "meta.pt" if path.is_dir() else path
        states = torch.load(file, map_location="cpu", mmap=True, weights_only=True).get("callbacks", {})
        if callback.state_key in states:
            act(states[callback.state_key])

    # Weights are loaded before optimisers, the only event in between; ModelParallelStrategy loads each owner alone.
    owner = next(m for m in trainer.lightning_module.modules() if any(True for _ in m.parameters(recurse=False)))
    handle: RemovableHandle = owner.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    return handle


class WindowTracker:
    """Tells whether a batch begins a new accumulation window, in automatic and in manual optimisation."""

    def __init__(self) -> None:
        self._step: int | None = None

    def begins(self, trainer: Trainer, batch_idx: int) -> bool:
        """Call once at each ``on_train_batch_start``: True after an optimiser step, and at an epoch's start."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        return stepped or batch_idx == 0
