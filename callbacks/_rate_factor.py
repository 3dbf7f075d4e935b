"""A factor on all learning rates of strangers' optimisers, for the duration of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


class RateFactor:
    """Multiplies the rates while ``step()`` runs (a pre- and a post-hook): schedulers and state dicts never see it.

    Args:
        owner: Name of the callback, for messages.
        optimizers: The trainer's.

    Raises:
        ValueError: An optimiser has no rate to multiply.
    """

    def __init__(self, owner: str, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer) or any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(
                    f"{owner}: a phase's lr and warmup multiply learning rates, and {type(optimizer).__name__} has "
                    "none of its own (a wrapper, or relative steps): leave out lr= and warmup=, or give it a rate"
                )
        self.value = 1.0
        self._own: dict[int, list[tuple[dict[str, Any], Any]]] = {}
        self._handles = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._scale),
                optimizer.register_step_post_hook(self._undo),
            )
        ]

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._undo(optimizer, args, kwargs)  # a step that raised left its factor
        # The dictionaries are remembered, not their places: another hook may swap the list of groups meanwhile.
        self._own[id(optimizer)] = [(group, group["lr"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.value

    def _undo(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in self._own.pop(id(optimizer), ()):
            group["lr"] = rate

    def remove(self) -> None:
        """Take the hooks off, and a factor that a step which raised has left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for groups in self._own.values():
            for group, rate in groups:
                group["lr"] = rate
        self._own.clear()
