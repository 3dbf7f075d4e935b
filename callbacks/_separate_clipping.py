"""Gradients that are clipped by themselves, since they would else decide how the others are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

_HOOKS = ("configure_gradient_clipping", "clip_gradients")


class SeparateClipping:
    """Has a module clip some parameters' gradients apart from all others, by the trainer's or the module's own rule.

    The hook in which the module clips is shadowed on the instance (``configure_gradient_clipping``; in manual
    optimisation ``clip_gradients``) and runs twice: once without these gradients, once with them alone.

    Args:
        module: The module.
        parameters: Whose gradients stand apart.
    """

    def __init__(self, module: LightningModule, parameters: Sequence[nn.Parameter]) -> None:
        self._module = module
        self._apart = {id(p) for p in parameters}
        self._shadowed = [name for name in _HOOKS if hasattr(module, name) and name not in vars(module)]
        for name in self._shadowed:
            vars(module)[name] = partial(self._clip, getattr(module, name))

    def _clip(
        self,
        clip: Callable[..., Any],
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        how = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": gradient_clip_algorithm}
        plain: Optimizer = getattr(optimizer, "optimizer", optimizer)  # of manual optimisation, a LightningOptimizer
        held = [p for group in plain.param_groups for p in group["params"] if p.grad is not None]
        apart = [p for p in held if id(p) in self._apart]
        others = [p for p in held if id(p) not in self._apart]
        if not apart or not others:  # one hook calls the other
            clip(optimizer, **how)
            return
        for hidden in (apart, others):
            with _without_gradients(hidden):
                clip(optimizer, **how)

    def remove(self) -> None:
        """Take the shadows away."""
        for name in self._shadowed:
            vars(self._module).pop(name, None)
        self._shadowed = []


@contextmanager
def _without_gradients(parameters: Sequence[nn.Parameter]) -> Any:
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
