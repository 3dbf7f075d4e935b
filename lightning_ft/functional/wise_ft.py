"""WiSE-FT: weights between the pretrained and the fine-tuned ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ft.core.sharding import local


@torch.no_grad()
def interpolate_weights(
    parameters: Sequence[Tensor], pretrained: Sequence[Tensor], tuned: Sequence[Tensor], alpha: float
) -> None:
    """θ ← (1 − α) θ⁰ + α θ_ft, in place; computed in fp32, and bit for bit θ⁰ at α = 0 and θ_ft at α = 1.

    Elementwise, so that of sharded parameters each process writes its own part.

    Args:
        parameters: What is written.
        pretrained: θ⁰, in the same order; on any device.
        tuned: θ_ft, copies that share no memory with ``parameters``.
        alpha: α, in [0, 1].

    Raises:
        ValueError: α is outside [0, 1].

    Example:
        >>> theta = torch.zeros(2)
        >>> interpolate_weights([theta], [torch.tensor([0.0, 4.0])], [torch.tensor([1.0, 2.0])], 0.25)
        >>> theta
        tensor([0.2500, 3.5000])

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be in [0, 1]")
    for target, start, end in zip(map(local, parameters), map(local, pretrained), map(local, tuned), strict=True):
        if alpha in (0, 1):
            target.copy_(end if alpha else start)
        else:
            wide = torch.promote_types(end.dtype, torch.float32)
            target.copy_(torch.lerp(start.to(end.device, wide), end.to(wide), alpha))
