"""A freeze plan at work: flags, gradients and wrappers of a trainer's module change together, on all ranks."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_ft.callbacks._trainer import rewrap_ddp
from lightning_ft.core.freeze_plan import FreezePlan


class Freezing:
    """Applies the stages of a plan. Make it in ``on_train_start``, when the optimisers exist.

    Args:
        owner: Name of the callback, for messages.
        plan: What trains at which stage.
    """

    def __init__(self, owner: str, plan: FreezePlan) -> None:
        self.owner = owner
        self.plan = plan

    def enter(self, trainer: Trainer, stage: int) -> None:
        """Make the module what ``stage`` asks for. Call on all ranks at the same step, between accumulation windows.

        Args:
            trainer: The trainer.
            stage: Number of the phase, from 0.
        """
        parameters = list(trainer.lightning_module.parameters())
        before = [p.requires_grad for p in parameters]
        self.plan.apply(stage)
        if before == [p.requires_grad for p in parameters]:
            return
        rewrap_ddp(trainer)
        phase = self.plan.phases[stage]
        rank_zero_info(
            f"{self.owner}: step {trainer.global_step}, phase {stage + 1} of {len(self.plan.phases)}: "
            f"{', '.join(phase)} train ({self.plan.trainable_parameters(stage):,} parameters)"
        )

    def release(self) -> None:
        """Make trainable again what was when the plan was made."""
        self.plan.restore()
