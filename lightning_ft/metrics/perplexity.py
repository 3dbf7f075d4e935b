"""Perplexity from the losses of batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class LossPerplexity(Metric):
    """exp(Σ lᵢ·nᵢ / Σ nᵢ), where lᵢ is the mean loss in nats over the nᵢ tokens of a batch.

    Not the mean of the batches' perplexities, nor the exponential of their mean loss: both weigh a batch with few
    tokens like one with many. NaN where there was no token.

    Example:
        >>> metric = LossPerplexity()
        >>> metric.update(torch.tensor(2.0).log(), 3)
        >>> metric.update(torch.tensor(32.0).log(), 1)
        >>> round(metric.compute().item(), 4)
        4.0
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    loss: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, loss: Tensor, tokens: Tensor | int) -> None:
        """Add a batch.

        Args:
            loss: Its mean loss, a scalar; without tokens it is ignored.
            tokens: Over how many tokens it is the mean.
        """
        # Not loss * 0, which is NaN for a mean over nothing.
        total = loss.detach().float() * tokens
        self.loss = self.loss + torch.where(torch.as_tensor(tokens, device=total.device) > 0, total, 0.0)
        self.tokens = self.tokens + tokens

    @override
    def compute(self) -> Tensor:
        return torch.exp(self.loss / self.tokens)
