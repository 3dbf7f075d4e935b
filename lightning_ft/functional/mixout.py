"""Mixout: a weight in which some input units are put back to their pretrained values."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Per = Literal["column", "element"]
"""What one draw decides: an input unit with all its outgoing weights, or one weight."""


def check_mixout(p: float, per: Per) -> None:
    """Refuse bad arguments.

    Raises:
        ValueError: ``p`` is outside [0, 1); ``per`` is unknown.
    """
    if not 0 <= p < 1:
        raise ValueError(
            f"p={p!r} must be in [0, 1), the share of input units put back to θ⁰: 0.7 to 0.9 in the paper, 0.1 to start"
        )
    if per not in get_args(Per):
        raise ValueError(f'per={per!r} must be "column" (one draw an input unit) or "element" (one a weight)')


def mixout(
    weight: Tensor,
    reference: Tensor,
    p: float,
    *,
    per: Per = "column",
    output_dim: int = -2,
    legacy_gradient: bool = False,
) -> Tensor:
    """W̃ = [M⊙W + (1−M)⊙W⁰ − pW⁰] / (1−p), with M ~ Bernoulli(1−p): W in the mean, W⁰ where M is 0.

    Computed as W⁰ + (W − W⁰) · M/(1−p), which is the same, in one pass. Its derivative is M/(1−p). The draws come from
    torch's global generator of the weight's device.

    Args:
        weight: W, shape (..., out, in).
        reference: W⁰, of the same shape.
        p: Probability with which an input unit is put back, in [0, 1).
        per: ``"column"``, one draw for all outgoing weights of an input unit, as published; ``"element"``, one a
            weight, which the paper calls mixconnect.
        output_dim: The dimension of output units, which share a draw: -2 as in ``nn.Linear``, -1 where the weight is
            transposed. Further dimensions have their own draws.
        legacy_gradient: The derivative is M, as in the authors' code, which forgets the 1/(1−p).

    Returns:
        W̃; ``weight`` itself where ``p`` is 0.

    Raises:
        ValueError: ``p`` or ``per`` is out of range.

    Example:
        >>> weight, reference = torch.full((1, 1000), 3.0), torch.ones(1, 1000)
        >>> mixout(weight, reference, 0.5).unique()
        tensor([1., 5.])

    Reference:
        Lee, Cho and Kang 2020, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models".
    """
    check_mixout(p, per)
    if p == 0:
        return weight
    shape = list(weight.shape)
    if per == "column":
        shape[output_dim] = 1
    share = torch.empty(shape, dtype=weight.dtype, device=weight.device).bernoulli_(1 - p).div_(1 - p)
    if legacy_gradient:
        mixed: Tensor = _LegacyMixout.apply(weight, reference, share, p)  # type: ignore[no-untyped-call]
        return mixed
    return torch.lerp(reference, weight, share)


class _LegacyMixout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, reference: Tensor, share: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(share)
        ctx.keep = 1 - p
        return torch.lerp(reference, weight, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (share,) = ctx.saved_tensors
        return gradients[0] * (share * ctx.keep), None, None, None
