"""Gradual unfreezing (ULMFiT): the head first, then one group of layers after the other from the top."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._freezing import Freezing
from lightning_ft.callbacks._rate_factor import RateFactor
from lightning_ft.callbacks._stage_metric import StageMetric
from lightning_ft.callbacks._trainer import (
    WindowTracker,
    before_sharded_restore,
    refuse_deepspeed,
    training_length,
    training_progress,
)
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers
from lightning_ft.core.norms import norm_parameters
from lightning_ft.core.phases import Phase, Stage, check_order, check_phases, due_stage, one_after_the_other
from lightning_ft.core.plateau import Plateau
from lightning_ft.core.schedule import Duration, Progress
from lightning_ft.functional.gradual_unfreezing import explicit_stages, unfreezing_phases


class GradualUnfreezing(Callback):
    """Train the head first, then release the groups of layers below it one after the other, top down.

    *What* trains: the phases of :func:`lightning_ft.functional.unfreezing_phases` (``start``, ``groups_per_step``,
    ``until``), or ``phases``. *When* the next one begins: ``every`` so much time, when a metric stops improving
    (``every=Plateau(...)``), or at the times that the phases name.

    Freezing starts in ``on_train_start``, when the optimisers exist, so that also an optimiser built from the trainable
    parameters alone holds them all; transitions happen in ``on_train_batch_start``, never inside an accumulation
    window, and wrap a DDP model anew; a metric is read in ``on_validation_end``, rank 0's for all, and acts at the next
    window. A resumed run continues in the stage of its checkpoint. After the fit, everything is trainable again that
    was trainable before it; what was frozen before it is never touched. A phase's factor on the learning rates works
    while ``step()`` runs, on any optimiser and under any scheduler, and multiplies with those of DiscriminativeLR.

    Each phase is audited: what trains must be in an optimiser and get gradients, what is frozen must get none, and
    under DDP the ranks must agree to the bit.

    Frozen layers keep their mode: in train mode their dropout stays on, as in ULMFiT. An embedding that is also the
    output layer (a tied language model) freezes both; a warning says so. Gradient checkpointing above frozen layers
    needs ``use_reentrant=False``, or nothing there learns. ``torch.compile`` compiles anew in each phase: with more
    than ``torch._dynamo.config.recompile_limit`` of them raise that limit. Weight averages (EMA) that are validated in
    place of the weights are what the metric sees; ``reload_best`` keeps the weights themselves.

    Deviations: chain-thaw makes a new Adam for each phase; here the state of the module's own optimisers is emptied,
    and schedulers run on. What ``reload_best`` puts back is weights, not optimiser state; in the last phase nothing,
    since its best is ModelCheckpoint's.

    Args:
        every: Time between two transitions: a fraction of training (``0.1``), ``"500 steps"`` (optimiser steps) or
            ``"1 epoch"``, ULMFiT's value; or a :class:`~lightning_ft.core.Plateau`. With 12 blocks or more use a
            fraction, or the schedule outlasts the run.
        groups_per_step: Units released at each transition; a unit is a block, the embeddings, or head and tail.
        start: Units that train from the beginning.
        until: The lowest group that is ever released: ``"block.0"`` leaves the embeddings frozen.
        phases: What trains in each phase, in place of the three above; without times they follow ``every``.
        previous: ``"keep"``: what earlier phases trained goes on training. ``"freeze"``: each phase trains its own
            groups alone, and optimiser states are emptied at each transition; without ``phases`` this is chain-thaw
            (last, first, second, …, everything).
        norms: ``"follow"``: normalisation layers belong to their group. ``"always"``: they train in every phase.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: An argument is out of range or contradicts another; a parameter that is to train is in no
            optimiser; the monitored value was not logged; on resume, the checkpoint's phases are not this model's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_ft.core.phases import Phase
        >>> from lightning_ft.core.plateau import Plateau
        >>> trainer = Trainer(callbacks=[GradualUnfreezing(every="1 epoch")], max_epochs=14, logger=False)
        >>> by_metric = GradualUnfreezing(Plateau("val_loss", patience=2, reload_best=True), until="block.0")
        >>> chosen = GradualUnfreezing(phases=[Phase("head"), Phase("top:2", at="1 epoch", lr=0.5, warmup="50 steps")])

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification"; Felbo et al. 2017, "Using
        millions of emoji occurrences to learn any-domain representations" (chain-thaw).
    """

    def __init__(
        self,
        every: float | str | Plateau = "1 epoch",
        *,
        groups_per_step: int = 1,
        start: int = 1,
        until: str | None = None,
        phases: list[Phase] | None = None,
        previous: Literal["keep", "freeze"] = "keep",
        norms: Literal["follow", "always"] = "follow",
        layers: Layers | None = None,
    ) -> None:
        self.every = every if isinstance(every, Plateau) else Duration.parse(every, "every")
        # These refuse bad numbers now, before any model is there.
        unfreezing_phases(["head"], start=start, groups_per_step=groups_per_step, previous=previous)
        if norms not in ("follow", "always"):
            raise ValueError(f"norms={norms!r} must be 'follow' or 'always'")
        if phases is not None:
            check_phases(phases)
            if (groups_per_step, start, until) != (1, 1, None):
                raise ValueError("phases= says what trains: pass it without groups_per_step=, start= and until=")
            if every != "1 epoch" and any(phase.at is not None for phase in phases):
                raise ValueError("every= and the phases' at= both say when: pass only one of them")
        self.groups_per_step = groups_per_step
        self.start = start
        self.until = until
        self.phases = phases
        self.previous = previous
        self.norms = norms
        self.layers = layers or Layers()
        self._freezing: Freezing | None = None
        self._handle: RemovableHandle | None = None
        self._rates: RateFactor | None = None
        self._stages: list[Stage] = []
        self._reset()

    def groups(self, module: LightningModule) -> LayerGroups:
        """The layer groups of this module, as this callback sees them."""
        return self.layers.of(module)

    def plan(self, module: LightningModule, groups: LayerGroups | None = None) -> FreezePlan:
        """The phases for this module; nothing is frozen yet. ``groups``: if they are found already."""
        groups = groups or self.groups(module)
        return self._plan(module, groups, self.stages(module, groups))

    def stages(self, module: LightningModule, groups: LayerGroups | None = None) -> list[Stage]:
        """What trains in each phase of this module, from when on (None: when the metric says) and at which rate.

        Args:
            module: The module.
            groups: Its layer groups, if they are found already.
        """
        groups = groups or self.groups(module)
        if self.phases is not None:
            stages = explicit_stages(self.phases, groups, previous=self.previous)
        else:
            # A group that its owner froze (a peft base) must not take up a phase in which nothing new trains.
            live = [name for name in groups if any(p.requires_grad for p in groups.parameters(name))]
            names = unfreezing_phases(
                live,
                start=self.start,
                groups_per_step=self.groups_per_step,
                until=self.until,
                previous=self.previous,
            )
            stages = [Stage(chosen) for chosen in names]
        if isinstance(self.every, Plateau) or any(stage.begins for stage in stages):
            return stages
        return one_after_the_other(stages, self.every)

    def _plan(self, module: LightningModule, groups: LayerGroups, stages: list[Stage]) -> FreezePlan:
        always = norm_parameters(module) if self.norms == "always" else ()
        return FreezePlan(groups, [stage.groups for stage in stages], always=always)

    def _reset(self) -> None:
        self._window = WindowTracker()
        self._metric = StageMetric("GradualUnfreezing", self.every) if isinstance(self.every, Plateau) else None
        self._stage = 0
        self._phases: list[list[str]] | None = None
        self._began: Progress | None = None
        self._due = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

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
        groups = self.groups(pl_module)
        self._stages = self.stages(pl_module, groups)
        self._check_times(trainer)
        if self._metric is not None:
            self._metric.check(trainer, pl_module)
        plan = self._plan(pl_module, groups, self._stages)
        phases = [list(phase) for phase in plan.phases]
        if self._phases not in (None, phases):
            raise ValueError(
                f"the checkpoint was written with the phases {self._phases}, but this model and these arguments give "
                f"{phases}: resume with the model and the GradualUnfreezing arguments of that run"
            )
        self._phases = phases
        self._window = WindowTracker()
        self._freezing = Freezing(type(self).__name__, plan)
        self._freezing.enter(trainer, self._stage)
        if any(stage.lr != 1 or stage.warmup for stage in self._stages):
            self._rates = RateFactor(type(self).__name__, trainer.optimizers)

    def _check_times(self, trainer: Trainer) -> None:
        now = training_progress(trainer, 0)
        due_stage(self._stages, now)  # refuses a fraction of an endless training, as the next line does
        _ = [stage.factor(now) for stage in self._stages]
        steps_per_epoch, total_steps = training_length(trainer)
        check_order(self._stages, steps_per_epoch=steps_per_epoch, total_steps=total_steps)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._window.begins(trainer, batch_idx):
            return
        now = training_progress(trainer, batch_idx)
        due = max(self._stage + self._due, due_stage(self._stages, now))
        if due > self._stage:
            self._move_on(trainer, pl_module, due)
            self._began = now
        self._began = self._began or now
        if self._rates is not None:
            self._rates.value = self._stages[self._stage].factor(now.since(self._began))

    def _move_on(self, trainer: Trainer, module: LightningModule, stage: int) -> None:
        assert self._freezing is not None
        self._stage, self._due = stage, False
        if self._metric is not None:
            self._metric.put_back(module)
            self._metric.restart()
        self._freezing.enter(trainer, stage)
        if self.previous == "freeze":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # trainer.validate() comes without on_train_start: there is no stage then.
        if self._metric is None or self._freezing is None or self._due or trainer.sanity_checking:
            return
        if self._stage < self._freezing.plan.last_stage:
            self._due = self._metric.observe(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._freezing is not None:
            self._freezing.finish(trainer)

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
        if self._rates is not None:
            self._rates.remove()
            self._rates = None
        if self._freezing is not None:
            self._freezing.release()
            self._freezing = None

    @override
    def state_dict(self) -> dict[str, Any]:
        began = self._began
        return {
            "stage": self._stage,
            "phases": self._phases,
            "began": None if began is None else [began.step, began.epoch, began.fraction],
            "due": self._due,
            "metric": None if self._metric is None else self._metric.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage = state_dict["stage"]
        self._phases = state_dict["phases"]
        self._began = None if state_dict["began"] is None else Progress(*state_dict["began"])
        self._due = state_dict["due"]
        if self._metric is not None and state_dict["metric"] is not None:
            self._metric.load_state_dict(state_dict["metric"])
