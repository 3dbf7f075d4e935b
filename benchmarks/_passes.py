"""What a callback adds to a step: its hooks alone, inside a fit whose optimiser steps nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _timing import loader, trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from lightning_ft.functional.learning_rates import decay_groups
from lightning_ft.modules import SequenceClassification

Batch = dict[str, Tensor]
Pass = Callable[[Trainer, SequenceClassification], object]


class _HooksOnly(torch.optim.Optimizer):
    """Steps nothing: what its ``step()`` takes is taken by the hooks on it."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()


class _Untrained(SequenceClassification):
    """Our module under an optimiser that steps nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return _HooksOnly(decay_groups(self.parameters(), self.weight_decay), {"lr": self.learning_rate})


def inside_fit(
    folder: Any, callback: Callback, action: Callable[[Trainer, SequenceClassification], object], batch: Batch
) -> None:
    """Call ``action`` inside a fit, after a step that left gradients on all parameters."""

    def probe(trainer: Trainer, module: SequenceClassification, *_: Any) -> None:
        action(trainer, module)

    module = _Untrained(folder, num_labels=2)
    trainer(callback, LambdaCallback(on_train_batch_end=probe)).fit(module, loader([batch]))


def step_hooks(trainer: Trainer, module: SequenceClassification) -> None:
    """What hangs on the optimiser's ``step``."""
    trainer.optimizers[0].step()


def random_batches(batch: int, length: int, count: int) -> list[Batch]:
    """Full rectangles of random tokens, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, length)
    return [
        {
            "input_ids": torch.randint(1000, 30000, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": torch.randint(0, 2, (batch,), generator=generator),
        }
        for _ in range(count)
    ]
