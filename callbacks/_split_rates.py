"""Factors on single parameters' learning rates, for the duration of each step of any optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Factors = Mapping[int, float]


class SplitRates:
    """Multiplies rates by parameter: an optimiser's groups are split by factor while ``step()`` runs.

    Several of them on one optimiser multiply; a parameter that one does not name has its factor 1 there.

    Args:
        optimizer: The optimiser; its groups and its state dict stay its own.
        factors: ``id`` of a parameter to the factor.
    """

    def __init__(self, optimizer: Optimizer, factors: Factors) -> None:
        self._factors = factors
        self._hooks = _HOOKS.get(optimizer) or _Hooks(optimizer)
        _HOOKS[optimizer] = self._hooks
        self._hooks.users.append(self)

    def of(self, parameter: Any) -> float:
        """The factor of a parameter."""
        return self._factors.get(id(parameter), 1.0)

    def remove(self) -> None:
        """Take this one's factors off."""
        if self in self._hooks.users:
            self._hooks.leave(self)


class _Hooks:
    """Two hooks that split and join the groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.users: list[SplitRates] = []
        self._optimizer = optimizer
        self._own: list[dict[str, Any]] | None = None
        self._sizes: list[int] = []
        self._before = optimizer.register_step_pre_hook(self._split)
        self._after: RemovableHandle = optimizer.register_step_post_hook(self._join)

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._join(optimizer, args, kwargs)  # a step that raised left the groups split
        # Registered anew at each step so as to run last: other post-hooks see the rates that were used.
        self._after.remove()
        self._after = optimizer.register_step_post_hook(self._join)
        self._own = optimizer.param_groups
        parts = [self._parts(group) for group in self._own]
        self._sizes = [len(pieces) for pieces in parts]
        optimizer.param_groups = [part for pieces in parts for part in pieces]

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        by_factor: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(math.prod(user.of(parameter) for user in self.users), []).append(parameter)
        return [{**group, "params": parameters, "lr": group["lr"] * factor} for factor, parameters in by_factor.items()]

    def _join(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._own is None:
            return
        parts = iter(optimizer.param_groups)
        for group, size in zip(self._own, self._sizes, strict=True):
            # Some optimisers keep running values in the group itself (a step count, an estimated scale). After a step
            # that raised, rates and decays may still be another hook's.
            pieces = [next(parts) for _ in range(size)]
            kept = ("params", "lr", "weight_decay")
            group.update({k: v for piece in pieces[:1] for k, v in piece.items() if k not in kept})
        optimizer.param_groups = self._own
        self._own = None

    def leave(self, user: SplitRates) -> None:
        self._join(self._optimizer, (), {})
        self.users.remove(user)
        if not self.users:
            self._before.remove()
            self._after.remove()
            _HOOKS.pop(self._optimizer, None)


_HOOKS: WeakKeyDictionary[Optimizer, _Hooks] = WeakKeyDictionary()
