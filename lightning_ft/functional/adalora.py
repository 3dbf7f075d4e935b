"""AdaLoRA's budget: ranks are given up, the least important first; and its factors kept orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class RankBudget:
    """The ranks of an AdaLoRA adapter, ΔW = B diag(E) A, cut from ``init_r`` to ``target_r`` on the average.

    After each optimiser step the importance I = |p · ∂L/∂p| of each entry is smoothed, with its deviation, and every
    ``deltaT`` steps between ``tinit`` and ``total_step - tfinal`` the entries of E with the lowest products of the two
    (and of their row of A and column of B) are set to zero, as many as the cubic budget says. ``RankAllocator`` of peft
    does it; here it counts real steps and its state can be saved.

    Args:
        model: The adapted transformer.
        config: ``AdaLoraConfig`` of the adapter.
        adapter: Its name.
        total: Optimiser steps of the whole training; None to leave the configuration's.

    Raises:
        ValueError: No budget can be spent: ``target_r`` is not below ``init_r``, or warm-up and end leave no step.

    Reference:
        Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning".
    """

    def __init__(self, model: nn.Module, config: Any, adapter: str, *, total: int | None) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        total = config.total_step if total is None else total
        if not config.target_r < config.init_r:
            raise ValueError(
                f"config: target_r={config.target_r} must be below init_r={config.init_r}, or no rank is cut"
            )
        if not config.tinit < total - config.tfinal:
            raise ValueError(
                f"config: tinit={config.tinit} and tfinal={config.tfinal} leave none of {total} optimiser steps to cut "
                "ranks in: make them smaller, or train longer"
            )
        self.step = 0
        self.pattern: dict[str, list[bool]] | None = None
        self._model, self._config = model, config
        config.total_step = total
        self._allocator = RankAllocator(model, config, adapter)
        self._pairs = [
            (parameter, "lora_A" in name)
            for name, parameter in model.named_parameters()
            if f"lora_A.{adapter}" in name or f"lora_B.{adapter}" in name
        ]

    def update(self) -> None:
        """Call after each optimiser step that was made, while the gradients are still there.

        Raises:
            ValueError: A part of the adapter is frozen, so that its importance is not known.
        """
        if any(parameter.grad is None for parameter, _ in self._pairs):
            raise ValueError(
                "AdaLoRA compares the ranks of all layers, and some have no gradients: leave out what freezes a part "
                "of the adapter (GradualUnfreezing, Freeze), or use LoRA"
            )
        self.step += 1
        last = self._config.total_step - self._config.tfinal
        if self.step <= last:
            _, pattern = self._allocator.update_and_allocate(self._model, self.step, force_mask=self.step == last)
            self.pattern = pattern or self.pattern
        elif self.pattern is not None:
            self._allocator.mask_using_rank_pattern(self._model, self.pattern)
        if self.step == last:
            self._allocator.reset_ipt()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All A and B."""
        return [parameter for parameter, _ in self._pairs]

    def penalty(self) -> Tensor:
        """R = mean over all A and B of ‖AAᵀ − I‖_F and ‖BᵀB − I‖_F."""
        return torch.stack([_gap(p, is_a)[0] for p, is_a in self._pairs]).mean()

    @torch.no_grad()
    def add_penalty_grad_(self) -> None:
        """Add the gradient of ``orth_reg_weight`` times the penalty: d‖AAᵀ − I‖/dA = 2(AAᵀ − I)A / ‖AAᵀ − I‖."""
        weight = self._config.orth_reg_weight / max(len(self._pairs), 1)
        for parameter, is_a in self._pairs:
            if parameter.grad is None:
                continue
            norm, gap = _gap(parameter, is_a)
            slope = gap @ parameter if is_a else parameter @ gap
            parameter.grad.add_(slope * (2 * weight / norm.clamp(min=1e-12)).to(slope.dtype))

    def state_dict(self) -> dict[str, Any]:
        """The step, the importances and the ranks that are left, in plain types."""
        tables = {name: dict(getattr(self._allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {"step": self.step, "pattern": self.pattern, "total": self._config.total_step, **tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.step, self.pattern = state["step"], state["pattern"]
        places = {name: parameter.device for name, parameter in self._model.named_parameters()}
        for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            setattr(self._allocator, name, {key: value.to(places[key]) for key, value in state[name].items()})


def _gap(parameter: Tensor, is_a: bool) -> tuple[Tensor, Tensor]:
    product = parameter @ parameter.T if is_a else parameter.T @ parameter
    gap = product - torch.eye(len(product), device=product.device, dtype=product.dtype)
    return gap.norm(), gap
