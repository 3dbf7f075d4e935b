"""Perturbation methods over the project's own heads, with accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ft.callbacks.free_lb import FreeLB
from lightning_ft.callbacks.r_drop import RDrop
from lightning_ft.modules import CausalLM, MultipleChoice, QuestionAnswering, SequenceClassification
from lightning_ft.modules.checkpoint import Architecture
from tests.perturbing import batch, trainer
from tests.pretrained import config, tokenizer

ROWS = batch()
INPUTS = {name: ROWS[name] for name in ("input_ids", "attention_mask")}
CHOICES = {name: value.view(2, 2, -1) for name, value in INPUTS.items()}
ENDS = {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([1, 2, 3, 3])}


def bert() -> Architecture:
    return Architecture(config("bert"), tokenizer("bert"))


HEADS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "single-label": (lambda: SequenceClassification(bert(), num_labels=2), ROWS),
    "regression": (
        lambda: SequenceClassification(bert(), problem="regression"),
        {**INPUTS, "labels": torch.tensor([0.0, 1.0, 2.0, 3.0])},
    ),
    "multi-label": (
        lambda: SequenceClassification(bert(), num_labels=2, problem="multi_label"),
        {**INPUTS, "labels": torch.eye(4)[:, :2]},
    ),
    "answers": (lambda: QuestionAnswering(bert()), {**INPUTS, **ENDS}),
    "choices": (lambda: MultipleChoice(bert()), {**CHOICES, "labels": torch.tensor([0, 1])}),
    "causal-lm": (
        lambda: CausalLM(Architecture(config("gpt2"), tokenizer("gpt2"))),
        {**INPUTS, "labels": INPUTS["input_ids"].masked_fill(INPUTS["attention_mask"] == 0, -100)},
    ),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("make", [RDrop, FreeLB])
def test_a_head_trains(head: str, make: Callable[[], Any]) -> None:
    build, rows = HEADS[head]
    module = build()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = trainer(make(), accumulate_grad_batches=2)
    run.fit(module, DataLoader([rows] * 4, batch_size=None))
    assert run.global_step == 2
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2
    assert all(p.isfinite().all() for p in module.parameters())
