from __future__ import annotations

import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from lightning_ft.metrics import MatthewsCorrCoef, matthews_from_confusion


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_equals_scikit_learn_over_batches(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, classes, (60,), generator=generator)
    predicted = torch.where(torch.rand(60, generator=generator) < 0.5, true, torch.zeros_like(true))
    metric = MatthewsCorrCoef(classes)
    for part in range(0, 60, 7):
        metric.update(predicted[part : part + 7], true[part : part + 7])
    assert metric.compute().item() == pytest.approx(matthews_corrcoef(true, predicted), abs=1e-6)


@pytest.mark.parametrize("confusion", [[[0, 721], [0, 1043]], [[300, 0], [700, 0]], [[5, 0], [0, 0]], [[0, 0], [0, 0]]])
def test_constant_predictions_or_targets_give_zero(confusion: list[list[int]]) -> None:
    assert matthews_from_confusion(torch.tensor(confusion)).item() == 0


def test_large_counts_do_not_overflow() -> None:
    confusion = torch.tensor([[3_000_000_000, 1_000_000_000], [1_000_000_000, 3_000_000_000]])
    assert matthews_from_confusion(confusion).item() == pytest.approx(0.5)
