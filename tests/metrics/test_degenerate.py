"""Metrics where validation rows lack a class, or any variation; elsewhere they are scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_ft.metrics.degenerate import MacroAUROC, MacroMultilabelAUROC, Pearson


def test_an_absent_class_does_not_count() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.55, 0.35, 0.1]])
    labels = torch.tensor([0, 1, 1, 0])
    metric = MacroAUROC(3)
    for part in (slice(0, 2), slice(2, 4)):
        metric.update(scores[part], labels[part])
    expected = [roc_auc_score(labels == c, scores[:, c]) for c in (0, 1)]
    assert metric.compute().item() == pytest.approx(sum(expected) / 2) == 1
    metric.reset()
    metric.update(scores, torch.zeros(4, dtype=torch.int64))
    assert metric.compute().item() == 0.5


def test_a_label_that_all_or_none_have_does_not_count() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(30, 4, generator=draw), torch.randint(0, 2, (30, 4), generator=draw)
    labels[:, 1], labels[:, 3] = 0, 1
    metric = MacroMultilabelAUROC(4)
    metric.update(scores, labels)
    expected = [roc_auc_score(labels[:, c], scores[:, c]) for c in (0, 2)]
    assert metric.compute().item() == pytest.approx(sum(expected) / 2)
    metric.reset()
    metric.update(scores, torch.ones_like(labels))
    assert metric.compute().item() == 0.5


@pytest.mark.parametrize(
    ("made", "wanted", "value"),
    [([1.0, 1, 1], [1.0, 2, 3], 0.0), ([1.0, 2, 3], [2.0, 2, 2], 0.0), ([1.0, 2, 3], [3.0, 2, 1], -1.0)],
)
def test_constants_do_not_correlate(made: list[float], wanted: list[float], value: float) -> None:
    metric = Pearson()
    metric.update(torch.tensor(made), torch.tensor(wanted))
    assert metric.compute().item() == pytest.approx(value)


def test_the_nan_of_a_diverged_model_stays() -> None:
    metric = Pearson()
    metric.update(torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert metric.compute().isnan()
