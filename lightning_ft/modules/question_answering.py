"""Answers to questions, as spans of the text that holds them."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_ft.functional.answer_reading import AnswerWindow, read_answer
from lightning_ft.functional.answer_spans import AnswerSpans, best_spans, lowest_of_rows
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.metrics.squad import Squad
from lightning_ft.modules.base import Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture

Logits = tuple[Tensor, Tensor]


class QuestionAnswering(TransformerModule):
    """Fine-tune a pretrained model to answer questions with a span of their context, or to say that it has no answer.

    Loss: the mean of the cross-entropies of the answer's first and last token over a window's tokens. The answer is the
    span with the highest start + end logit over all windows of a row (:func:`best_spans`). There is none if the lowest
    start + end logit of the CLS token over the windows exceeds it by more than a threshold, which is set at the end of
    each validation to the one of the highest F1 on it, and which checkpoints carry. Where validation holds no question
    without an answer, the threshold becomes infinite: every question is answered.

    Metrics, logged as ``val_…`` and ``test_…``: those of :class:`Squad`, ``exact``, ``f1`` and more, in percent. In
    validation they are measured at the threshold that it finds, in test at the one that stands.

    Training batches are mappings with ``input_ids`` and ``attention_mask``, both ``(windows, width)``, and
    ``start_positions`` and ``end_positions`` ``(windows,)``; positions of ``width`` or more are ignored. Other batches
    have ``example`` ``(windows,)``, ``cls`` ``(windows,)``, ``char_starts`` and ``char_ends`` ``(windows, width)``, and
    the lists ``context`` and ``answers``, see :class:`~lightning_ft.data.question_answering.QuestionAnsweringData`.

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` for random weights.
        n_best: Spans of each row in predictions.
        max_answer_length: Tokens of the longest answer.
        no_answer: Whether a question may have none. If false, every question is answered.
        no_answer_threshold: The threshold before the first validation.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of the new head's weights.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: A number is out of range.

    Reference:
        Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", sections 4.2 and 4.3.
    """

    no_answer_threshold: Tensor

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        *,
        n_best: int = 20,
        max_answer_length: int = 30,
        no_answer: bool = True,
        no_answer_threshold: float = 0.0,
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
        for name, value in {"n_best": n_best, "max_answer_length": max_answer_length}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if math.isnan(no_answer_threshold):
            raise ValueError("no_answer_threshold must be a number: 0 asks whether CLS or a span has the higher score")
        from transformers import AutoModelForQuestionAnswering

        super().__init__(
            AutoModelForQuestionAnswering,
            pretrained,
            arguments=arguments,
            metrics={"squad": Squad(threshold=None if no_answer else math.inf)},
            # Some architectures take it for the number of outputs, which are start and end.
            config_updates={"num_labels": 2},
        )
        self.n_best = n_best
        self.max_answer_length = max_answer_length
        self.no_answer = no_answer
        threshold = float(no_answer_threshold) if no_answer else math.inf
        self.register_buffer("no_answer_threshold", torch.tensor(threshold))

    @override
    def forward(self, batch: Batch) -> Logits:
        """Start and end logits for a batch, both ``(windows, width)``."""
        inputs = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        outputs = self.model(**{name: batch[name] for name in inputs if name in batch})
        return outputs.start_logits, outputs.end_logits

    @override
    def loss(self, outputs: Logits, batch: Batch) -> tuple[Tensor, int]:
        """The mean of start and end loss over a batch, in fp32, and its windows."""
        targets = batch["start_positions"], batch["end_positions"]
        start, end = (_position_loss(logits, at) for logits, at in zip(outputs, targets, strict=True))
        return (start + end) / 2, len(targets[0])

    @override
    def likelihood(self, outputs: Logits, batch: Batch) -> Likelihood:
        """Start and end of a window's answer, independent of one another; of one past the window, neither."""
        width, rows = outputs[0].shape[1], torch.arange(len(outputs[0]), device=outputs[0].device)
        labels = None
        if "start_positions" in batch:
            labels = torch.cat([batch["start_positions"], batch["end_positions"]])
            labels = labels.masked_fill(labels >= width, -100)
        return Likelihood(torch.cat(outputs).float(), labels, example=rows.repeat(2), examples=len(rows))

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Logits, batch: Batch) -> None:
        spans, null_scores = self._decode(outputs, batch)
        found = zip(batch["context"], spans.starts[:, 0].tolist(), spans.ends[:, 0].tolist(), strict=True)
        metrics.update([text[start:end] for text, start, end in found], batch["answers"], null_scores)

    @override
    def on_validation_epoch_end(self) -> None:
        if self.no_answer and not self.trainer.sanity_checking:
            # Computed once: torchmetrics keeps the result for the logging that follows.
            best = self.val_metrics.compute().get("val_best_f1_thresh", torch.tensor(math.inf))
            self.no_answer_threshold.copy_(best)
        super().on_validation_epoch_end()

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.test_metrics["squad"].threshold = self.no_answer_threshold.item()

    def _decode(self, outputs: Logits, batch: Batch) -> tuple[AnswerSpans, Tensor]:
        """The best spans of each row, and by how much no answer exceeds the best, ``(rows,)``."""
        starts, ends = (logits.float() for logits in outputs)
        rows, example, cls = len(batch["context"]), batch["example"], batch["cls"][:, None]
        spans = best_spans(
            *(starts, ends, batch["char_starts"], batch["char_ends"], example, rows),
            n_best=self.n_best,
            max_answer_length=self.max_answer_length,
        )
        null = lowest_of_rows((starts.gather(1, cls) + ends.gather(1, cls)).squeeze(1), example, rows)
        return spans, null - spans.scores[:, 0]

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """Columns for each row of the batch.

        Returns:
            ``answer`` (its text, ``""`` for none), ``score`` (its probability: softmax over the n-best and, with
            ``no_answer``, no answer), ``start`` and ``end`` (its characters in the context; both 0 for none),
            ``null_score`` (with ``no_answer``: by how much no answer exceeds the best span, which is compared with the
            threshold) and ``n_best`` (a list of ``text``, ``score``, ``start`` and ``end``, best first, no answer
            among them).
        """
        starts, ends = (logits.float().cpu().numpy() for logits in self(batch))
        places = (batch[name].cpu().numpy() for name in ("char_starts", "char_ends"))
        windows = [AnswerWindow(*row) for row in zip(starts, ends, *places, batch["cls"].tolist(), strict=True)]
        of: list[list[AnswerWindow]] = [[] for _ in batch["context"]]
        for window, row in zip(windows, batch["example"].tolist(), strict=True):
            of[row].append(window)
        threshold = self.no_answer_threshold.item()
        rows = [
            read_answer(
                *(context, found),
                n_best=self.n_best,
                max_answer_length=self.max_answer_length,
                no_answer=self.no_answer,
                no_answer_threshold=threshold,
            )
            for context, found in zip(batch["context"], of, strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy over a window's tokens; 0, not NaN, where all positions lie past it."""
    width = logits.shape[1]
    positions = positions.clamp(0, width)
    total = F.cross_entropy(logits.float(), positions, ignore_index=width, reduction="sum")
    return total / (positions < width).sum().clamp(min=1)
