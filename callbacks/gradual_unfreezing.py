"""Gradual unfreezing (ULMFiT): the head first, then one group of layers after the other from the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.callbacks._trainer import WindowTracker, rewrap_ddp, training_progress
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.gradual_unfreezing import unfreezing_phases


class GradualUnfreezing(Callback):
    """Train the head first, then release the groups of layers below it one after the other, top down.

    The phases are those of :func:`lightning_ft.functional.unfreezing_phases`. Freezing starts in ``on_train_start``,
    when the optimisers exist, so that also an optimiser built from the trainable parameters alone holds them all;
    transitions happen in ``on_train_batch_start``, never inside an accumulation window, and wrap a DDP model anew.
    A resumed run continues in the stage of its checkpoint. After the fit, everything is trainable again that was
    trainable before it; what was frozen before it is never touched.

    Frozen layers keep their mode: in train mode their dropout stays on, as in ULMFiT.

    Args:
        every: Time between two transitions: a fraction of training (``0.1``), ``"500 steps"`` (optimiser steps) or
            ``"1 epoch"``, ULMFiT's value. With 12 blocks or more use a fraction, or the schedule outlasts the run.
        groups_per_step: Units released at each transition; a unit is a block, the embeddings, or head and tail.
        start: Units that train from the beginning.
        blocks: Path of the list of blocks, where it is not found by itself (see
            :class:`~lightning_ft.core.LayerGroups`).
        head: Paths of the head's modules, likewise.
        groups: Regular expressions by group name, bottom to top, for a model without a list of blocks.

    Raises:
        ValueError: An argument is out of range; on resume, the checkpoint's phases are not this model's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradualUnfreezing(every="1 epoch")], max_epochs=14, logger=False)

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification".
    """

    def __init__(
        self,
        every: float | str = "1 epoch",
        *,
        groups_per_step: int = 1,
        start: int = 1,
        blocks: str | Sequence[str] | None = None,
        head: str | Sequence[str] | None = None,
        groups: Mapping[str, str] | None = None,
    ) -> None:
        self.every = Duration.parse(every, "every")
        unfreezing_phases(["head"], start=start, groups_per_step=groups_per_step)  # refuses bad numbers now
        self.groups_per_step = groups_per_step
        self.start = start
        self._blocks, self._head, self._groups = blocks, head, groups
        self._plan: FreezePlan | None = None
        self._window = WindowTracker()
        self._stage = 0
        self._phases: list[list[str]] | None = None

    def groups(self, module: LightningModule) -> LayerGroups:
        """The layer groups of this module, as this callback sees them."""
        return LayerGroups.of(module, blocks=self._blocks, head=self._head, groups=self._groups)

    def plan(self, module: LightningModule) -> FreezePlan:
        """The phases for this module; nothing is frozen yet."""
        groups = self.groups(module)
        # A group that its owner froze (a peft base) must not take up a phase in which nothing new trains.
        live = [name for name in groups if any(p.requires_grad for p in groups.parameters(name))]
        phases = unfreezing_phases(live, start=self.start, groups_per_step=self.groups_per_step)
        return FreezePlan(groups, phases)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stage, self._phases = 0, None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.every.count(training_progress(trainer, 0))  # refuses a fraction of an endless training
        self._window = WindowTracker()
        self._plan = self.plan(pl_module)
        phases = [list(phase) for phase in self._plan.phases]
        if self._phases not in (None, phases):
            raise ValueError(
                f"the checkpoint was written with the phases {self._phases}, but this model and these arguments give "
                f"{phases}: resume with the model and the GradualUnfreezing arguments of that run"
            )
        self._phases = phases
        self._apply(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._window.begins(trainer, batch_idx):
            return
        assert self._plan is not None
        due = min(self.every.count(training_progress(trainer, batch_idx)), self._plan.last_stage)
        if due > self._stage:
            self._stage = due
            self._apply(trainer)

    def _apply(self, trainer: Trainer) -> None:
        assert self._plan is not None
        before = [p.requires_grad for p in trainer.lightning_module.parameters()]
        self._plan.apply(self._stage)
        if before == [p.requires_grad for p in trainer.lightning_module.parameters()]:
            return
        rewrap_ddp(trainer)
        phase = self._plan.phases[self._stage]
        rank_zero_info(
            f"GradualUnfreezing: step {trainer.global_step}, phase {self._stage + 1} of {len(self._plan.phases)}: "
            f"{', '.join(phase)} train ({self._plan.trainable_parameters(self._stage):,} parameters)"
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._plan is not None:
            self._plan.restore()
            self._plan = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "phases": self._phases}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage = state_dict["stage"]
        self._phases = state_dict["phases"]
