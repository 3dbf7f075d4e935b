import pytest
import torch
import torch.nn.functional as F

from lightning_ft.metrics.pattern_scores import PatternScores


def test_over_batches_as_over_all_rows() -> None:
    scores, target = torch.randn(11, 3, 4), torch.randint(0, 4, (11,))
    metric = PatternScores(3)
    for part in (slice(0, 2), slice(2, 9), slice(9, 11)):
        metric.update(scores[part], target[part])
    values = metric.compute()
    assert list(values) == [f"{name}_pattern{i}" for i in range(3) for name in ("accuracy", "loss")]
    for i in range(3):
        torch.testing.assert_close(values[f"loss_pattern{i}"], F.cross_entropy(scores[:, i], target))
        assert values[f"accuracy_pattern{i}"] == (scores[:, i].argmax(-1) == target).float().mean()


def test_no_rows() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert set(map(float, PatternScores(2).compute().values())) == {0.0}
