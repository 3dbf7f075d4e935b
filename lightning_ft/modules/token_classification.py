"""A tag for each word, and the entities that the tags make up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_ft.functional.entity_reading import read_entities
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.functional.token_loss import token_cross_entropy
from lightning_ft.metrics.entity_f1 import EntityF1, Scheme, tag_table
from lightning_ft.modules.base import Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture


class TokenClassification(TransformerModule):
    """Fine-tune a pretrained model to tag words, and to find the entities that the tags make up.

    Loss: cross-entropy, averaged over labelled tokens. Metrics, logged as ``val_…`` and ``test_…`` over whole epochs:
    ``precision``, ``recall`` and ``f1`` of whole entities, micro-averaged and strict, and ``accuracy`` of tags, see
    :class:`~lightning_ft.metrics.EntityF1`. Each word counts once, however many windows of a document hold it.

    Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, all ``(windows, width)``; labels are
    numbers of tags, -100 where there is none. For prediction, and to count words and not tokens in evaluation, they
    also have ``example``, ``words``, ``offsets``, ``tags`` and ``tokens`` or ``text``, as
    :class:`~lightning_ft.data.TokenClassificationData` gives them.

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` for random weights.
        labels: The tags, in the order of their numbers: ``O``, and ``B-PER`` and the like. The CLI takes them from the
            data.
        scheme: ``"BIO"`` (IOB2), ``"BIOES"``, or ``"IO"``, where neighbours of one type are one entity.
        per_type: Also log ``precision_…``, ``recall_…`` and ``f1_…`` of each type.
        token_weighted: Average the loss over all labelled tokens of an optimiser step, and not over its micro-batches.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of the new head's weights.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: A label that is not of the scheme, or a number that is out of range.
    """

    tag_table: Tensor

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        labels: Sequence[str],
        *,
        scheme: Scheme = "BIO",
        per_type: bool = False,
        token_weighted: bool = True,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        head_seed: int = 0,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        labels = [str(name) for name in labels]
        arguments = dict(locals())
        types, table = tag_table(labels, scheme)
        from transformers import AutoModelForTokenClassification

        super().__init__(
            AutoModelForTokenClassification,
            pretrained,
            arguments=arguments,
            metrics={"entities": EntityF1(labels, scheme, per_type=per_type)},
            config_updates={
                "num_labels": len(labels),
                "id2label": dict(enumerate(labels)),
                "label2id": {name: i for i, name in enumerate(labels)},
            },
            token_weighted=token_weighted,
        )
        self.labels = labels
        self.scheme: Scheme = scheme
        self.types = types
        self.register_buffer("tag_table", table, persistent=False)

    @override
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss over a batch's labelled tokens, in fp32, and their number."""
        return token_cross_entropy(outputs, batch["labels"])

    @override
    def likelihood(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """A tag for each labelled token of a window."""
        return Likelihood.of_tokens(outputs, batch["labels"])

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Tensor, batch: Batch) -> None:
        if "words" in batch:
            metrics.update(self.word_tags(outputs, batch)[0], batch["tags"])
        else:
            metrics.update(outputs.argmax(-1), batch["labels"])

    def word_tags(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The tag of each word, from the one window that it is read from, and the tag's probability.

        Args:
            logits: ``(windows, width, labels)``.
            batch: With ``example``, ``words`` and ``offsets``.

        Returns:
            Numbers of tags and probabilities, both ``(rows, words)``. Words without a token, and places beyond a row's
            last word, are ``O`` with probability 0.
        """
        scores, tags = logits.float().softmax(-1).max(-1)
        words = batch["words"]
        rows, width = batch["offsets"].shape[:2]
        # Whatever is not a word's token goes to column 0, which is then dropped.
        place = batch["example"][:, None].expand_as(words), words
        merged = tags.new_full((rows, width + 1), self.labels.index("O")).index_put(place, tags)
        probabilities = scores.new_zeros(rows, width + 1).index_put(place, scores)
        return merged[:, 1:], probabilities[:, 1:]

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """Columns for each row of the batch.

        Sequences of tags are read as the metrics read them, strictly: a tag that the scheme does not allow where it
        stands is outside of entities.

        Returns:
            ``entities``, a list of ``{"label", "text", "start", "end", "score"}``: start and end are offsets of
            characters, the end excluded, in the text or in the words joined by single spaces; the score is the mean
            probability of the tags of the entity's words. For rows of words also ``tags``, one for each word.
        """
        tags, scores = self.word_tags(self(batch), batch)
        texts = batch["text"] if "text" in batch else [" ".join(words) for words in batch["tokens"]]
        table = self.tag_table.tolist()
        rows = zip(tags.tolist(), scores.tolist(), batch["offsets"].tolist(), texts, strict=True)
        entities = [read_entities(*row, self.types, table) for row in rows]
        if "text" in batch:
            return {"entities": entities}
        named = [[self.labels[i] for i in row] for row in tags.tolist()]
        return {
            "entities": entities,
            "tags": [row[: len(words)] for row, words in zip(named, batch["tokens"], strict=True)],
        }
