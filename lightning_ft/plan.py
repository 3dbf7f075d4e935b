"""What a configuration will train, when, and at which rate: told before any training."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_ft.callbacks import DiscriminativeLR, GradualUnfreezing
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.phases import Stage
from lightning_ft.core.report import Report
from lightning_ft.modules import TransformerModule


def plan(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None = None) -> list[Report]:
    """Tables of the phases of training and of the model's layer groups.

    Args:
        trainer: The trainer with the callbacks that will run.
        model: The module that will train.
        datamodule: Its data, for the number of steps; without it phases are given in the callback's own units.

    Returns:
        Two reports: phases (when each begins, what trains in it, at which rates), and groups (size and rate).
        Rates are those at the end of the warm-up, as multiples of the optimiser's own for a module that is not ours.
    """
    groups = _groups(trainer, model)
    unfreezing = next((c for c in trainer.callbacks if isinstance(c, GradualUnfreezing)), None)  # type: ignore[attr-defined]
    discriminative = next((c for c in trainer.callbacks if isinstance(c, DiscriminativeLR)), None)  # type: ignore[attr-defined]
    factors = discriminative.multipliers(model) if discriminative else dict.fromkeys(groups, 1.0)
    base = model.learning_rate if isinstance(model, TransformerModule) else 1.0
    rates = {name: base * factors[name] for name in groups}
    per_epoch, total = _steps(trainer, model, datamodule)
    facts = {"optimiser steps": _number(total), "optimiser steps per epoch": _number(per_epoch)}

    live = [name for name in groups if any(p.requires_grad for p in groups.parameters(name))]
    stages = unfreezing.stages(model) if unfreezing else [Stage(tuple(live))]
    freeze_plan = unfreezing.plan(model) if unfreezing else FreezePlan(groups, [live])
    everything = sum(p.numel() for p in model.parameters())
    rows: list[dict[str, Any]] = []
    for number, stage in enumerate(stages):
        trains = freeze_plan.trainable_parameters(number)
        rows.append(
            {
                "phase": number + 1,
                "from": "start" if number == 0 else _begin(unfreezing, stage, per_epoch, total),
                "trains": _span(stage.groups),
                "parameters": trains,
                "share %": round(100 * trains / everything, 1),
                "lowest LR": stage.lr * min(rates[name] for name in stage.groups),
                "highest LR": stage.lr * max(rates[name] for name in stage.groups),
            }
        )
    if rows[-1]["from"] == "never":
        facts["warning"] = "training ends before the last phase: raise max_epochs, or shorten GradualUnfreezing's every"
    table = [
        {
            "group": name,
            "tensors": len(groups.parameters(name)),
            "parameters": sum(p.numel() for p in groups.parameters(name)),
            "LR": rates[name],
        }
        for name in groups
    ]
    return [Report("Phases", facts, rows), Report("Layer groups, bottom to top", {}, table)]


def _groups(trainer: Trainer, model: LightningModule) -> LayerGroups:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradualUnfreezing | DiscriminativeLR):
            return callback.groups(model)
    return LayerGroups.of(model)


def _steps(trainer: Trainer, model: LightningModule, data: LightningDataModule | None) -> tuple[float, float]:
    per_epoch = math.nan
    if data is not None:
        data.trainer = trainer
        data.prepare_data()
        data.setup("fit")
        batches = len(data.train_dataloader())
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else math.inf
    total = per_epoch * epochs
    if trainer.max_steps > 0:
        total = trainer.max_steps if math.isnan(total) else min(total, trainer.max_steps)
    return per_epoch, total


def _begin(unfreezing: GradualUnfreezing | None, stage: Stage, per_epoch: float, total: float) -> str:
    if stage.begins is None:
        return str(unfreezing.every) if unfreezing else "start"
    step = stage.begins.steps(steps_per_epoch=per_epoch, total_steps=total)
    if math.isnan(step):
        return str(stage.begins)
    return "never" if step >= total else f"step {math.ceil(step):,}"


def _number(value: float) -> int | str:
    if math.isnan(value):
        return "unknown"
    return "endless" if math.isinf(value) else math.ceil(value)


def _span(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"
