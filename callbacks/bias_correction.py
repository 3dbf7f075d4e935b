"""Adam without bias correction, to reproduce old results."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from typing_extensions import override

from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.functional.bias_correction import uncorrected

Group = dict[str, Any]


class BiasCorrection(Callback):
    """``BiasCorrection(correct_bias=False)``: the project's Adam or AdamW steps as TF's BERTAdam did. For old results.

    θ ← θ − ηm/(√v + ε) − ηδθ, where torch has θ ← θ − η(m/c₁)/(√(v/c₂) + ε) − ηδθ, cᵢ = 1 − βᵢᵗ. Without the
    corrections steps are 3.16 times as large at t = 1, 6.57 times at t = 12, 1.26 times at t = 1000: an enlarged
    learning rate for all of a short training, and the commonest cause of its failed runs. Do not train so; compare with
    it.

    It is exact for any Adam and AdamW of ``torch.optim`` (amsgrad, foreach, fused, capturable): for the duration of
    each step a group is divided by t, and each part has the rate ηc₁/√c₂, ε/√c₂, and the decoupled weight decay δ√c₂/c₁
    (:func:`lightning_ft.functional.bias_correction.uncorrected`). t is that of each parameter: layers that thaw late
    begin at 1. Groups, state dict, schedulers and learning-rate monitors stay the project's own, and so does what other
    callbacks add beside the step. It has no state: t is the optimiser's.

    Deviation: BERTAdam clips gradients by parameter group of its own; set ``Trainer(gradient_clip_val=1.0)``.

    Args:
        correct_bias: False for BERTAdam's step; True changes nothing.

    Raises:
        TypeError: An optimiser is not Adam or AdamW of ``torch.optim``.
        RuntimeError: A callback that divides groups at the step, too (RecAdam), stands after this one.
        ValueError: DeepSpeed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BiasCorrection(correct_bias=False)], logger=False)

    Reference:
        Zhang, Wu, Katiyar, Weinberger and Artzi 2021, "Revisiting Few-sample BERT Fine-tuning"; Mosbach,
        Andriushchenko and Klakow 2021, "On the Stability of Fine-tuning BERT".
    """

    def __init__(self, correct_bias: bool) -> None:
        self.correct_bias = correct_bias
        self._steps: list[_UncorrectedSteps] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.correct_bias:
            return
        refuse_deepspeed(trainer, self)
        for optimizer in trainer.optimizers:
            # torch wraps `step` in each class that is used.
            step = inspect.unwrap(type(optimizer).step)
            if not any(isinstance(optimizer, cls) and step is inspect.unwrap(cls.step) for cls in (Adam, AdamW)):
                raise TypeError(
                    f"BiasCorrection knows the step of torch.optim's Adam and AdamW, and not that of "
                    f"{type(optimizer).__name__}: use one of them, or remove it"
                )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.correct_bias and not self._steps:
            # Only now: these hooks must stand inside all that divide groups or multiply rates.
            self._steps = [_UncorrectedSteps(optimizer) for optimizer in trainer.optimizers]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for steps in self._steps:
            steps.remove()
        self._steps.clear()


class _UncorrectedSteps:
    """Divides an optimiser's groups by age while ``step()`` runs; the last to do so, and the first to undo it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._ages: dict[nn.Parameter, int] = {}
        self._unsure: list[nn.Parameter] = []
        self._own: list[Group] | None = None
        self._parts: list[Group] = []
        before = optimizer.register_step_pre_hook(self._before)
        after = optimizer.register_step_post_hook(self._after)
        hooks: Any = optimizer._optimizer_step_post_hooks
        # What pulls beside the step (L2SP, RecAdam) reads the rates in post-hooks of its own: the true ones.
        hooks.move_to_end(after.id, last=False)
        self._handles = [before, after]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._undo()  # a step that raised left the groups divided
        self._settle()
        self._parts = [part for group in optimizer.param_groups for part in self._divide(group)]
        self._own, optimizer.param_groups = optimizer.param_groups, self._parts

    def _divide(self, group: Group) -> list[Group]:
        by_age: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_age.setdefault(self._age(parameter), []).append(parameter)
        return [_part(group, age + 1, parameters) for age, parameters in by_age.items()]

    def _age(self, parameter: nn.Parameter) -> int:
        state = self.optimizer.state.get(parameter)
        if not state:  # not stepped yet, or cleared (chain-thaw)
            self._ages[parameter] = 0
        elif parameter not in self._ages:  # resumed: read once
            self._ages[parameter] = int(state["step"])
        return self._ages[parameter]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer.param_groups is not self._parts:
            assert self._own is not None
            optimizer.param_groups, self._own = self._own, None
            raise RuntimeError(
                "BiasCorrection: another callback divided the optimiser's groups after it (RecAdam does), so its rates "
                "were of corrected steps: put BiasCorrection last in the list of callbacks"
            )
        stepped = [p for part in self._parts for p in part["params"] if p.grad is not None]
        for parameter in stepped:
            self._ages[parameter] += 1
        # Fused optimisers under an fp16 scaler run a step that overflowed, too, and skip it inside.
        self._unsure = stepped if getattr(optimizer, "found_inf", None) is not None else []
        self._undo()

    def _settle(self) -> None:
        """Take back a step that was skipped on the device. Read when the next one begins: it has long been known."""
        unsure, self._unsure = self._unsure, []
        if unsure and (state := self.optimizer.state.get(unsure[0])) and int(state["step"]) < self._ages[unsure[0]]:
            for parameter in unsure:
                self._ages[parameter] -= 1

    def _undo(self) -> None:
        # After a step that raised, another hook may have put its own groups back already.
        if self._own is not None and self.optimizer.param_groups is self._parts:
            self.optimizer.param_groups = self._own
        self._own = None

    def remove(self) -> None:
        """Take the hooks off, and what a step that raised has left."""
        self._undo()
        for handle in self._handles:
            handle.remove()


def _part(group: Group, step: int, parameters: list[nn.Parameter]) -> Group:
    beta1, beta2 = group["betas"]
    factor = uncorrected(float(beta1), float(beta2), step)
    part = {**group, "params": parameters, "lr": group["lr"] * factor.rate, "eps": group["eps"] * factor.eps}
    if group.get("decoupled_weight_decay"):
        part["weight_decay"] = group["weight_decay"] / factor.rate
    return part
