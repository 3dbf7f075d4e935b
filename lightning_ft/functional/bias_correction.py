"""What Adam's bias correction amounts to at a step."""

from __future__ import annotations

import math
from typing import NamedTuple


class Uncorrected(NamedTuple):
    """Factors on a corrected Adam's learning rate and ε with which its step is the uncorrected one."""

    rate: float
    eps: float


def uncorrected(beta1: float, beta2: float, step: int) -> Uncorrected:
    """Factors that turn Adam's corrected step into the uncorrected one: c₁/√c₂ on η, and 1/√c₂ on ε.

    With cᵢ = 1 − βᵢᵗ, the corrected step is η(m/c₁)/(√(v/c₂) + ε), and the uncorrected one ηm/(√v + ε). The factor on η
    is 3.16 at t = 1, has its peak of 6.57 at t = 12, and is 1.26 at t = 1000 (β = 0.9, 0.999).

    Args:
        beta1: β₁ of m, in [0, 1).
        beta2: β₂ of v, in [0, 1).
        step: t, from 1.

    Example:
        >>> round(uncorrected(0.9, 0.999, 1).rate, 4)
        3.1623

    Reference:
        Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", section 3.
    """
    root = math.sqrt(1 - beta2**step)
    return Uncorrected((1 - beta1**step) / root, 1 / root)
