"""Cross-entropy over the tokens that have a label."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over labelled tokens, in fp32, and their number; 0 of none, where a plain mean is NaN.

    Args:
        logits: ``(..., classes)``.
        labels: ``(...)``, -100 where there is none.
        label_smoothing: Share of the target spread over all classes.

    Example:
        >>> import torch
        >>> mean, tokens = token_cross_entropy(torch.zeros(3, 4), torch.tensor([1, -100, 0]))
        >>> round(mean.item(), 4), int(tokens), token_cross_entropy(torch.zeros(1, 4), torch.tensor([-100]))[0].item()
        (1.3863, 2, 0.0)
    """
    tokens = (labels != -100).sum()
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    return total / tokens.clamp(min=1), tokens
