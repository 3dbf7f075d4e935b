"""A freeze plan at work: flags, gradients and wrappers of a trainer's module change together, on all ranks."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ft.callbacks._audit import FirstStep, check_optimizers, check_ranks
from lightning_ft.callbacks._trainer import rewrap_ddp
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.norms import tied_embeddings


class Freezing:
    """Applies the stages of a plan. Make it in ``on_train_start``, when the optimisers exist.

    Each stage is audited: what trains must be in an optimiser; after the first optimiser step it must have got a
    gradient, and what is frozen none; under DDP the ranks must hold the same bits when a stage begins, and when
    :meth:`finish` is called. Between these moments it costs a comparison a step.

    Args:
        owner: Name of the callback, for messages.
        plan: What trains at which stage.
        shared: Whether other callbacks may freeze more than the plan does.
    """

    def __init__(self, owner: str, plan: FreezePlan, *, shared: bool = False) -> None:
        self.owner = owner
        self.plan = plan
        self.shared = shared
        self._stage: int | None = None
        self._audit: FirstStep | None = None
        self._told: set[str] = set()

    def enter(self, trainer: Trainer, stage: int) -> None:
        """Make the module what ``stage`` asks for. Call on all ranks at the same step, between accumulation windows.

        Args:
            trainer: The trainer.
            stage: Number of the phase, from 0.

        Raises:
            ValueError: A parameter that is to train is in no optimiser.
            RuntimeError: Ranks differ.
        """
        if self._stage is None:
            check_optimizers(self.owner, self.plan, trainer)
            self._warn_of_tied_embeddings(trainer, stage)
        self._check_ranks(trainer, stage)
        parameters = list(trainer.lightning_module.parameters())
        before = [p.requires_grad for p in parameters]
        self.plan.apply(stage)
        changed = before != [p.requires_grad for p in parameters]
        if changed:
            rewrap_ddp(trainer)
        if changed or stage != self._stage:
            self._stop_audit()
            self._audit = FirstStep(self.owner, self.plan, stage, trainer.optimizers, self._told, shared=self.shared)
            self._log(trainer, stage)
        self._stage = stage

    def finish(self, trainer: Trainer) -> None:
        """Compare the ranks a last time. Call in ``on_train_end``, on all ranks.

        Raises:
            RuntimeError: Ranks differ.
        """
        if self._stage is not None:
            self._check_ranks(trainer, self._stage)

    def release(self) -> None:
        """Make trainable again what was when the plan was made."""
        self._stop_audit()
        self.plan.restore()

    def _check_ranks(self, trainer: Trainer, stage: int) -> None:
        old = self.plan.training(stage if self._stage is None else self._stage)
        parameters = {id(p): p for _, p in [*old, *self.plan.training(stage)]}
        check_ranks(self.owner, trainer, list(parameters.values()))

    def _stop_audit(self) -> None:
        if self._audit is not None:
            self._audit.remove()
            self._audit = None

    def _log(self, trainer: Trainer, stage: int) -> None:
        rank_zero_info(
            f"{self.owner}: step {trainer.global_step}, phase {stage + 1} of {len(self.plan.phases)}: "
            f"{', '.join(self.plan.phases[stage])} train ({self.plan.trainable_parameters(stage):,} parameters)"
        )

    def _warn_of_tied_embeddings(self, trainer: Trainer, stage: int) -> None:
        frozen = {id(p) for _, p in self.plan.frozen(stage)}
        tied = [name for name, p in tied_embeddings(trainer.lightning_module).items() if id(p) in frozen]
        if tied:
            rank_zero_warn(
                f"{self.owner}: the embedding and the output layer are one tensor ({', '.join(tied)}), so the output "
                "layer is frozen as long as the embedding is: untie them if it is to train "
                "(config.tie_word_embeddings=False), or let the embeddings train from the start"
            )
