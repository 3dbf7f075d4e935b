from __future__ import annotations

import math

import pytest
import torch

from lightning_ft.functional.temporal_ensembling import PredictionAverages, consistency, ramp_up, squash
from tests.strangers import identical


def test_two_epochs_of_one_at_momentum_0_6() -> None:
    averages = PredictionAverages(0.6)
    for _ in range(2):
        averages.update([b"a"], torch.ones(1, 1))
    assert averages.values.item() == pytest.approx(0.64)
    target, known = averages.targets([b"a"])
    assert target.item() == pytest.approx(1)
    assert known.tolist() == [True]


def test_time_counts_the_epochs_in_which_an_example_was_seen() -> None:
    averages = PredictionAverages(0.6)
    z = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    averages.update([b"a", b"b"], z[:2])
    averages.update([b"c", b"a"], z[[2, 1]])
    targets, known = averages.targets([b"c", b"nobody", b"b", b"a"])
    assert known.tolist() == [True, False, True, True]
    torch.testing.assert_close(targets[0], z[2])  # its first epoch was the second: the target is what it said
    assert targets[1].tolist() == [0, 0]
    torch.testing.assert_close(targets[2], z[1])
    torch.testing.assert_close(targets[3], (0.6 * 0.4 * z[0] + 0.4 * z[1]) / (1 - 0.36))
    assert averages.seen.tolist() == [2, 1, 1]


def test_state_goes_on() -> None:
    one, other = PredictionAverages(0.5), PredictionAverages(0.5)
    one.update([b"a", b"b"], torch.rand(2, 3))
    other.load_state_dict(one.state_dict())
    z = torch.rand(2, 3)
    for averages in (one, other):
        averages.update([b"b", b"c"], z)
    assert identical(one.state_dict(), other.state_dict())
    assert identical(PredictionAverages().state_dict()["values"], torch.zeros(0, 0))


def test_ramp_and_term() -> None:
    assert [ramp_up(s) for s in (0, 0.5, 1, 3)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    logits = torch.randn(4, 3, requires_grad=True)
    targets, known = torch.rand(4, 3), torch.tensor([True, False, True, False])
    now = squash(logits, "single_label")
    expected = (torch.softmax(logits, -1) - targets)[[0, 2]].square().sum() / 12
    torch.testing.assert_close(consistency(now, targets, known), expected)
    assert squash(torch.zeros(2, 3), "multi_label").tolist() == [[0.5] * 3] * 2
    assert squash(torch.tensor([2.0, 3.0]), "regression").tolist() == [[2.0], [3.0]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"momentum=1.0 must lie in \[0, 1\)"):
        PredictionAverages(1.0)
    averages = PredictionAverages()
    with pytest.raises(ValueError, match="each example once"):
        averages.update([b"a", b"a"], torch.zeros(2, 1))
    averages.update([b"a"], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="predictions have 3 labels, and 2 before"):
        averages.update([b"a"], torch.zeros(1, 3))
