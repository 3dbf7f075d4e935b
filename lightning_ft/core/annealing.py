"""The weight of a new objective that an old one hands over to, by the number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Curve = Literal["sigmoid", "linear"]


@dataclass(frozen=True)
class Annealing:
    """λ(t), from 0 to 1: 1/(1 + e^(−k(t − t₀))), or min(1, t/t₀).

    Args:
        t0: t₀, where the sigmoid is at one half, or the line at 1; in steps.
        k: Slope of the sigmoid, per step.
        curve: ``"sigmoid"`` or ``"linear"``.

    Raises:
        ValueError: ``t0`` or ``k`` is not positive; ``curve`` is unknown.

    Example:
        >>> round(Annealing(10, k=0.1)(1), 7)
        0.2890505
        >>> Annealing(10, curve="linear").rest(4)
        0.6
    """

    t0: float
    k: float = 0.1
    curve: Curve = "sigmoid"

    def __post_init__(self) -> None:
        for name in ("t0", "k"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value!r} must be positive and finite")
        if self.curve not in get_args(Curve):
            raise ValueError(f"curve={self.curve!r} must be one of {get_args(Curve)}")

    def __call__(self, t: float) -> float:
        """λ(t)."""
        return min(1.0, t / self.t0) if self.curve == "linear" else _sigmoid(self.k * (t - self.t0))

    def rest(self, t: float) -> float:
        """1 − λ(t), to its last digit where λ is nearly 1."""
        return max(0.0, 1 - t / self.t0) if self.curve == "linear" else _sigmoid(self.k * (self.t0 - t))


def _sigmoid(x: float) -> float:
    # Either form overflows on one side.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
