"""Proof that a phase trains what it says: in optimisers, in gradients, and on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ft.core.freeze_plan import FreezePlan

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_optimizers(owner: str, plan: FreezePlan, trainer: Trainer) -> None:
    """Refuse a plan under which a parameter is to train that no optimiser holds.

    Raises:
        ValueError: There is such a parameter.
    """
    held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    known = {id(p) for p in held}
    trains = {name: p for stage in range(len(plan.phases)) for name, p in plan.training(stage)}
    missing = [name for name, p in trains.items() if id(p) not in known]
    # A module that hides its optimisers has the trainer's placeholder, and some shardings hold pieces of their own.
    wrapped = trainer.strategy.model
    whole = wrapped is trainer.strategy.lightning_module or isinstance(wrapped, DistributedDataParallel)
    judged = len(missing) < len(trains) or (whole and any(p.requires_grad for p in held))
    if missing and judged:
        raise ValueError(
            f"{owner}: {len(missing)} parameters are to train and are in no optimiser, so they never would: "
            f"{_some(missing)}. Return them in configure_optimizers, or call requires_grad_(False) on them before "
            "fit if they are not to train"
        )


class FirstStep:
    """Watches each optimiser's first step with gradients in a phase, by a post-hook that then rests.

    Args:
        owner: Name of the callback, for messages.
        plan: What trains at which stage.
        stage: The stage.
        optimizers: The trainer's.
        told: Names of parameters of which a warning has told already; new ones are added.
        shared: Whether others may freeze more than the plan does.
    """

    def __init__(
        self,
        owner: str,
        plan: FreezePlan,
        stage: int,
        optimizers: Sequence[Optimizer],
        told: set[str],
        *,
        shared: bool = False,
    ) -> None:
        self._owner = owner
        self._shared = shared
        self._told = told
        self._phase = stage + 1
        self._training = {id(p): name for name, p in plan.training(stage)}
        self._frozen = {id(p): name for name, p in plan.frozen(stage)}
        self._waiting = {id(optimizer) for optimizer in optimizers}
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_post_hook(self._check)
            for optimizer in optimizers
            if hasattr(optimizer, "register_step_post_hook")
        ]

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._waiting:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in parameters):
            return  # nothing was learnt in this step: a batch was left out
        self._waiting.remove(id(optimizer))
        self._refuse_what_else_freezes(parameters)
        # Fully sharded parameters may have an empty piece on this rank.
        trained = [p for p in parameters if id(p) in self._training and p.requires_grad]
        idle = [self._training[id(p)] for p in trained if p.grad is None and p.numel()]
        if news := [name for name in idle if name not in self._told]:
            self._told.update(news)
            rank_zero_warn(
                f"{self._owner}: {len(news)} parameters train in phase {self._phase}, but its first step gave them no "
                f"gradient: {_some(news)}. The forward pass does not use them, or gradient checkpointing cuts the "
                "graph above frozen layers (use_reentrant=False cures that)"
            )

    def _refuse_what_else_freezes(self, parameters: Sequence[nn.Parameter]) -> None:
        stopped = [self._training[id(p)] for p in parameters if id(p) in self._training and not p.requires_grad]
        wrong = [] if self._shared else stopped
        frozen = [p for p in parameters if id(p) in self._frozen]
        wrong += [self._frozen[id(p)] for p in frozen if p.requires_grad or p.grad is not None]
        if wrong:
            raise RuntimeError(
                f"{self._owner}: in the first step of phase {self._phase} these are not frozen, or not training, as "
                f"the phase has it: {_some(wrong)}. Something else changes requires_grad or writes gradients: remove "
                "the other callback that freezes, or the code in the module that does"
            )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def check_ranks(owner: str, trainer: Trainer, parameters: Sequence[nn.Parameter]) -> None:
    """Under DistributedDataParallel refuse parameters that differ between ranks. Call on all ranks; one all-reduce.

    Raises:
        RuntimeError: They differ.
    """
    wrapped = trainer.strategy.model
    if not isinstance(wrapped, DistributedDataParallel) or not parameters:
        return
    total = checksum(parameters)
    ends = torch.stack([total, -total])
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MIN, group=wrapped.process_group)
    lowest, highest = ends.tolist()
    if lowest != -highest:
        raise RuntimeError(
            f"{owner}: at step {trainer.global_step} the trainable parameters differ between ranks, so their gradients "
            "were not averaged: look for a second backward pass outside DDP's forward, for a parameter replaced or "
            "thawed by other code, and for random numbers in a hook that changes weights"
        )


def checksum(parameters: Sequence[nn.Parameter]) -> Tensor:
    """An exact sum (modulo 2⁶⁴) over the bits of all values, each tensor with a weight of its own; 0-D, int64."""
    device = parameters[0].device
    sums = [p.detach().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64).to(device) for p in parameters]
    weights = torch.arange(1, 2 * len(sums), 2, device=device)
    return (torch.stack(sums) * weights).sum()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
