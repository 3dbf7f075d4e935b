"""Movement pruning: zero most weights of the blocks while they are fine-tuned, by how training moves them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.callbacks._quadratic_pull import pending_scale
from lightning_ft.callbacks._separate_clipping import SeparateClipping
from lightning_ft.callbacks._split_rates import own_rates
from lightning_ft.callbacks._trainer import refuse_deepspeed, training_length, training_progress
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.masked_weights import (
    Masked,
    Mode,
    check_masks,
    check_mode,
    masked_weights,
    refuse_sharded,
    sparsity,
)
from lightning_ft.functional.movement import Scope, add_penalty_grad_, cubic, update_masks


class MovementPruning(Callback):
    """Compute with W′ = W ⊙ Mask(S) and learn the scores S: ∂L/∂S = ∂L/∂W′ ⊙ W, straight through the mask.

    A score grows while its weight moves away from zero. W are the weights of the linear maps in the blocks; embeddings,
    head, biases and norms are left alone (the paper freezes the embeddings: ``Freeze(groups="embeddings")``).

    - ``hard``: kept are the ⌊v·n⌋ highest scores of each matrix (or of all, ``scope="global"``), exactly as many, ties
      going to the larger weight. The share v falls from 1 to ``final``.
    - ``soft``: kept is what has σ(S) > τ, and 0.5 % of a matrix at least. τ rises from 0 to ``final``, and
      λ·mean σ(S) is added to the loss, with λ = ``penalty`` · τ/τ_final: its gradient, in
      ``on_before_optimizer_step``.
    - ``magnitude``: kept are the ⌊v·n⌋ largest weights, with no scores: the baseline, on the same schedule.

    v and τ follow a cubic from the end of ``warmup`` to the beginning of ``cooldown``, in which they stand. (The paper
    counts steps; here it is the share of training that is done.) Masks are chosen anew in the ``on_train_batch_end``
    after an optimiser step, and not after one that an fp16 overflow skipped (which a fused optimiser does not tell);
    they stand through an accumulation window and depend on nothing that differs between ranks.

    The scores train in the module's own optimiser, at ``score_learning_rate`` times whatever share of its base rate the
    optimiser is at, and without weight decay. Their gradients are hundreds of times larger than the weights': the
    trainer's clipping takes them apart. (In manual optimisation, if that calls ``self.clip_gradients``.)

    Checkpoints hold W, S and the masks (which must keep as many weights as were chosen), so that training goes on from
    them. What is exported from them has W′ for plain weights, of which the pruned ones are exactly 0;
    :func:`lightning_ft.functional.masked_weights.bake` does the same to a module in place.

    Args:
        final: v or τ in the end; by default 0.15, for ``soft`` 0.1, as in the paper.
        mode: ``"hard"``, ``"soft"`` or ``"magnitude"``.
        scope: ``"matrix"`` or ``"global"``: among what the highest are looked for. ``soft`` has one threshold anyway.
        warmup: Training before the first weight goes: ``0.1``, ``"500 steps"``, ``"1 epoch"``; 0 for none.
        cooldown: Training after the last one. The paper has 0.1 before and 0.2 after, on SQuAD.
        score_learning_rate: Of S; the paper's 1e-2 beside 3e-5 for weights.
        penalty: λ at the final threshold, for ``soft``.
        layers: Where the blocks are, if they are not found by themselves.

    Attributes:
        report: The table of all matrices, when training has ended.

    Raises:
        ValueError: An argument is out of range; what
            :func:`~lightning_ft.functional.masked_weights.mask_weights` refuses; an optimiser that does not hold the
            scores; training has no end; sharded strategies, DeepSpeed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MovementPruning(0.1)], logger=False)

    Reference:
        Sanh, Wolf and Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning".
    """

    def __init__(
        self,
        final: float | None = None,
        mode: Mode = "hard",
        *,
        scope: Scope = "matrix",
        warmup: float | str = 0.1,
        cooldown: float | str = 0.2,
        score_learning_rate: float = 1e-2,
        penalty: float = 400.0,
        layers: Layers | None = None,
    ) -> None:
        check_mode(mode)
        soft = mode == "soft"
        final = (0.1 if soft else 0.15) if final is None else final
        if not (0 < final < 1 or (final == 1 and not soft)):
            what = "a threshold in (0, 1)" if soft else "the share of weights that is kept, in (0, 1]"
            raise ValueError(f'final={final!r} must be {what}, where mode="{mode}"')
        if scope not in get_args(Scope):
            raise ValueError(f'scope={scope!r} must be "matrix" or "global"')
        for argument, value in {"score_learning_rate": score_learning_rate, "penalty": penalty}.items():
            if not value >= 0:
                raise ValueError(f"{argument}={value!r} must be 0 or more")
        self.final = final
        self.mode: Mode = mode
        self.scope: Scope = scope
        self.warmup = None if warmup == 0 else Duration.parse(warmup, "warmup")
        self.cooldown = None if cooldown == 0 else Duration.parse(cooldown, "cooldown")
        self.score_learning_rate = score_learning_rate
        self.penalty = penalty
        self.report: Report | None = None
        places = plain_layers(layers)
        self._altering = Altering("movement_pruning", {"mode": mode, "layers": places})
        self._masked: list[Masked] = []
        self._scores: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._ends = (0.0, 1.0)
        self._forget()

    def _forget(self) -> None:
        self._level = self.level(0.0)
        self._done = self._position = 0.0
        self._steps = 0
        self._stepped = False

    def level(self, position: float) -> float:
        """v or τ at a share of training, once it has begun and its length is known."""
        first, last = self._ends
        within = (position - first) / (last - first)
        return cubic(0.0 if self.mode == "soft" else 1.0, self.final, within)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._altering.setup(trainer, pl_module)
        if stage == "fit":
            self._forget()
            self.report = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        refuse_sharded(pl_module)
        self._release()
        self._masked = masked_weights(pl_module)
        self._scores = [masked.by.scores for masked in self._masked if masked.by.scores is not None]
        if any(scores.dtype in (torch.bfloat16, torch.float16) for scores in self._scores):
            rank_zero_warn(
                "MovementPruning with scores of half precision: a step smaller than half a unit in their last place "
                '(4e-3 at 1 in bf16) is lost. Use Trainer(precision="bf16-mixed"), which keeps fp32 weights'
            )
        self._handles = [optimizer.register_step_post_hook(self._count) for optimizer in trainer.optimizers]
        if self._scores:
            rates = dict.fromkeys(self._scores, self.score_learning_rate)
            self._handles += own_rates("MovementPruning", trainer.optimizers, rates)
            self._handles.append(SeparateClipping(pl_module, self._scores))

    def _count(self, *_: Any) -> None:
        self._stepped = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if training_progress(trainer, 0).fraction is None:
            raise ValueError(
                "MovementPruning follows the share of training that is done, and this one has no end: set "
                "Trainer(max_epochs=...) or Trainer(max_steps=...)"
            )
        first, last = _share(trainer, self.warmup, "warmup"), 1 - _share(trainer, self.cooldown, "cooldown")
        if first >= last:
            raise ValueError(f"warmup and cooldown leave no training to prune in: {first:.3g} and {1 - last:.3g} of it")
        self._ends = (first, last)
        if trainer.global_step == 0:
            self._update(0.0)

    def _update(self, position: float) -> None:
        self._level, self._done = self.level(position), position
        update_masks(self._masked, self.mode, self._level, self.scope)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.mode == "soft":
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            scores = [p for p in self._scores if id(p) in held]
            strength = self.penalty * self._level / self.final
            add_penalty_grad_(scores, strength, len(self._scores), pending_scale(trainer, optimizer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._position = training_progress(trainer, batch_idx + 1).fraction or 0.0
        if self._stepped:
            self._stepped = False
            self._steps += 1
            self._update(self._position)
            if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                facts = sparsity(pl_module).facts
                for logger in trainer.loggers:
                    numbers = {"pruning/level": self._level, "pruning/sparsity": facts["sparsity"]}
                    logger.log_metrics(numbers, step=trainer.global_step)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check_masks(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._done != self._position and self._steps:  # the last steps overflowed, and the masks stood
            self._update(self._position)
        table = sparsity(pl_module)
        steps = {"mode": self.mode, "level": self._level, "optimiser steps": self._steps}
        self.report = Report(table.title, {**steps, **table.facts}, table.rows)
        rank_zero_info(f"MovementPruning: {self.report}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._altering.release()
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._altering.release()
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._masked, self._scores = [], [], []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"level": self._level, "position": self._position, "done": self._done, "steps": self._steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._level, self._steps = state_dict["level"], state_dict["steps"]
        self._position, self._done = state_dict["position"], state_dict["done"]


def _share(trainer: Trainer, duration: Duration | None, argument: str) -> float:
    """A stretch of training as a share of the whole."""
    if duration is None or duration.unit == "fraction":
        return 0.0 if duration is None else duration.amount
    if duration.unit == "epochs" and trainer.max_epochs is not None and trainer.max_epochs > 0:
        return duration.amount / trainer.max_epochs
    if duration.unit == "steps" and trainer.max_steps is not None and trainer.max_steps > 0:
        return duration.amount / trainer.max_steps
    per_epoch, total = training_length(trainer)
    share = duration.steps(steps_per_epoch=per_epoch, total_steps=total) / total
    if not 0 <= share < float("inf"):
        raise ValueError(
            f'{argument}="{duration}" is no known share of this training, whose optimiser steps cannot be told before '
            "(manual optimisation): give a share, such as 0.1, or epochs"
        )
    return share
