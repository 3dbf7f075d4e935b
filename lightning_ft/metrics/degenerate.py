"""Metrics that torchmetrics gets wrong where validation rows lack something: a class, or any variation."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import PearsonCorrCoef
from torchmetrics.classification import MulticlassAUROC, MultilabelAUROC
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override


class MacroAUROC(MulticlassAUROC):
    """Mean one-against-rest AUROC over the classes that have rows in them and rows out of them; 0.5 if none has.

    torchmetrics' macro average counts a class that validation lacks as 0: a perfect ranking of two of three classes
    then scores 0.67.

    Args:
        num_classes: Number of classes.

    Example:
        >>> metric = MacroAUROC(3)
        >>> metric.update(torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]]), torch.tensor([0, 1]))
        >>> metric.compute().item()
        1.0
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    @override
    def compute(self) -> Tensor:
        counts = torch.bincount(dim_zero_cat(self.target), minlength=self.num_classes)
        return _mean_of((counts > 0) & (counts < counts.sum()), super().compute)


class MacroMultilabelAUROC(MultilabelAUROC):
    """Mean AUROC over the labels that some rows have and some have not; 0.5 if there is none such.

    Args:
        num_labels: Number of labels.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average="none")

    @override
    def compute(self) -> Tensor:
        target = dim_zero_cat(self.target)
        positive = target.sum(0)
        return _mean_of((positive > 0) & (positive < len(target)), super().compute)


class Pearson(PearsonCorrCoef):
    """Pearson's correlation; 0 where predictions or targets are constant, as for Spearman's, and not NaN.

    Example:
        >>> metric = Pearson()
        >>> metric.update(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]))
        >>> metric.compute().item()
        0.0
    """

    @override
    def compute(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The variance of predictions or target is close to zero")
            value: Tensor = super().compute()
        # A diverged model's NaN stays one.
        return value.nan_to_num(0.0) if torch.isfinite(self.mean_x + self.mean_y).all() else value


def _mean_of(there: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    if not there.any():
        return torch.tensor(0.5, device=there.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No (positive|negative) samples in targets")
        values = compute()
    mean: Tensor = values[there].mean()
    return mean
