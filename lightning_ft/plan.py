"""What a configuration will train, when, and at which rate: told before any training."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_ft.callbacks import DiscriminativeLR, Freeze, GradualUnfreezing
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers
from lightning_ft.core.phases import Stage
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Progress
from lightning_ft.core.timeline import Timeline, step_cost
from lightning_ft.functional.plot_timeline import plot_timeline
from lightning_ft.modules import TransformerModule


def plan(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    plot: str | os.PathLike[str] | None = None,
) -> list[Report]:
    """Tables of the phases of training and of the model's layer groups, and a picture.

    Args:
        trainer: The trainer with the callbacks that will run.
        model: The module that will train.
        datamodule: Its data, for the number of steps; without it phases are given in the callback's own units.
        plot: Where to draw groups against time: a file ``.png``, ``.svg`` or ``.pdf``.

    Returns:
        Two reports: phases (when each begins, what trains in it, at which rates, and its predicted arithmetic for a
        step, as a share of training everything), and groups (size and rate). Rates are those at the end of the
        warm-up, as multiples of the optimiser's own for a module that is not ours.

    Raises:
        ValueError: There is to be a picture, and the number of steps is unknown or infinite.
    """
    found = _Found(model)
    unfreezing = next((c for c in trainer.callbacks if isinstance(c, GradualUnfreezing)), None)  # type: ignore[attr-defined]
    discriminative = next((c for c in trainer.callbacks if isinstance(c, DiscriminativeLR)), None)  # type: ignore[attr-defined]
    freeze = next((c for c in trainer.callbacks if isinstance(c, Freeze)), None)  # type: ignore[attr-defined]
    chosen = unfreezing or freeze or discriminative
    groups = found.groups(chosen.layers if chosen else Layers())
    factors = dict.fromkeys(groups, 1.0)
    if discriminative:
        factors = discriminative.multipliers(model, found.groups(discriminative.layers))
    base = model.learning_rate if isinstance(model, TransformerModule) else 1.0
    rates = {name: base * factors[name] for name in groups}
    per_epoch, total = _steps(trainer, model, datamodule)
    facts = {"optimiser steps": _number(total), "optimiser steps per epoch": _number(per_epoch)}

    live = [name for name in groups if any(p.requires_grad for p in groups.parameters(name))]
    if unfreezing:
        stages, freeze_plan = unfreezing.stages(model, groups), unfreezing.plan(model, groups)
    else:
        freeze_plan = freeze.plan(model, groups) if freeze else FreezePlan(groups, [live])
        trained = {id(p) for _, p in freeze_plan.training(0)}
        # Also groups of which Freeze(parameters=...) lets a part train.
        stages = [Stage(tuple(name for name in groups if any(id(p) in trained for p in groups.parameters(name))))]
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
                "step cost %": round(100 * step_cost(groups, stage.groups), 1),
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
    if plot is not None:
        timeline, begins = _timeline(model, list(groups), stages, rates, per_epoch, total)
        costs = {begin: step_cost(groups, stage.groups) for begin, stage in zip(begins, stages, strict=False)}
        guessed = len(stages) > 1 and stages[1].begins is None
        title = f"{type(model).__name__}: what will train when"
        title += f" (phases really end by {unfreezing.every})" if guessed and unfreezing else ""
        plot_timeline(timeline, plot, title=title, costs=costs, relative=not isinstance(model, TransformerModule))
        facts["picture"] = os.fspath(plot)
    return [Report("Phases", facts, rows), Report("Layer groups, bottom to top", {}, table)]


def _timeline(
    model: LightningModule,
    groups: list[str],
    stages: list[Stage],
    rates: dict[str, float],
    per_epoch: float,
    total: float,
) -> tuple[Timeline, list[int]]:
    """The rates at some two hundred steps, and the steps at which the phases begin that begin at all."""
    if not math.isfinite(total):
        raise ValueError(
            "plot= needs the number of optimiser steps: give data, and Trainer(max_epochs=...) or "
            "Trainer(max_steps=...)"
        )
    steps = math.ceil(total)
    begins = [_first_step(stage, i, len(stages), per_epoch, total) for i, stage in enumerate(stages)]
    begins = [begin for begin in begins if begin < steps]
    schedule = _schedule(model, steps)
    timeline = Timeline(groups, end=steps)
    for step in sorted({*range(0, steps, max(1, steps // 200)), *begins}):
        number = bisect_right(begins, step) - 1
        since = step - begins[number]
        passed = Progress(since, since / per_epoch, since / total)
        factor = schedule(step) * stages[number].factor(passed)
        timeline.note(step, {name: factor * rates[name] for name in stages[number].groups})
    timeline.end = steps
    return timeline, begins


def _first_step(stage: Stage, number: int, count: int, per_epoch: float, total: float) -> int:
    if number and stage.begins is None:  # a metric says when: as if all were of one length
        return _first(number * total / count)
    return 0 if stage.begins is None else _first(stage.begins.steps(steps_per_epoch=per_epoch, total_steps=total))


def _first(step: float) -> int:
    """The first whole step from a time on: 0.3 · 440 is 132.00000000000003, and is step 132."""
    return math.ceil(step - 1e-9 * max(step, 1))


def _schedule(model: LightningModule, total: int) -> Callable[[int], float]:
    """The factor of a module's own schedule; of a stranger's nothing is known."""
    if not isinstance(model, TransformerModule):
        return lambda step: 1.0
    return model.rate_factor(total)


class _Found:
    """The layer groups of a model, found once for all callbacks that say the same of them: it takes a traced run."""

    def __init__(self, model: LightningModule) -> None:
        self._model = model
        self._known: list[tuple[Layers, LayerGroups]] = []

    def groups(self, layers: Layers) -> LayerGroups:
        known = next((groups for said, groups in self._known if said == layers), None)
        if known is None:
            known = layers.of(self._model)
            self._known.append((layers, known))
        return known


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
    return "never" if step >= total else f"step {_first(step):,}"


def _number(value: float) -> int | str:
    if math.isnan(value):
        return "unknown"
    return "endless" if math.isinf(value) else math.ceil(value)


def _span(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"
