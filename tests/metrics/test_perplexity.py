"""Perplexity over batches equals that of all tokens at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.text import Perplexity

from lightning_ft.metrics.perplexity import LossPerplexity


def test_equals_torchmetrics_on_logits() -> None:
    ours, theirs = LossPerplexity(), Perplexity(ignore_index=-100)
    for rows in (1, 7, 3):
        logits, labels = torch.randn(rows, 5, 11), torch.randint(0, 11, (rows, 5))
        labels[0, 1:] = -100
        tokens = (labels != -100).sum()
        ours.update(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), tokens)
        theirs.update(logits, labels)
    torch.testing.assert_close(ours.compute(), theirs.compute())


def test_by_hand() -> None:
    metric = LossPerplexity()
    metric.update(torch.tensor(1.0), 30)
    metric.update(torch.tensor(4.0), torch.tensor(10))
    assert metric.compute().item() == pytest.approx(math.exp(70 / 40))
    metric.reset()
    metric.update(torch.tensor(0.0), 5)
    assert metric.compute().item() == 1.0


def test_batches_without_tokens_do_not_count() -> None:
    metric = LossPerplexity()
    metric.update(torch.tensor(math.nan), 0)
    metric.update(torch.tensor(2.0), 4)
    metric.update(torch.tensor(0.0), torch.tensor(0))
    assert metric.compute().item() == pytest.approx(math.exp(2))


def test_no_token_at_all_is_nan() -> None:
    metric = LossPerplexity()
    metric.update(torch.tensor(0.0), 0)
    assert math.isnan(metric.compute())


def test_states_of_processes_are_summed() -> None:
    # What a reduction over two processes does with the states: sums.
    whole, parts = LossPerplexity(), [LossPerplexity(), LossPerplexity()]
    for rank, (loss, tokens) in enumerate(((1.5, 3), (0.5, 9))):
        whole.update(torch.tensor(loss), tokens)
        parts[rank].update(torch.tensor(loss), tokens)
    assert all(fn.__name__ == "dim_zero_sum" for fn in whole._reductions.values())
    merged = LossPerplexity()
    merged.loss, merged.tokens = parts[0].loss + parts[1].loss, parts[0].tokens + parts[1].tokens
    merged.update(torch.tensor(0.0), 0)
    assert torch.equal(merged.compute(), whole.compute())
