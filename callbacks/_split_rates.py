"""Learning rates by parameter, and parameters without weight decay, for the duration of each step of any optimiser."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Group = dict[str, Any]


class SplitRates:
    """Splits an optimiser's groups while ``step()`` runs: rates are multiplied by parameter, and some are not decayed.

    Several of them on one optimiser multiply; a parameter that one does not name has its factor 1 there, and one that
    any of them names is not decayed. Groups are never split for good: a stranger's schedulers and checkpoints count
    them. Other hooks run inside these two, so that they see, change and put back the groups that are stepped.

    Args:
        optimizer: The optimiser; its groups and its state dict stay its own.
        factors: ``id`` of a parameter to the factor.
        undecayed: ``id`` of each parameter that is not decayed.
    """

    def __init__(self, optimizer: Optimizer, factors: Mapping[int, float], *, undecayed: Collection[int] = ()) -> None:
        self.factors = factors
        self.undecayed = frozenset(undecayed)
        self._hooks = _hooks_of(optimizer)
        self._hooks.users.append(self)

    def remove(self) -> None:
        """Take this one's factors off."""
        if self in self._hooks.users:
            self._hooks.join()
            self._hooks.users.remove(self)
            if not self._hooks.users:
                self._hooks.remove()


def own_rates(owner: str, optimizers: Sequence[Optimizer], rates: Mapping[nn.Parameter, float]) -> list[SplitRates]:
    """Learning rates of their own for some parameters, and no weight decay. In ``on_fit_start``, before a restore.

    A rate follows the optimiser's schedule: it is as given where its group's is at its base, which is the first one, or
    the highest of OneCycleLR. What else multiplies the group's rate multiplies this one.

    Args:
        owner: Name of the callback, for messages.
        optimizers: The trainer's.
        rates: Of each such parameter.

    Raises:
        ValueError: The optimisers do not hold all of the parameters, or not at a rate of which another is a multiple.
    """
    factors: list[dict[int, float]] = []
    for optimizer in optimizers:
        factors.append({})
        for group in getattr(optimizer, "param_groups", ()):
            if own := {id(p): rates[p] for p in group["params"] if p in rates}:
                base = _base_rate(owner, optimizer, group)
                factors[-1] |= {parameter: rate / base for parameter, rate in own.items()}
    if missing := len(rates) - len(set().union(*factors)):
        raise ValueError(
            f"{owner} added {len(rates)} tensors to the model, and {missing} of them are in no optimiser: build it in "
            "configure_optimizers from self.parameters(), which has them by then"
        )
    pairs = zip(optimizers, factors, strict=True)
    return [SplitRates(optimizer, its, undecayed=its) for optimizer, its in pairs if its]


def _base_rate(owner: str, optimizer: Any, group: Group) -> float:
    if not isinstance(optimizer, Optimizer) or group.get("lr") is None:
        raise ValueError(
            f"{owner} gives some parameters a learning rate of their own, and {type(optimizer).__name__} has none that "
            "could be set (a wrapper, or relative steps): use another optimiser, such as AdamW"
        )
    base = group.get("max_lr", group.get("initial_lr", group["lr"]))
    if not base:
        raise ValueError(
            f"{owner}: a group of {type(optimizer).__name__} has the base learning rate {base!r}, of which nothing can "
            "take a share: give it a rate, which a scheduler may then lower"
        )
    return float(base)


class _Hooks:
    """Two hooks that split and join the groups: the first before a step, and the last after it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.users: list[SplitRates] = []
        self._optimizer: Optimizer | None = None
        self._own: list[Group] = []
        self._parts: list[list[Group]] = []
        self._before = optimizer.register_step_pre_hook(self._split)
        before: Any = optimizer._optimizer_step_pre_hooks
        before.move_to_end(self._before.id, last=False)
        self._after: RemovableHandle = optimizer.register_step_post_hook(self.join)

    def _split(self, optimizer: Optimizer, *_: Any) -> None:
        self.join()  # a step that raised left the groups split
        # Registered anew at each step so as to run last: other post-hooks see the rates that were used.
        self._after.remove()
        self._after = optimizer.register_step_post_hook(self.join)
        self._optimizer, self._own = optimizer, optimizer.param_groups
        self._parts = [self._divide(group) for group in self._own]
        optimizer.param_groups = [part for parts in self._parts for part in parts]

    def _divide(self, group: Group) -> list[Group]:
        parts: dict[tuple[float, bool], Group] = {}
        for parameter in group["params"]:
            key = id(parameter)
            factor = math.prod(user.factors.get(key, 1.0) for user in self.users)
            bare = "weight_decay" in group and any(key in user.undecayed for user in self.users)
            if (factor, bare) not in parts:
                rate = {} if factor == 1 else {"lr": group["lr"] * factor}  # relative steps have no rate
                parts[factor, bare] = {**group, "params": [], **rate, **({"weight_decay": 0.0} if bare else {})}
            parts[factor, bare]["params"].append(parameter)
        return list(parts.values())

    def join(self, *_: Any) -> None:
        """Put the optimiser's own groups back."""
        if self._optimizer is None:
            return
        for group, parts in zip(self._own, self._parts, strict=True):
            # Some optimisers keep running values in the group itself (a step count, an estimated scale). After a step
            # that raised, rates and decays may still be another hook's.
            kept = ("params", "lr", "weight_decay")
            group.update({key: value for part in parts[:1] for key, value in part.items() if key not in kept})
        self._optimizer.param_groups = self._own
        self._optimizer, self._own, self._parts = None, [], []

    def remove(self) -> None:
        self._before.remove()
        self._after.remove()


def _hooks_of(optimizer: Optimizer) -> _Hooks:
    """Those that this optimiser has, or new ones."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, _Hooks)), None) or _Hooks(optimizer)
