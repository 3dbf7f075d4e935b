"""What L2SP and EWC share: quadratic penalties, through the gradient or beside the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ft.core.penalty import QuadraticPenalty, weighted_rows
from lightning_ft.core.report import Report
from lightning_ft.core.sharding import local

Mode = Literal["coupled", "decoupled"]


class Term:
    """A penalty over parameters.

    Args:
        parameters: θ.
        strength: α; under ``per_step`` it is ηα at the optimiser's base learning rate.
        reference: θ⁰, None for zero.
        weights: f, None for 1.
        per_step: Whether ``strength`` is the share of the way back that one step goes at the base learning rate.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        strength: float,
        reference: Sequence[Tensor] | None = None,
        weights: Sequence[Tensor] | None = None,
        *,
        per_step: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.per_step = per_step
        self.sizes = [parameter.numel() for parameter in parameters]
        self.largest, self.mean, rows = 1.0, 1.0, None
        if weights is not None:
            # Of sharded weights, over all processes.
            self.largest = max((float(w.max()) for w in weights if w.numel()), default=0.0)
            self.mean = math.fsum(float(w.sum(dtype=torch.float64)) for w in weights) / max(1, sum(self.sizes))
            parts = [local(weight) for weight in weights]
            rows = [weighted_rows(part) for part in parts]
            weights = [part if r is None else part[r] for part, r in zip(parts, rows, strict=True)]
        self.penalty = QuadraticPenalty(strength, reference, weights, rows)
        self._index = {id(parameter): i for i, parameter in enumerate(parameters)}

    def members(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Which of its parameters are among these."""
        return [i for p in parameters if (i := self._index.get(id(p))) is not None]


class QuadraticPull:
    """Applies terms during a fit, counts what they did, and tells it.

    Args:
        owner: Name of the callback, for messages; in snake case the name of what is logged.
        mode: Through the gradient or beside the step.
    """

    def __init__(self, owner: str, mode: Mode) -> None:
        if mode not in ("coupled", "decoupled"):
            raise ValueError(f'mode={mode!r} must be "coupled" (through the gradient) or "decoupled" (beside the step)')
        self.owner = owner
        self.mode = mode
        self._steps = 0
        self._contraction: Any = 0.0  # a tensor where learning rates are: no copy to the host
        self._terms: list[Term] = []
        self._handles: list[RemovableHandle] = []

    def start(self, trainer: Trainer, terms: Sequence[Term]) -> None:
        """Hook onto the optimisers' steps. In ``on_fit_start``."""
        self.release()
        parameters = [p for term in terms for p in term.parameters]
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
            rank_zero_warn(
                f"{self.owner} on weights of half precision: a pull smaller than half a unit in their last place (1e-4 "
                'at 0.05 in bf16) is lost. Use Trainer(precision="bf16-mixed"), which keeps fp32 weights'
            )
        self._terms = [term for term in terms if term.parameters]
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                self._handles.append(optimizer.register_step_post_hook(self._stepped))

    def before_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer, name: str) -> None:
        """Log Ω, and add its gradient in the coupled form. In ``on_before_optimizer_step``."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._terms and trainer.loggers and (trainer.global_step + 1) % every == 0:
            with torch.no_grad():
                values = [term.penalty.value(term.parameters) for term in self._terms]
            module.log(name, torch.stack(values).sum())
        if self.mode == "coupled":
            scale = pending_scale(trainer, optimizer)
            held = [p for group in optimizer.param_groups for p in group["params"]]
            for term in self._terms:
                term.penalty.add_grad_(term.parameters, scale=scale, members=term.members(held))

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimisers under an fp16 scaler run a step that overflowed, too, and skip it inside, by this flag.
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        counts, logs = 0, 0.0
        for group in optimizer.param_groups:
            rate = group["lr"] if overflow is None else group["lr"] * (1 - overflow)
            for term in self._terms:
                if members := term.members(group["params"]):
                    pull = self._pull(term, members, _relative(rate, group) if term.per_step else rate)
                    if term.penalty.reference is not None:
                        count = sum(term.sizes[i] for i in members)
                        counts, logs = counts + count, logs + count * pull
        if counts:
            self._contraction = self._contraction + logs / counts
            self._steps += 1

    def _pull(self, term: Term, members: list[int], rate: Any) -> Any:
        """The logarithm of what one step leaves of a distance."""
        share = rate * term.penalty.strength
        if self.mode == "decoupled":
            if not isinstance(share, Tensor) and share * term.largest >= 1:
                raise ValueError(
                    f"{self.owner}: a step at learning rate {rate:g} pulls {share * term.largest:.3g} of the way back, "
                    "and 1 or more would jump past the pretrained weights: lower the strength"
                )
            term.penalty.pull_(term.parameters, learning_rate=rate, members=members)
        share = share * term.mean
        return torch.log1p(-share) if isinstance(share, Tensor) else math.log1p(-min(share, 1 - 1e-9))

    def report(self) -> Report:
        """What the pull did: steps, and what is left of a distance to θ⁰ that nothing else changed."""
        log = float(self._contraction)
        facts = {
            "mode": self.mode,
            "optimiser steps": self._steps,
            "mean pull per step": -math.expm1(log / self._steps) if self._steps else 0.0,
            "total contraction": math.exp(log),
        }
        return Report(f"{self.owner}: what it leaves of a distance that nothing else changes", facts)

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._terms.clear()

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"steps": self._steps, "contraction": float(self._contraction)}

    def load(self, state: dict[str, float]) -> None:
        """From a checkpoint."""
        self._steps, self._contraction = int(state["steps"]), state["contraction"]

    def reset(self) -> None:
        """Forget an earlier fit."""
        self._steps, self._contraction = 0, 0.0


def _relative(rate: Any, group: dict[str, Any]) -> Any:
    """The learning rate as a share of its base, which schedulers note."""
    base = group.get("initial_lr", group["lr"])
    return rate / base


def pending_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """The fp16 loss scale, where the gradients still carry it: fused optimisers unscale inside ``step()``.

    Not under our own ``FP16``, which unscales all gradients alike.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or getattr(trainer.precision_plugin, "unscales_fused", False):
        return None
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    device = optimizer.param_groups[0]["params"][0].device
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale
