"""Learning rates of their own for some parameters of a stranger's optimiser, for the duration of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


class OwnRates:
    """While ``step()`` runs, chosen parameters are in groups of their own, with their rate and no weight decay.

    The rate follows the optimiser's schedule: rate × lr / (its group's highest or first lr); factors that another
    callback puts on lr (by depth) multiply it, too. Groups, schedulers and state dicts never see it.

    Args:
        owner: Name of the callback, for messages.
        optimizers: The trainer's.
        rates: The highest learning rate of each chosen parameter.

    Raises:
        ValueError: An optimiser has no rate of its own.
    """

    def __init__(self, owner: str, optimizers: Sequence[Optimizer], rates: Mapping[nn.Parameter, float]) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer) or any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(
                    f"{owner} gives some parameters a learning rate of their own, and {type(optimizer).__name__} has "
                    "none that could be set (a wrapper, or relative steps): use another optimiser, such as AdamW"
                )
        self._rates = rates
        self._whole: dict[int, _Whole] = {}
        self._handles = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._split),
                optimizer.register_step_post_hook(self._join),
            )
        ]

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._join(optimizer, args, kwargs)  # a step that raised left the groups split
        whole = self._whole[id(optimizer)] = _Whole(optimizer)
        parts: list[dict[str, Any]] = []
        for group in whole.groups:
            by_rate: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter in self._rates:
                    by_rate.setdefault(self._rates[parameter], []).append(parameter)
            rest = [parameter for parameter in group["params"] if parameter not in self._rates]
            # One cycle's lr starts far below its peak.
            share = group["lr"] / group.get("max_lr", group.get("initial_lr", group["lr"])) if group["lr"] else 0.0
            parts += [_with(group, params, rate * share) for rate, params in by_rate.items()]
            group["params"] = rest
        # In place: others hold on to the list, and put it back.
        whole.list[:] = [*(group for group in whole.groups if group["params"]), *parts]

    def _join(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (whole := self._whole.pop(id(optimizer), None)) is not None:
            whole.put_back()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        for whole in self._whole.values():
            whole.put_back()
        self._whole.clear()


class _Whole:
    """An optimiser's groups as they were."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.list = optimizer.param_groups
        self.groups = list(self.list)
        self.parameters = [group["params"] for group in self.groups]

    def put_back(self) -> None:
        for group, parameters in zip(self.groups, self.parameters, strict=True):
            group["params"] = parameters
        self.list[:] = self.groups


def _with(group: dict[str, Any], parameters: list[nn.Parameter], rate: Any) -> dict[str, Any]:
    decay = {"weight_decay": 0.0} if "weight_decay" in group else {}
    return {**group, "params": parameters, "lr": rate, **decay}
