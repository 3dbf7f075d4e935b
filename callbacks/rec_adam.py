"""RecAdam: begin by recalling the pretrained weights, and hand over to the task step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.callbacks._anchoring import Anchoring, Named, pretrained_and_new, warn_without_head
from lightning_ft.callbacks._annealed_recall import AnnealedRecall, check_linear
from lightning_ft.callbacks._trainer import refuse_deepspeed, training_length
from lightning_ft.core.anchor import Storage
from lightning_ft.core.annealing import Annealing, Curve
from lightning_ft.core.layers import Layers
from lightning_ft.core.schedule import Duration


class RecAdam(Callback):
    """Anneal from recall to the task: θ ← θ − λ(t)ηu − η(1 − λ(t))γ(θ − θ⁰), with λ(t) = 1/(1 + e^(−k(t − t₀))).

    ηu is the step of the project's own AdamW with bias correction (u = m̂/(√v̂ + ε), of moments of the task's gradient
    alone), θ⁰ the pretrained weights, taken before any checkpoint is restored. It is a callback over any optimiser of
    ``torch.optim`` whose step is linear in its rate (Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, SGD with or
    without momentum; foreach, fused, capturable), and exact, not an approximation: for the duration of each step the
    rate is ηλ/(1 − r), with r = η(1 − λ)γ, and then the weights go by r towards θ⁰. Decoupled weight decay stays ηδθ.

    t is the number of steps of each parameter, from 1: layers that thaw late start their own recall. What LayerReinit
    drew anew and the head take the plain step of the optimiser. Schedulers, state dicts and learning-rate monitors see
    the project's own groups and rates; between the hooks (in fp32 that includes ``training_step``) code that
    writes to ``optimizer.param_groups`` writes to divided ones.

    The rate must stay below 1/γ: at γ = 5000 that is 2e-4. Later than about t₀ + 160 steps (k = 0.1) the pull is below
    rounding and costs nothing. L2SP pulls a second time: leave it out.

    Logs ``rec_adam/recall`` (1 − λ of the parameters that are stepped, in the mean) every ``log_every_n_steps`` steps
    where the trainer has a logger.

    Deviations from the authors' code: their ε is not bias-corrected (torch's is, and the project sets it; theirs is
    1e-6); they pull where the task's step has left the weights, where their paper pulls at θ (``legacy_order``
    reproduces the code).

    Args:
        strength: γ; the authors' 5000.
        t0: t₀, an integer (the authors take 100 to 1000 steps of each parameter) or a stretch of training:
            ``"250 steps"``, ``0.1``, ``"1 epochs"``.
        k: Slope per step; the authors' 0.05 to 1.
        curve: ``"sigmoid"``, or ``"linear"``: min(1, t/t₀).
        legacy_order: See above.
        layers: Where the head is, if it is not found by itself.
        storage: Where θ⁰ is kept, see :class:`~lightning_ft.callbacks.L2SP`.

    Raises:
        ValueError: An argument is out of range; the learning rate is 1/γ or more; ``t0`` is a share of a training
            whose length is unknown; nothing is there to recall; on resume, the model does not start from the same
            weights; FSDP1, DeepSpeed.
        TypeError: An optimiser's step is not known to be linear in its rate.

    Example:
        >>> RecAdam(t0=0.1, k=0.05).strength
        5000.0

    Reference:
        Chen, Hou, Cui, Che, Liu and Yu 2020, "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less
        Forgetting".
    """

    def __init__(
        self,
        strength: float = 5000.0,
        *,
        t0: float | str = 250,
        k: float = 0.1,
        curve: Curve = "sigmoid",
        legacy_order: bool = False,
        layers: Layers | None = None,
        storage: Storage | None = None,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength={strength!r} must be 0 or more, and finite")
        steps = t0 if isinstance(t0, int) and not isinstance(t0, bool) else None
        self.t0 = Duration(float(steps), "steps") if steps is not None else Duration.parse(t0, "t0")
        Annealing(self.t0.amount, k, curve)  # refuses bad numbers now
        self.strength = float(strength)
        self.k = k
        self.curve = curve
        self.legacy_order = legacy_order
        self.layers = layers or Layers()
        self._anchoring = Anchoring(self, self._recalled, storage)
        self._named: Named = []
        self._references: list[Tensor] = []
        self._recalls: list[AnnealedRecall] = []
        self._ages: dict[str, int] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()
            self._ages = {}
            self._anchoring.watch(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._anchoring.restoring()

    def _recalled(self, module: LightningModule) -> Named:
        return pretrained_and_new(self, module, self.layers)[0]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        warn_without_head(self, pl_module, self.layers)
        self._named = self._recalled(pl_module)
        self._references = self._anchoring.take(self._named).like(self._named)
        for optimizer in trainer.optimizers:
            if self._held(optimizer):
                check_linear("RecAdam", optimizer)
        if any(p.dtype in (torch.bfloat16, torch.float16) for _, p in self._named):
            rank_zero_warn(
                "RecAdam on weights of half precision: a pull smaller than half a unit in their last place (1e-4 at "
                '0.05 in bf16) is lost. Use Trainer(precision="bf16-mixed"), which keeps fp32 weights'
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._anchoring.recheck(trainer)
        self._annealing(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._recalls:
            return
        # Only now: these hooks must come after all that divide groups or multiply rates, in whatever hook they began.
        annealing = self._annealing(trainer)
        for optimizer in trainer.optimizers:
            if chosen := self._held(optimizer):
                named = [self._named[i] for i in chosen]
                references = [self._references[i] for i in chosen]
                recall = AnnealedRecall(
                    "RecAdam",
                    optimizer,
                    named,
                    references,
                    self.strength,
                    annealing,
                    self._ages,
                    legacy_order=self.legacy_order,
                )
                self._recalls.append(recall)

    def _held(self, optimizer: Optimizer) -> list[int]:
        """Which of the parameters to recall this optimiser steps."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [i for i, (_, p) in enumerate(self._named) if id(p) in held]

    def _annealing(self, trainer: Trainer) -> Annealing:
        per_epoch, total = training_length(trainer)
        steps = self.t0.steps(steps_per_epoch=per_epoch, total_steps=total)
        if not math.isfinite(steps):
            raise ValueError(
                f"RecAdam: t0={self.t0} is a share of a training whose length in optimiser steps is unknown (manual "
                "optimisation, or no end): write steps, t0=250, or set Trainer(max_steps=...)"
            )
        return Annealing(steps, self.k, self.curve)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and (trainer.global_step + 1) % every == 0:
            sums = [recall.recall() for recall in self._recalls]
            if values := sum(count for _, count in sums):
                pl_module.log("rec_adam/recall", sum(rest for rest, _ in sums) / values)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for recall in self._recalls:
            recall.remove()
        self._recalls.clear()
        self._named, self._references = [], []
        self._anchoring.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        for recall in self._recalls:
            recall.settle()
        return {"fingerprint": self._anchoring.fingerprint, "steps": dict(self._ages)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._anchoring.fingerprint = state_dict["fingerprint"]
        self._ages.clear()
        self._ages.update(state_dict["steps"])
