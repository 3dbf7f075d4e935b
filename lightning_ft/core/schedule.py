"""Time in the units a person writes, and pure functions of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(steps?|epochs?)\s*")
# Positions are quotients of small integers: 0.3 / 0.1 must count as 3, not 2.999…
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Args:
        step: Optimiser steps done.
        epoch: Epochs done, the running one in part (2.5 = in the middle of the third).
        fraction: Share of the whole training done, in [0, 1]; None where training has no end.
    """

    step: int
    epoch: float
    fraction: float | None

    def since(self, start: Progress) -> Progress:
        """What has passed since ``start``."""
        known = self.fraction is not None and start.fraction is not None
        fraction = self.fraction - start.fraction if known else None  # type: ignore[operator]
        return Progress(self.step - start.step, self.epoch - start.epoch, fraction)


@dataclass(frozen=True)
class Duration:
    """A stretch of training: ``0.1`` (a tenth of it), ``"500 steps"`` (optimiser steps), ``"2 epochs"``.

    Example:
        >>> Duration.parse("2 epochs", "every")
        Duration(amount=2.0, unit='epochs')
        >>> Duration.parse(0.1, "every").count(Progress(step=30, epoch=0.3, fraction=0.3))
        3
    """

    amount: float
    unit: Literal["fraction", "steps", "epochs"]

    @classmethod
    def parse(cls, value: float | str, argument: str) -> Duration:
        """Read a duration from what a person wrote.

        Args:
            value: A fraction of training in (0, 1), or a number followed by ``steps`` or ``epochs``.
            argument: The argument's name, for the error.

        Raises:
            ValueError: The value has no unit, is not positive, or is a fraction outside (0, 1).
        """
        remedy = 'write a fraction of training (0.1), "500 steps" or "2 epochs"'
        if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
            amount, unit = float(match[1]), match[2]
            if amount > 0 and (amount == int(amount) or unit.startswith("epoch")):
                return cls(amount, "steps" if unit.startswith("step") else "epochs")
        elif isinstance(value, float) and 0 < value < 1:
            return cls(value, "fraction")
        elif isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"{argument}={value!r} has no unit: {remedy}")
        raise ValueError(f"{argument}={value!r} is not a stretch of training: {remedy}")

    def count(self, progress: Progress) -> int:
        """How many whole stretches of this length have passed.

        Raises:
            ValueError: The duration is a fraction and training has no end.
        """
        if self.unit == "steps":
            return progress.step // int(self.amount)
        return math.floor(self.share(progress) + _ROUNDING)

    def share(self, progress: Progress) -> float:
        """How many stretches of this length have passed, the running one in part.

        Raises:
            ValueError: The duration is a fraction and training has no end.
        """
        if self.unit == "steps":
            return progress.step / self.amount
        if self.unit == "epochs":
            return progress.epoch / self.amount
        if progress.fraction is None:
            raise ValueError(
                f"{self.amount} is a fraction of a training that has no end: "
                'set Trainer(max_epochs=...) or Trainer(max_steps=...), or write "500 steps" or "2 epochs"'
            )
        return progress.fraction / self.amount

    def steps(self, *, steps_per_epoch: float, total_steps: float) -> float:
        """The duration in optimiser steps."""
        return self.amount * {"steps": 1.0, "epochs": steps_per_epoch, "fraction": total_steps}[self.unit]

    def times(self, count: int) -> Duration:
        """A duration ``count`` times as long; a fraction may thus exceed 1, which never comes."""
        return Duration(self.amount * count, self.unit)

    def __str__(self) -> str:
        return f"{self.amount:g} of training" if self.unit == "fraction" else f"{self.amount:g} {self.unit}"
