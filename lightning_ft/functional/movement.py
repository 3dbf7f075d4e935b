"""Movement pruning: which weights are kept, by learnt scores or by magnitude, and how many of them when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ft.functional.masked_weights import Masked, Mode

Scope = Literal["matrix", "global"]
"""Among what the highest are looked for: each matrix for itself, or all together."""

FEWEST = 0.005
"""Share of each matrix that a threshold leaves at least, as in the authors' code."""


def cubic(start: float, end: float, position: float) -> float:
    """``end`` + (``start`` − ``end``)(1 − x)³, with x the position within [0, 1]: fast at first, slow at the end.

    Example:
        >>> round(cubic(1.0, 0.15, 0.5), 5)
        0.25625

    Reference:
        Zhu and Gupta 2018, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression".
    """
    return end + (start - end) * (1 - min(1.0, max(0.0, position))) ** 3


def kept_count(share: float, total: int) -> int:
    """⌊share · total⌋, however the product is rounded: 0.29 of 100 are 29."""
    return math.floor(share * total + 1e-6)


def top_mask(values: Tensor, count: int, ties: Tensor | None = None) -> Tensor:
    """True at exactly ``count`` highest values; where they are equal, at those with the larger ``ties``.

    One selection, or two where values are equal; no sort of the whole, and nothing that a GPU's host waits for.

    Args:
        values: Of any shape.
        count: How many.
        ties: Non-negative values of the same shape. (Scores all start at 0: |W| then says which weights go.)

    Example:
        >>> top_mask(torch.tensor([0.0, 2.0, 0.0, -1.0]), 2, torch.tensor([0.1, 0.1, 0.3, 9.0])).tolist()
        [False, True, True, False]
    """
    flat = values.detach().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if count <= 0:
        return mask.view(values.shape)
    if count >= flat.numel():
        return mask.fill_(True).view(values.shape)
    lowest = _kth_largest(flat, count)
    reached = flat >= lowest
    if flat.device.type == "cpu" and int(reached.sum()) == count:  # elsewhere the host would have to wait for it
        return reached.view(values.shape)
    if ties is not None:
        at_lowest = torch.where(reached, ties.detach().flatten().to(flat.dtype), -1.0)
        flat = torch.where(flat > lowest, math.inf, at_lowest)
    return mask.index_fill_(0, torch.topk(flat, count, sorted=False).indices, True).view(values.shape)


def _kth_largest(flat: Tensor, count: int) -> Tensor:
    # On GPUs kthvalue works with one block of threads, and topk with many.
    if flat.device.type == "cpu":
        return torch.kthvalue(flat, flat.numel() - count + 1).values
    return torch.topk(flat, count, sorted=False).values.amin()


@torch.no_grad()
def update_masks(weights: Sequence[Masked], mode: Mode, level: float, scope: Scope = "matrix") -> None:
    """Choose anew which weights are kept.

    Args:
        weights: Of :func:`~lightning_ft.functional.masked_weights.masked_weights`.
        mode: ``"hard"``: those of the ⌊level · n⌋ highest scores, the larger weight where scores are equal;
            ``"magnitude"``: the ⌊level · n⌋ largest; ``"soft"``: those with σ(S) > level, but :data:`FEWEST` at least.
        level: The share that is kept, or the threshold.
        scope: Whether n counts the weights of each matrix or of all of them.
    """
    if mode == "soft":
        for masked in weights:
            _above(masked, level)
    elif scope == "matrix":
        for masked in weights:
            count = kept_count(level, masked.weight.numel())
            masked.by.mask.copy_(_highest(masked, count))
            masked.by.kept.fill_(count)
    else:
        total = kept_count(level, sum(masked.weight.numel() for masked in weights))
        magnitudes = torch.cat([masked.weight.detach().abs().float().flatten() for masked in weights])
        ranked = magnitudes if mode == "magnitude" else torch.cat([_scores(masked).flatten() for masked in weights])
        chosen = top_mask(ranked, total, None if mode == "magnitude" else magnitudes)
        parts = torch.split(chosen, [masked.weight.numel() for masked in weights])
        for masked, part in zip(weights, parts, strict=True):
            masked.by.mask.copy_(part.view_as(masked.by.mask))
            masked.by.kept.copy_(part.sum())


def _scores(masked: Masked) -> Tensor:
    assert masked.by.scores is not None
    return masked.by.scores.detach()


def _highest(masked: Masked, count: int) -> Tensor:
    magnitudes = masked.weight.detach().abs()
    return top_mask(magnitudes, count) if masked.by.scores is None else top_mask(_scores(masked), count, magnitudes)


def _above(masked: Masked, threshold: float) -> None:
    # S > logit(τ) where σ(S) > τ: no sigmoid, whose rounding would tell less.
    scores, logit = _scores(masked), math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf
    fewest = max(1, math.ceil(FEWEST * scores.numel()))
    chosen = (scores > logit) | _highest(masked, fewest)
    masked.by.mask.copy_(chosen)
    masked.by.kept.copy_(chosen.sum())


@torch.no_grad()
def add_penalty_grad_(scores: Sequence[nn.Parameter], strength: float, matrices: int, scale: Tensor | None) -> None:
    """Add the gradient of ``strength`` · mean σ(S), the mean over ``matrices`` of each matrix's mean.

    Args:
        scores: S of some of the matrices.
        strength: λ.
        matrices: The number of all of them.
        scale: What the gradients are scaled with at the moment (fp16); None for 1.
    """
    held = [p for p in scores if p.grad is not None]
    if not held or strength == 0:
        return
    each = [torch.sigmoid(p) for p in held]
    slopes = [s * (1 - s) * (strength / (matrices * s.numel())) for s in each]
    if scale is not None:
        torch._foreach_mul_(slopes, scale)
    torch._foreach_add_([p.grad for p in held if p.grad is not None], slopes)
