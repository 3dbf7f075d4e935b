"""Stop a run early, judged on an evaluation made then, so that it can go on later as if it had never stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._trainer import refuse_deepspeed, training_length
from lightning_ft.callbacks.exact_resume import ExactResume
from lightning_ft.core.schedule import Duration
from lightning_ft.core.undisturbed import same_randomness
from lightning_ft.functional.seed_pruning import rung_step

Decide = Callable[[float, float, int], bool]
"""Whether to go on, from the score, the loss and the number of optimiser steps that were made."""


class SeedPruning(Callback):
    """Judge a run after ⌈f·T⌉ optimiser steps, and stop it there unless ``decide`` lets it go on.

    T is the length of the whole training, which the learning-rate schedule spans in either case: give the Trainer the
    same ``max_steps`` or ``max_epochs`` as for a full run. Of many runs with different seeds, finish the best:
    ``trainer.fit(..., ckpt_path=exact_resume.path(trainer))`` with ``decide=lambda *_: True`` goes on where the run
    stopped and ends bit for bit as one that was never stopped, with this callback or without.

    In the first ``on_train_batch_start`` after the step, :class:`ExactResume` saves, and only then the run is
    validated, unless a validation has just been made. It is made as Lightning's sanity check is (all batches of it):
    EarlyStopping, ModelCheckpoint, plateaus and loggers take no notice, and random numbers, progress and metrics are
    put back. Then ``fit`` ends, without ``on_train_end``. A run that ends is judged on its last step, too. Steps that
    an fp16 scaler skipped do not count. Under DDP rank 0 decides for all.

    Attributes:
        evaluations: Step, score and loss of each validation, in order of steps.
        stopped_at: The step after which the run was stopped; None if it was not.
        horizon: T; nan where it is not known.

    Args:
        at: Where the run is judged: f, ``"500 steps"`` or ``"1 epoch"``; or several of them.
        monitor: The logged value that is the score.
        loss: The logged value that settles ties.
        decide: Whether to go on, from score, loss and step; without it the run stops at the first of ``at``, and
            needs an :class:`ExactResume` beside it.

    Raises:
        ValueError: There is no validation, or nothing saves the stopped run; ``at`` asks for a part of a training
            whose length is not known, or lies beyond its end; a value is not logged; the strategy runs in spawned
            processes or is DeepSpeed's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> pruning = SeedPruning(0.25, decide=lambda score, loss, step: score > 0.6)
        >>> trainer = Trainer(callbacks=[ExactResume(), pruning], max_epochs=3, logger=False)

    Reference:
        Dodge et al. 2020, "Fine-Tuning Pretrained Language Models: Weight Initializations, Data Orders, and Early
        Stopping".
    """

    def __init__(
        self,
        at: float | str | Sequence[float | str] = 0.25,
        *,
        monitor: str = "val_accuracy",
        loss: str = "val_loss",
        decide: Decide | None = None,
    ) -> None:
        self.at = [Duration.parse(one, "at") for one in ([at] if isinstance(at, float | str | int) else at)]
        self.monitor = monitor
        self.loss = loss
        self.decide = decide
        self.evaluations: list[tuple[int, float, float]] = []
        self.stopped_at: int | None = None
        self.horizon = math.nan
        self._steps: list[int] = []
        self._judged = 0
        self._updates: int | None = None
        self._handles: list[RemovableHandle] = []

    # ---- when

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        self._release()
        self.stopped_at = None
        if any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(trainer.strategy.launcher).__mro__):
            raise ValueError(
                "SeedPruning cannot end a fit in spawned processes: use Trainer(strategy='ddp') in place of "
                "'ddp_spawn', 'ddp_fork' or 'ddp_notebook'"
            )
        if self.decide is None and _exact_resume(trainer) is None:
            raise ValueError(
                "SeedPruning stops a run that is to go on later, and nothing saves it: add ExactResume() before it, or "
                "say with decide=... which runs go on at once"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            raise ValueError(
                f"SeedPruning judges by {self.monitor!r} of a validation, and this fit has none: give validation data "
                "and a validation_step"
            )
        per_epoch, self.horizon = training_length(trainer)
        if math.isnan(self.horizon) and trainer.max_steps > 0:
            self.horizon = trainer.max_steps
        # A checkpoint of the step itself was saved before the run was judged there.
        self._steps = sorted(step for one in self.at if (step := self._step(one, per_epoch)) > self._judged)
        if self._updates is None:
            self._updates = trainer.global_step
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._count))

    def _step(self, at: Duration, per_epoch: float) -> int:
        if at.unit == "fraction":
            step = at.amount * self.horizon
            if math.isfinite(step):
                step = rung_step(int(self.horizon), at.amount)
        else:
            step = at.steps(steps_per_epoch=per_epoch, total_steps=self.horizon)
        if not math.isfinite(step):
            raise ValueError(
                f"at={str(at)!r} is a part of a training whose number of optimiser steps is not known (manual "
                'optimisation, or no end): set Trainer(max_steps=...), or give at="500 steps"'
            )
        if step > self.horizon:
            raise ValueError(f"at={str(at)!r} lies beyond the end of training after {self.horizon:.0f} optimiser steps")
        return max(1, round(step))

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        assert self._updates is not None
        self._updates += 1

    def _due(self) -> bool:
        """Whether a step at which the run is judged has come."""
        assert self._updates is not None
        return bool(self._steps) and self._updates >= self._steps[0]

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._due() and (saving := _exact_resume(trainer)) is not None:
            saving.save_next()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._updates is not None
        if not self._due():
            return
        self._steps = [step for step in self._steps if step > self._updates]
        self._judged = self._updates
        step, score, loss = self._judge(trainer)
        goes_on = False
        if self.decide is not None and trainer.is_global_zero:
            goes_on = bool(self.decide(score, loss, step))
        # Ranks that decide each for itself would part, and wait for one another for ever.
        if not trainer.strategy.broadcast(goes_on):
            self.stopped_at = step
            raise _end_of_fit(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge(trainer)

    # ---- evaluations

    def _judge(self, trainer: Trainer) -> tuple[int, float, float]:
        if not self.evaluations or self.evaluations[-1][0] != self._updates:
            with _as_sanity_check(trainer), same_randomness():
                trainer.fit_loop.epoch_loop.val_loop.run()
                self._note(trainer)
        return self.evaluations[-1]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        # Each rank may have its own.
        logged = trainer.strategy.broadcast(logged)
        for argument, name in {"monitor": self.monitor, "loss": self.loss}.items():
            if name not in logged:
                raise ValueError(
                    f"SeedPruning: {argument}={name!r} was not logged in validation; logged were: "
                    f"{', '.join(sorted(logged)) or 'none'}. Name one of these"
                )
        assert self._updates is not None
        if self.evaluations and self.evaluations[-1][0] == self._updates:
            self.evaluations.pop()  # a validation inside an accumulation window, of the same weights
        self.evaluations.append((self._updates, logged[self.monitor], logged[self.loss]))

    # ---- state

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self._updates,
            "judged": self._judged,
            "evaluations": [list(one) for one in self.evaluations],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._judged = state_dict["updates"], state_dict["judged"]
        self.evaluations = [tuple(one) for one in state_dict["evaluations"]]


def _exact_resume(trainer: Trainer) -> ExactResume | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, ExactResume)), None)  # type: ignore[attr-defined]


def _end_of_fit(trainer: Trainer) -> BaseException:
    """What ends ``fit`` at once and in peace.

    ``should_stop`` would first train on this batch, then end the epoch, step its schedulers, and save over the exact
    checkpoint. Lightning's own LearningRateFinder and BatchSizeFinder end a fit so.
    """
    package = type(trainer.fit_loop).__module__.partition(".loops")[0]  # lightning.pytorch or pytorch_lightning
    ending: BaseException = import_module(f"{package}.utilities.exceptions")._TunerExitException()
    return ending


@contextmanager
def _as_sanity_check(trainer: Trainer) -> Iterator[None]:
    """A validation inside leaves no trace in the progress, the metrics and the callbacks of the fit."""
    module, loop, connector = trainer.lightning_module, trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    names = ("_first_loop_iter", "_current_fx", "_callback_metrics", "_progress_bar_metrics", "_logged_metrics")
    metrics = {name: getattr(connector, name) for name in names}
    progress, has_run, stage = copy.deepcopy(loop.batch_progress), loop._has_run, trainer.state.stage
    steps = trainer.num_sanity_val_steps
    trainer.num_sanity_val_steps, trainer.sanity_checking = math.inf, True
    connector.reset_results()
    connector.reset_metrics()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.on_sanity_check_start(trainer, module)
    try:
        yield
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_sanity_check_end(trainer, module)
    finally:
        connector.reset_results()
        loop.batch_progress, loop._has_run, trainer.num_sanity_val_steps = progress, has_run, steps
        for name, value in metrics.items():
            setattr(connector, name, value)
        trainer.state.stage = stage
