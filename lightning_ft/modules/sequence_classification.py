"""One label, several labels or a number for a text or a pair of texts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAccuracy,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)
from torchmetrics.regression import MeanSquaredError, SpearmanCorrCoef
from typing_extensions import override

from lightning_ft.functional.likelihood import Family, Likelihood
from lightning_ft.metrics.degenerate import MacroAUROC, MacroMultilabelAUROC, Pearson
from lightning_ft.metrics.matthews import MatthewsCorrCoef
from lightning_ft.modules.base import Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture

Problem = Literal["single_label", "multi_label", "regression"]
PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_FAMILIES: dict[Problem, Family] = {
    "single_label": "categorical",
    "multi_label": "bernoulli",
    "regression": "gaussian",
}


class SequenceClassification(TransformerModule):
    """Fine-tune a pretrained model to classify texts or pairs of texts, or to score them.

    Loss: cross-entropy (single_label), binary cross-entropy for each label (multi_label), squared error
    (regression). Metrics, logged as ``val_…`` and ``test_…`` over whole epochs: ``accuracy`` (share of right
    predictions), ``f1``, ``precision``, ``recall``, ``auroc`` (macro averages over labels, one against the rest)
    and, for single_label, ``mcc``; ``pearson``, ``spearman`` and ``mse`` for regression.

    Batches are mappings with ``input_ids`` and ``attention_mask``, both ``(batch, seq)``, and ``labels``: class
    indices ``(batch,)``, 0/1 floats ``(batch, labels)``, or floats ``(batch,)``.

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` for random weights.
        labels: Names of the labels, in the order of their indices. The CLI takes them from the data.
        num_labels: Number of labels, where they have no names.
        problem: ``"single_label"``, ``"multi_label"`` or ``"regression"``.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        label_smoothing: Share of the target spread over all labels (single_label).
        class_weights: Weight of each label in the loss (single_label), or of its positives (multi_label).
        head_seed: Seed of the new head's weights.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: The labels do not fit the problem, or a number is out of range.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        labels: Sequence[str] | None = None,
        *,
        num_labels: int | None = None,
        problem: Problem = "single_label",
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        head_seed: int = 0,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        # Lists, whatever came: Lightning compares constructor arguments by ==, which arrays answer with an array.
        labels = None if labels is None else [str(name) for name in labels]
        class_weights = None if class_weights is None else [float(weight) for weight in class_weights]
        arguments = dict(locals())
        names = _label_names(labels, num_labels, problem)
        from transformers import AutoModelForSequenceClassification

        super().__init__(
            AutoModelForSequenceClassification,
            pretrained,
            arguments=arguments,
            metrics=_metrics(problem, len(names)),
            config_updates={
                "num_labels": len(names),
                "id2label": dict(enumerate(names)),
                "label2id": {name: i for i, name in enumerate(names)},
                "problem_type": PROBLEM_TYPES[problem],
            },
        )
        if not 0 <= label_smoothing < 1 or (label_smoothing and problem != "single_label"):
            raise ValueError(
                f"label_smoothing={label_smoothing!r} must lie in [0, 1), and be 0 unless problem is single_label"
            )
        if class_weights is not None and (problem == "regression" or len(class_weights) != len(names)):
            raise ValueError(
                f"class_weights has {len(class_weights)} values for problem={problem!r} with {len(names)} labels: "
                "pass one for each label, in their order"
            )
        self.labels = names
        self.problem: Problem = problem
        self.label_smoothing = label_smoothing
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    @override
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """The mean loss over a batch, in fp32, and its rows."""
        logits, labels = outputs.float(), batch["labels"]
        weights = None if self.class_weights is None else self.class_weights.float()
        if self.problem == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.float()), len(labels)
        if self.problem == "multi_label":
            return F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weights), len(labels)
        return F.cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing), len(labels)

    @override
    def likelihood(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """One label a row, yes or no for each label, or a number with an error of variance 1."""
        labels = batch.get("labels")
        if labels is not None and self.problem == "regression":
            labels = labels.view(-1, 1)
        return Likelihood(outputs.float(), labels, _FAMILIES[self.problem])

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Tensor, batch: Batch) -> None:
        labels = batch["labels"]
        metrics.update(self.probabilities(outputs), labels.int() if self.problem == "multi_label" else labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax or sigmoid of the logits, shape ``(batch, labels)``; for regression the scores, ``(batch,)``."""
        logits = logits.float()
        if self.problem == "regression":
            return logits.squeeze(-1)
        return logits.softmax(-1) if self.problem == "single_label" else logits.sigmoid()

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """Columns for each row of the batch.

        Returns:
            ``label`` (a name; a list of names for multi_label; absent for regression), ``score`` (its probability;
            the highest one for multi_label; the value for regression), and ``probabilities`` (a list in the order of
            the labels; absent for regression).
        """
        values = self.probabilities(self(batch))
        if self.problem == "regression":
            return {"score": values.tolist()}
        if self.problem == "single_label":
            named: list[Any] = [self.labels[i] for i in values.argmax(-1).tolist()]
        else:
            named = [[n for n, p in zip(self.labels, row, strict=True) if p > 0.5] for row in values.tolist()]
        return {"label": named, "score": values.max(-1).values.tolist(), "probabilities": values.tolist()}


def _label_names(labels: Sequence[str] | None, num_labels: int | None, problem: Problem) -> list[str]:
    if problem not in PROBLEM_TYPES:
        raise ValueError(f"problem={problem!r} must be one of {list(PROBLEM_TYPES)}")
    if problem == "regression":
        if labels or num_labels not in (None, 1):
            raise ValueError(f"labels={labels!r}, num_labels={num_labels!r}: regression has one output and no labels")
        return ["score"]
    names = list(labels) if labels else [f"LABEL_{i}" for i in range(num_labels or 0)]
    if labels and num_labels not in (None, len(names)):
        raise ValueError(f"num_labels={num_labels} contradicts labels, which names {len(names)}: pass one of them")
    if len(set(names)) != len(names):
        raise ValueError(f"labels={names} names a label twice")
    if len(names) < (2 if problem == "single_label" else 1):
        raise ValueError(
            f"labels={labels!r}, num_labels={num_labels!r}: problem={problem!r} needs two labels or more (one for "
            "multi_label). Pass labels=[...] in the order of their indices, or num_labels"
        )
    return names


def _metrics(problem: Problem, n: int) -> dict[str, Metric]:
    if problem == "regression":
        with warnings.catch_warnings():
            # Ranks need all predictions: no user of ours can act on being told so.
            warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
            return {"pearson": Pearson(), "spearman": SpearmanCorrCoef(), "mse": MeanSquaredError()}
    if problem == "multi_label":
        return {
            "accuracy": MultilabelAccuracy(n, average="micro"),
            "f1": MultilabelF1Score(n, average="macro"),
            "precision": MultilabelPrecision(n, average="macro"),
            "recall": MultilabelRecall(n, average="macro"),
            "auroc": MacroMultilabelAUROC(n),
        }
    return {
        "accuracy": MulticlassAccuracy(n, average="micro"),
        "f1": MulticlassF1Score(n, average="macro"),
        "precision": MulticlassPrecision(n, average="macro"),
        "recall": MulticlassRecall(n, average="macro"),
        "auroc": MacroAUROC(n),
        "mcc": MatthewsCorrCoef(n),
    }
