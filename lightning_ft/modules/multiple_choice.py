"""The right one of several choices for a context."""

from __future__ import annotations

import os
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from typing_extensions import override

from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.modules.base import Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture


class MultipleChoice(TransformerModule):
    """Fine-tune a pretrained encoder to choose among texts that continue, answer or explain another one.

    Each pair of context and choice gets one score; the loss is the cross-entropy of a softmax over the choices of a
    row. The model does not fix how many there are: it may be trained on four and used with two. Metric, logged as
    ``val_…`` and ``test_…`` over whole epochs: ``accuracy`` (share of rows whose right choice scores highest).

    Batches are mappings with ``input_ids`` and ``attention_mask``, both ``(batch, choices, width)``, and ``labels``,
    the number of the right choice, from 0: ``(batch,)``.

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` for random weights. Its architecture must have a head for
            multiple choice; encoders do.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of the new head's weights.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: A number is out of range, or the architecture has no head for multiple choice.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        *,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        head_seed: int = 0,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        arguments = dict(locals())
        from transformers import AutoModelForMultipleChoice

        super().__init__(
            AutoModelForMultipleChoice, pretrained, arguments=arguments, metrics={"accuracy": MeanMetric()}
        )

    @override
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """The mean loss over a batch, in fp32, and its rows."""
        return F.cross_entropy(outputs.float(), batch["labels"]), len(outputs)

    @override
    def likelihood(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """The right choice of each row."""
        return Likelihood(outputs.float(), batch.get("labels"))

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Tensor, batch: Batch) -> None:
        metrics.update((outputs.argmax(-1) == batch["labels"]).float())

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """Columns for each row of the batch.

        Returns:
            ``choice`` (its number, from 0), ``score`` (its probability among the choices), and ``probabilities`` (a
            list in the order of the choices).
        """
        values = self(batch).float().softmax(-1)
        best = values.max(-1)
        return {
            "choice": best.indices.tolist(),
            "score": best.values.tolist(),
            "probabilities": values.tolist(),
        }
