"""Matthews correlation that is right when every prediction is the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override


def matthews_from_confusion(confusion: Tensor) -> Tensor:
    """Matthews correlation coefficient of a confusion matrix; 0 where predictions or targets are constant.

    MCC = (c·s − Σ pₖtₖ) / √((s² − Σ pₖ²)(s² − Σ tₖ²)), with c correct of s samples, pₖ predicted and tₖ true counts
    of class k.

    Args:
        confusion: Counts, shape ``(classes, classes)``, rows true and columns predicted.

    Example:
        >>> matthews_from_confusion(torch.tensor([[0, 721], [0, 1043]])).item()
        0.0

    Reference:
        Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    counts = confusion.cpu().double()  # not every accelerator has float64
    true, predicted = counts.sum(1), counts.sum(0)
    total = counts.sum()
    covariance = counts.trace() * total - true @ predicted
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return torch.where(spread > 0, covariance / spread.clamp(min=1).sqrt(), 0.0).float().to(confusion.device)


class MatthewsCorrCoef(MulticlassConfusionMatrix):
    """Matthews correlation over batches: :func:`matthews_from_confusion` of the summed confusion matrix.

    torchmetrics' own gives up to ±1 for constant predictions, where the coefficient is 0 by convention (as in
    scikit-learn): the very case by which a collapsed run is recognised.

    Args:
        num_classes: Number of classes, 2 or more.

    Example:
        >>> metric = MatthewsCorrCoef(num_classes=2)
        >>> metric.update(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 0]))
        >>> metric.compute().item()
        0.0
    """

    higher_is_better = True
    is_differentiable = False

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes)

    @override
    def compute(self) -> Tensor:
        return matthews_from_confusion(self.confmat)
