"""A monitored value that ends a stage: the same decision on all ranks, and the stage's best weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_ft.core.norms import is_norm
from lightning_ft.core.plateau import Plateau, PlateauWatch


class StageMetric:
    """Looks at the value once after each validation. Rank 0's value counts on all ranks.

    Args:
        owner: Name of the callback, for messages.
        plateau: Which value, and how long to wait.
    """

    def __init__(self, owner: str, plateau: Plateau) -> None:
        self._owner = owner
        self._plateau = plateau
        self.restart()

    def restart(self) -> None:
        """Forget all, as at the beginning of a stage."""
        self._watch = PlateauWatch(self._plateau)
        self._weights: dict[str, Tensor] = {}

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse a fit in which the value can never come, or the weights cannot be kept.

        Raises:
            ValueError: There is no validation, or ``reload_best`` meets sharded weights.
        """
        if not trainer.enable_validation:
            raise ValueError(
                f"{self._owner}(every=Plateau(...)) decides after validations, and this fit has none: give "
                "validation data and a validation_step, or count in epochs or steps"
            )
        if self._plateau.reload_best and any(hasattr(p, "full_tensor") for p in module.parameters()):
            raise ValueError(
                f"{self._owner}: Plateau(reload_best=True) keeps whole weights, and these are sharded: set "
                "reload_best=False"
            )

    def observe(self, trainer: Trainer, module: LightningModule) -> bool:
        """Take in the value of the validation that has just ended; True if the stage is over.

        Raises:
            ValueError: The value was not logged.
        """
        name, logged = self._plateau.monitor, trainer.callback_metrics
        mine = float(logged[name]) if name in logged else None
        # Ranks that decide each for itself would part, and wait for one another for ever.
        value: float | None = trainer.strategy.broadcast(mine)
        if value is None:
            raise ValueError(
                f"{self._owner}: monitor={name!r} was not logged; logged were: {', '.join(sorted(logged)) or 'none'}. "
                f"Name one of these, or log it: self.log({name!r}, ...) in validation_step"
            )
        if self._watch.improves(value) and self._plateau.reload_best:
            self._weights = {key: t.detach().to("cpu", copy=True) for key, t in _moving(module).items()}
        return self._watch.over

    def put_back(self, module: LightningModule) -> None:
        """Give the module the stage's best weights, where they were kept."""
        tensors = _moving(module)
        with torch.no_grad():
            for name, best in self._weights.items():
                tensors[name].copy_(best)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {**self._watch.state_dict(), "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._watch.load_state_dict(state)
        self._weights = dict(state["weights"])


def _moving(module: LightningModule) -> dict[str, Tensor]:
    """What training changes in a stage: trainable parameters, and the running statistics of norms."""
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for path, layer in module.named_modules():
        if is_norm(layer):
            tensors |= {f"{path}.{name}": b for name, b in layer.named_buffers(recurse=False)}
    return tensors
