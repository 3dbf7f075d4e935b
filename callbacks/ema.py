"""Exponential moving average of the weights, without the initial ones in it."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._trainer import training_length, training_progress
from lightning_ft.callbacks._weight_average import CheckpointWriter, WeightAverage, check_averaging
from lightning_ft.core.schedule import Duration


class EMA(Callback):
    """Average the weights over the optimiser's steps: θ̄ₜ = Σᵢ dᵗ⁻ⁱ θᵢ / Σᵢ dᵗ⁻ⁱ, i = 1 … t.

    θᵢ are the weights after the i-th step since ``start``. It is computed as θ̄ ← θ̄ + (1 − d)/(1 − dᵗ) (θₜ − θ̄), Adam's
    exact correction of the bias: the first update copies, the weights of before training are never part of the mean,
    and no warm-up of d is needed. One fused pass after each real step (a step post-hook of the optimiser; steps that an
    fp16 scaler skips do not count), over what has trained so far.

    Validation sees θ̄, and every checkpoint holds it under ``state_dict``; the weights that train travel in the
    callback's state, and a resumed run goes on with them, bit for bit. Before the first update, and where ``start``
    never comes, both are the trained weights. After the fit the module holds θ̄ (a fit that follows starts from it).

    It differs from Lightning's ``EMAWeightAveraging``, which is updated as θ̄ ← dθ̄ + (1 − d)θ from a copy made at its
    first update, and until then validates and saves the *initial* weights, to the end if its start never comes; counts
    skipped steps; saves the raw weights in weights-only checkpoints (``ModelCheckpoint(save_weights_only=True)``);
    averages buffers; and does not shard. Under FSDP2 this one averages each process's own part.

    Buffers are not averaged: the statistics of batch norms are those of the weights that train, and a warning says so.
    Put it before callbacks that copy weights in ``on_validation_end``. It costs one copy of the weights, two in
    validation; a fused optimiser under an fp16 scaler, one wait for the device a step.

    Args:
        decay: d in [0, 1). By default 1 − 1/(0.1 T), a mean over the last tenth of training's T steps: the usual 0.999
            averages mostly the beginning of a short fine-tuning.
        half_life: Instead of d, the time after which a step counts half: ``"200 steps"``, ``"1 epoch"``, or a fraction
            of training.
        start: When averaging begins: ``"500 steps"``, ``"2 epochs"``, or a fraction of training; at once by default.

    Raises:
        ValueError: ``decay`` is out of range, or given beside ``half_life``; a length of training is needed that is
            not known; FSDP1, DeepSpeed, or another callback that averages weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EMA(half_life="100 steps", start=0.5)], logger=False)

    Reference:
        Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; Kingma and Ba 2015, "Adam: A
        Method for Stochastic Optimization", section 3 (the correction).
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: float | str | None = None,
        start: float | str | None = None,
    ) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must lie in [0, 1): 0.99 averages over about the last 100 steps")
        if decay is not None and half_life is not None:
            raise ValueError(f"decay={decay!r} and half_life={half_life!r} say the same thing twice: give one of them")
        self.decay = decay
        self.half_life = None if half_life is None else Duration.parse(half_life, "half_life")
        self.start = None if start is None else Duration.parse(start, "start")
        self._average: WeightAverage | None = None
        self._begun = False
        self._d = math.nan
        self._mass: list[float] = []
        self._members: list[list[int]] = []
        self._moved: set[int] = set()
        self._loaded: dict[str, Any] | None = None
        self._handles: list[RemovableHandle | CheckpointWriter] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None
        if stage == "fit":
            self._average, self._begun, self._mass = None, False, []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_averaging(trainer, pl_module, self)
        if self._loaded is not None:
            self._adopt(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Sharded strategies restore callbacks only after `on_fit_start`.
        if self._average is None or self._loaded is not None:
            self._adopt(trainer, pl_module)
        if self.start is not None:
            self.start.count(training_progress(trainer, 0))  # refuses a fraction of an endless training
        self._d = self._decay(trainer)
        # Here, after those that move the weights in such a hook themselves.
        for i, optimizer in enumerate(trainer.optimizers):
            self._handles.append(optimizer.register_step_post_hook(self._hook(i)))
        self._handles.append(CheckpointWriter(pl_module, self._write))

    def _adopt(self, trainer: Trainer, module: LightningModule) -> None:
        self._average = average = WeightAverage(trainer, module)
        index = {id(p): i for i, p in enumerate(average.parameters)}
        seen: set[int] = set()
        self._members, self._moved = [], set()
        for optimizer in trainer.optimizers:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]} - seen
            seen |= ids
            self._members.append(sorted(index[i] for i in ids if i in index))
        self._mass = [0.0] * len(self._members)
        if self._loaded is not None:
            average.load(self._loaded)
            self._mass = list(self._loaded["mass"])
            if average.mean is not None:
                pairs = zip(average.mean, average.locals(), strict=True)
                self._moved = {i for i, (mean, value) in enumerate(pairs) if not torch.equal(mean, value.to(mean))}
            self._loaded = None

    def _decay(self, trainer: Trainer) -> float:
        if self.decay is not None:
            return self.decay
        per_epoch, total = training_length(trainer)
        if self.half_life is not None:
            steps = self.half_life.steps(steps_per_epoch=per_epoch, total_steps=total)
            decay = 0.5 ** (1 / steps) if steps > 0 else math.nan
        else:
            decay, steps = max(0.0, 1 - 10 / total), total
        if not math.isfinite(steps):
            given = f"half_life={self.half_life}" if self.half_life else "decay=None"
            raise ValueError(
                f"{given} needs the number of optimiser steps, which is not known here (manual optimisation, or a "
                'training without end): give half_life="200 steps" or decay=0.99'
            )
        return decay

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun = self.start is None or self.start.count(training_progress(trainer, batch_idx)) > 0

    def _hook(self, i: int) -> Any:
        def update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Fused optimisers under an fp16 scaler run a step that overflowed, too, and skip it inside, by this flag.
            overflow = getattr(optimizer, "found_inf", None)
            if self._begun and not (overflow is not None and bool(overflow)):
                self._update(i)

        return update

    def _update(self, i: int) -> None:
        average = self._average
        assert average is not None
        self._mass[i] = self._d * self._mass[i] + (1 - self._d)
        if average.mean is None:
            average.update(1.0)
        # The mean of what never trained is what it is: no pass over frozen layers.
        self._moved.update(j for j in self._members[i] if average.parameters[j].requires_grad)
        members = [j for j in self._members[i] if j in self._moved]
        if members:
            average.update((1 - self._d) / self._mass[i], members=members)

    # ---- what validation and checkpoints see

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._average
        if trainer.state.fn == "fit" and average is not None and average.mean is not None and not average.is_in:
            average.put_in()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None and trainer.state.fn == "fit":
            self._average.put_back()

    def _write(self, checkpoint: dict[str, Any]) -> None:
        assert self._average is not None
        self._average.write(checkpoint)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average is not None
        if self._average.mean is not None:
            self._average.put_in()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._average is not None and trainer.state.fn == "fit":
            self._average.put_back()
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        state = {"mean": None, "raw": None} if self._average is None else self._average.state()
        return {"mass": list(self._mass), **state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
