"""Gradual unfreezing (ULMFiT): the head first, then one group of layers after the other from the top."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._freezing import Freezing
from lightning_ft.callbacks._trainer import WindowTracker, before_sharded_restore, refuse_deepspeed, training_progress
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers
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
        layers: Where the blocks and the head are, if they are not found by themselves.

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
        layers: Layers | None = None,
    ) -> None:
        self.every = Duration.parse(every, "every")
        unfreezing_phases(["head"], start=start, groups_per_step=groups_per_step)  # refuses bad numbers now
        self.groups_per_step = groups_per_step
        self.start = start
        self.layers = layers or Layers()
        self._freezing: Freezing | None = None
        self._handle: RemovableHandle | None = None
        self._window = WindowTracker()
        self._stage = 0
        self._phases: list[list[str]] | None = None

    def groups(self, module: LightningModule) -> LayerGroups:
        """The layer groups of this module, as this callback sees them."""
        return self.layers.of(module)

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
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)

        def freeze(state: dict[str, Any]) -> None:
            self._freezing = Freezing(type(self).__name__, self.plan(pl_module))
            self._freezing.plan.apply(min(state["stage"], self._freezing.plan.last_stage))

        self._handle = before_sharded_restore(trainer, self, freeze)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        self.every.count(training_progress(trainer, 0))  # refuses a fraction of an endless training
        self._window = WindowTracker()
        plan = self.plan(pl_module)
        phases = [list(phase) for phase in plan.phases]
        if self._phases not in (None, phases):
            raise ValueError(
                f"the checkpoint was written with the phases {self._phases}, but this model and these arguments give "
                f"{phases}: resume with the model and the GradualUnfreezing arguments of that run"
            )
        self._phases = phases
        self._freezing = Freezing(type(self).__name__, plan)
        self._freezing.enter(trainer, self._stage)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._window.begins(trainer, batch_idx):
            return
        assert self._freezing is not None
        due = min(self.every.count(training_progress(trainer, batch_idx)), self._freezing.plan.last_stage)
        if due > self._stage:
            self._stage = due
            self._freezing.enter(trainer, due)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._freezing is not None:
            self._freezing.release()
            self._freezing = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "phases": self._phases}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage = state_dict["stage"]
        self._phases = state_dict["phases"]
