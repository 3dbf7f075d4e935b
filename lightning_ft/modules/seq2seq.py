"""Text to text: summaries, translations, answers, and labels written as text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import override

from lightning_ft.functional.label_scoring import (
    decoder_inputs,
    label_log_likelihoods,
    label_token_ids,
    target_log_likelihoods,
)
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.functional.token_loss import token_cross_entropy
from lightning_ft.metrics.text import TextMetric, text_metrics
from lightning_ft.modules.base import Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture
from lightning_ft.modules.generation import check_generation, generation_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Seq2Seq(TransformerModule):
    """Fine-tune an encoder-decoder (T5, BART, Marian, NLLB, …) to write a text for a text.

    Loss: −Σₜ log p(yₜ | y₁ … yₜ₋₁, source) / n over the n target tokens. Metrics, logged as ``val_…`` and ``test_…``
    over whole epochs, of the texts that the model writes, all from 0 to 1: ``rouge1``, ``rouge2``, ``rougeL``,
    ``bleu``, ``chrf``, ``meteor``, ``bertscore`` (see :func:`~lightning_ft.metrics.text.text_metrics`).

    With ``label_texts`` it is a classifier that needs no new head: the answer is the label of which
    log p(label | source) is the highest, and nothing is generated. Metrics then are ``accuracy`` and ``f1`` (macro).

    Batches are mappings with ``input_ids`` and ``attention_mask``, ``(batch, seq)``; ``labels``, the target's tokens,
    ``(batch, target seq)``, padded on the right with -100; and, to be measured by, ``references``, a list of texts for
    each row (without it the target's tokens are decoded).

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` for random weights.
        metrics: What generated texts are measured by: names, or names with options, ``{"meteor": {"synonyms": True}}``;
            by default ROUGE. Empty for the loss alone, which saves generating them.
        label_texts: The texts of all labels: classify by their likelihood.
        length_normalised: Compare the mean log-probability of labels' tokens, and not their sum.
        generate_in_validation: Generate texts, and measure them, in validation. Tests always do.
        max_new_tokens: Tokens that a generated text may have; it ends earlier at the end-of-sequence token.
        num_beams: Beams of the search for the most probable text; 1 is greedy. 4 or 5 are usual for final results.
        length_penalty: Beam search divides log p by length to this power, 1 by default: above 0 for longer texts.
        no_repeat_ngram_size: No n-gram of this many tokens comes twice in a text; 0 allows all.
        temperature: Draw tokens from the softmax of logits / temperature; 0 takes the most probable ones.
        top_p: Draw from the most probable tokens that together have this probability.
        target_language: Code of the language to write, for models of many languages, as their tokenizer spells it
            (``"deu_Latn"`` for NLLB, ``"de_DE"`` for mBART-50, ``"de"`` for M2M-100).
        label_smoothing: Share of the target spread over the vocabulary in training; validation reports the same loss.
        token_weighted: Average the loss over all tokens of an optimiser step, and not over its micro-batches.
        learning_rate: η at the end of the warm-up. T5 takes 1e-4 to 1e-3 with AdamW.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of the new head's weights.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: A number is out of range or has no effect, a metric is unknown or lacks its model, labels cannot be
            told apart by their tokens, or the model does not know the language.
    """

    head_is_pretrained = True

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        *,
        metrics: Sequence[TextMetric] | Mapping[TextMetric, Mapping[str, Any]] | None = None,
        label_texts: Sequence[str] | None = None,
        length_normalised: bool = False,
        generate_in_validation: bool = True,
        max_new_tokens: int = 128,
        num_beams: int = 1,
        length_penalty: float | None = None,
        no_repeat_ngram_size: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        target_language: str | None = None,
        label_smoothing: float = 0.0,
        token_weighted: bool = True,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        head_seed: int = 0,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        label_texts = None if label_texts is None else [str(name) for name in label_texts]
        arguments = dict(locals())
        chosen: Any = {
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "temperature": temperature,
            "top_p": top_p,
        }
        check_generation(**chosen)
        if no_repeat_ngram_size < 0 or not 0 <= label_smoothing < 1:
            raise ValueError(
                f"no_repeat_ngram_size={no_repeat_ngram_size} must be 0 or more, and label_smoothing={label_smoothing} "
                "lie in [0, 1)"
            )
        if length_penalty is not None and num_beams == 1:
            raise ValueError(f"length_penalty={length_penalty} is about beam search: set num_beams=4, or leave it out")
        if label_texts is None and length_normalised:
            raise ValueError("length_normalised=True is about label_texts: give them, or leave it out")
        if label_texts is not None and metrics is not None:
            raise ValueError(f"metrics={metrics} are of generated texts, and with label_texts none are: leave them out")
        if label_texts is not None and (len(label_texts) < 2 or len(set(label_texts)) < len(label_texts)):
            raise ValueError(f"label_texts={label_texts} must be two texts or more that differ")
        from transformers import AutoModelForSeq2SeqLM

        super().__init__(
            AutoModelForSeq2SeqLM,
            pretrained,
            arguments=arguments,
            metrics=_label_metrics(len(label_texts))
            if label_texts
            else text_metrics(("rouge",) if metrics is None else metrics),
            token_weighted=token_weighted,
        )
        self.label_texts = label_texts
        self.length_normalised = length_normalised
        self.label_smoothing = label_smoothing
        if not generate_in_validation and label_texts is None:
            self.val_metrics = MetricCollection({}, prefix="val_")
        if label_texts is not None:
            _ = self._label_ids  # labels that cannot be told apart are refused before training
        # In the model's own settings, which checkpoints and saved folders keep.
        self.model.generation_config.update(
            **generation_settings(**chosen),
            length_penalty=length_penalty,
            early_stopping=self.model.generation_config.early_stopping if num_beams > 1 else None,
            no_repeat_ngram_size=no_repeat_ngram_size or None,
        )
        if target_language is not None:
            self.model.generation_config.forced_bos_token_id = self._language_token(target_language)

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The logits of the target's tokens, ``(batch, target seq, vocab)``."""
        # Not `labels=`: the model would compute its own loss, too. A cache would be filled for nothing.
        logits: Tensor = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=decoder_inputs(self.model, batch["labels"]),
            use_cache=False,
        ).logits
        return logits

    @override
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy over the target's tokens, in fp32, and their number."""
        return token_cross_entropy(outputs, batch["labels"], label_smoothing=self.label_smoothing)

    @override
    def likelihood(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """Each token of a row's target, given the true ones before it."""
        return Likelihood.of_tokens(outputs, batch["labels"])

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Tensor, batch: Batch) -> None:
        if self.label_texts is not None:
            metrics.update(self.label_log_likelihoods(batch), self._true_labels(batch["labels"]))
        elif len(metrics):
            metrics.update(self.generate(batch)[0], batch.get("references") or self._targets(batch["labels"]))

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """Columns for each row of the batch.

        Returns:
            ``text`` and ``score``, the mean log-probability of its tokens under the model, in nats. With
            ``label_texts``: ``label``, ``score``, its probability among the labels, and ``probabilities`` of all.
        """
        if self.label_texts is None:
            texts, scores = self.generate(batch)
            return {"text": texts, "score": scores.tolist()}
        values = self.label_log_likelihoods(batch).softmax(-1)
        named = [self.label_texts[i] for i in values.argmax(-1).tolist()]
        return {"label": named, "score": values.max(-1).values.tolist(), "probabilities": values.tolist()}

    @torch.no_grad()
    def generate(self, batch: Batch) -> tuple[list[str], Tensor]:
        """The texts that the model writes, and the mean log-probability of their tokens, in nats: ``(batch,)``."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        made = self.model.generate(**given)[:, 1:]  # the first is the decoder's start token
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        at_end = torch.isin(made, torch.tensor([end for end in ends if end is not None], device=made.device))
        # All after the first end is padding, also where the padding token is that of the end.
        labels = made.masked_fill(at_end.cumsum(1) - at_end.long() > 0, -100)
        total, tokens = target_log_likelihoods(self.model, given, labels)
        return self._texts(made), total / tokens

    @torch.no_grad()
    def label_log_likelihoods(self, batch: Batch) -> Tensor:
        """log p of each label for each row, ``(batch, labels)``, or with ``length_normalised`` the mean over tokens."""
        normalise = "mean" if self.length_normalised else "sum"
        return label_log_likelihoods(self.model, batch, self._label_ids, normalise=normalise)  # type: ignore[arg-type]

    @cached_property
    def _label_ids(self) -> Tensor:
        assert self.label_texts is not None
        return label_token_ids(self._speller, self.label_texts)

    @property
    def _speller(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer, and the architecture came without one: Architecture(config, …)")
        return self.tokenizer

    def _texts(self, ids: Tensor) -> list[str]:
        texts = self._speller.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def _targets(self, labels: Tensor) -> list[list[str]]:
        return [[text] for text in self._texts(labels.masked_fill(labels == -100, self.model.config.pad_token_id))]

    def _true_labels(self, targets: Tensor) -> Tensor:
        """The number of each row's label."""
        known = self._label_ids.to(targets.device)
        width = max(known.shape[1], targets.shape[1])
        known, targets = (F.pad(ids, (0, width - ids.shape[1]), value=-100) for ids in (known, targets))
        same = (targets[:, None] == known).all(-1)
        if not same.any(1).all():
            row = int((~same.any(1)).nonzero()[0])
            [[text]] = self._targets(targets[row : row + 1])
            raise ValueError(
                f"the target {text!r} is none of label_texts={self.label_texts}: name all labels as the data spells "
                "them (and see that max_target_length cuts none)"
            )
        return same.int().argmax(1)

    def _language_token(self, code: str) -> int:
        vocabulary = self._speller.get_vocab()
        for token in (code, f"__{code}__"):
            if token in vocabulary:
                return int(vocabulary[token])
        raise ValueError(
            f"target_language={code!r} is no token of {self._speller.name_or_path!r}: give the code as its tokenizer "
            "spells it, or leave it out for a model of one language"
        )


def _label_metrics(labels: int) -> dict[str, Metric]:
    return {
        "accuracy": MulticlassAccuracy(labels, average="micro"),
        "f1": MulticlassF1Score(labels, average="macro"),
    }
