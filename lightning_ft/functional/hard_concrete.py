"""Hard concrete gates: numbers in [0, 1] that are exactly 0 or 1 with a probability that can be learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HardConcrete:
    """The distribution of a gate z with parameter a: s = σ((ln u − ln(1−u) + a)/β), z = clip(s(r−l) + l, 0, 1).

    u is uniform on (0, 1). P(z ≠ 0) = σ(a − β ln(−l/r)), and without noise z = clip(σ(a)(r−l) + l, 0, 1).

    Args:
        lower: l, below 0.
        upper: r, above 1.
        temperature: β, above 0: the smaller, the nearer z is to 0 or 1.
        start: a at the start.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> gates = HardConcrete()
        >>> round(gates.open_probability(torch.tensor(5.0)).item(), 5)
        0.99331

    Reference:
        Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".
    """

    lower: float = -1.5
    upper: float = 1.5
    temperature: float = 1.0
    start: float = 5.0

    def __post_init__(self) -> None:
        if not self.lower < 0:
            raise ValueError(f"lower={self.lower!r} must be below 0, so that a gate can be shut (-1.5, or -0.1)")
        if not self.upper > 1:
            raise ValueError(f"upper={self.upper!r} must be above 1, so that a gate can be wide open (1.5, or 1.1)")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be above 0 (1, or 2/3)")
        if not math.isfinite(self.start):
            raise ValueError(f"start={self.start!r} must be a finite number, such as 5: P(z ≠ 0) is then 0.993")

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """P(z ≠ 0) of gates with parameter a."""
        return torch.sigmoid(log_alpha - self.temperature * math.log(-self.lower / self.upper))

    def sample(self, log_alpha: Tensor, noise: Tensor) -> Tensor:
        """z for noise ln u − ln(1−u), see :func:`logistic_noise`."""
        return self.stretch(torch.sigmoid((log_alpha + noise) / self.temperature))

    def value(self, log_alpha: Tensor) -> Tensor:
        """z without noise, as it is used in evaluation."""
        return self.stretch(torch.sigmoid(log_alpha))

    def stretch(self, concrete: Tensor) -> Tensor:
        """Clip(s(r−l) + l, 0, 1)."""
        return (concrete * (self.upper - self.lower) + self.lower).clamp(0, 1)


def logistic_noise(like: Tensor, key: int) -> Tensor:
    """Of the shape, type and device of a tensor, ln u − ln(1−u), a function of the key alone on each kind of device.

    Example:
        >>> bool((logistic_noise(torch.zeros(3), 1) == logistic_noise(torch.zeros(3), 1)).all())
        True
    """
    if like.is_meta:
        return torch.empty_like(like)
    generator = torch.Generator(like.device).manual_seed(key)
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return uniform.logit_(eps=1e-7)


class ExpectedL0:
    """λ E‖z‖₀, the expected number of open gates: Ω = λ Σₜ P(group gate t is open) Σᵢ P(gate i of t is open).

    A value is open when its own gate and its group's both are, and they are independent: their probabilities multiply.
    (The authors' code adds the two sums, which counts gates instead of values.) ``add_grad_`` is the gradient of
    ``value``, without autograd.

    Args:
        gates: The distribution.
        strength: λ, a value's price.

    Raises:
        ValueError: ``strength`` is negative.

    Example:
        >>> penalty = ExpectedL0(HardConcrete(), 0.1)
        >>> round(penalty.value([torch.full((10,), 5.0)], [None]).item(), 4)
        0.9933
    """

    def __init__(self, gates: HardConcrete, strength: float) -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength!r} must be 0 or more: the price of an open gate (1.25e-7)")
        self.gates = gates
        self.strength = strength

    def value(self, elements: Sequence[Tensor], groups: Sequence[Tensor | None]) -> Tensor:
        """Ω, a differentiable scalar.

        Args:
            elements: a of the gates of each tensor.
            groups: a of each tensor's own gate, of one value; None where it has none.
        """
        terms = [
            self.gates.open_probability(a).sum() * (1 if g is None else self.gates.open_probability(g).sum())
            for a, g in zip(elements, groups, strict=True)
        ]
        return self.strength * torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def add_grad_(
        self, elements: Sequence[Tensor], groups: Sequence[Tensor | None], *, scale: Tensor | None = None
    ) -> None:
        """Add the gradient of Ω to ``.grad``. Gates without a gradient take no part, as in the optimiser.

        Args:
            elements: a of the gates of each tensor.
            groups: a of each tensor's own gate, or None.
            scale: The loss scale, where the gradients are still scaled (a 0-d tensor: no host copy).
        """
        for element, group in zip(elements, groups, strict=True):
            if element.grad is None or self.strength == 0:
                continue
            price: Any = self.strength if scale is None else self.strength * scale.to(element.device)
            chance = self.gates.open_probability(element)
            whole = None if group is None else self.gates.open_probability(group)
            if group is not None and group.grad is not None:
                assert whole is not None
                group.grad.add_(chance.sum() * whole * (1 - whole) * price)
            slope = chance.mul_(1 - chance).mul_(price)
            element.grad.add_(slope if whole is None else slope.mul_(whole))
