"""Classification by what a pretrained language model puts into a gap."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import override

from lightning_ft.core.pattern import parse_patterns
from lightning_ft.core.report import Report
from lightning_ft.core.verbaliser import is_decoder, parse_verbalizer, word_tokens
from lightning_ft.functional.calibration import calibration_bias
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.functional.token_loss import token_cross_entropy
from lightning_ft.functional.verbaliser import label_scores, logits_at
from lightning_ft.metrics.matthews import MatthewsCorrCoef
from lightning_ft.metrics.pattern_scores import PatternScores
from lightning_ft.modules.base import _INPUTS, Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture


class Cloze(TransformerModule):
    """Classify texts by the words that a language model puts into the gap of a pattern, with no new parameters.

    A label's score is the mean of the logits of its words at the gap; softmax runs over the labels alone, and the loss
    is cross-entropy (PET). Without any training it classifies, too: ``trainer.test`` on a new module is the zero-shot
    baseline, with demonstrations the in-context one.

    Each row is scored under every pattern (and with every set of demonstrations); the mean of these scores, each being
    log-probabilities, is the row's. PET trains a model for each pattern and averages their scores; here one model
    learns all patterns, and the average is over those. Words of several tokens stand over several masks that are read
    at once, in training with cross-entropy (PET: a hinge loss) and in prediction (PET: filled in one after the other).

    Metrics over whole epochs, as ``val_…`` and ``test_…``: ``accuracy``, ``f1`` (macro average), ``mcc``; with several
    patterns also ``accuracy_pattern0``, ``loss_pattern0`` and so on for each by itself.

    Batches are those of :class:`~lightning_ft.data.cloze.ClozeData`, which takes the same ``patterns``, ``verbalizer``,
    ``decoder`` and ``calibrate``.

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` with a tokenizer for random weights.
        verbalizer: The word or words of each label, as the data module has them.
        patterns: One pattern or several, as the data module has them.
        decoder: Whether the gap is a decoder's next token; by default, whether the tokenizer has no mask token.
        auxiliary_mlm: α of the loss (1 − α)·L_label + α·L_MLM, the latter on the data module's ``unlabelled`` rows;
            PET takes 1e-4.
        calibrate: In evaluation, divide each pattern's probabilities by those of inputs without content, see
            :func:`~lightning_ft.functional.calibration.calibrate`.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of new weights, where the pretrained model has no language-modelling head.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: Words that are no tokens, patterns that do not suit the model, or a number out of range.

    Reference:
        Schick and Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language
        Inference"; Gao, Fisch and Chen 2021, "Making Pre-trained Language Models Better Few-shot Learners".
    """

    head_is_pretrained = True

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        verbalizer: Mapping[str, str | Sequence[str]],
        patterns: str | Sequence[str],
        *,
        decoder: bool | None = None,
        auxiliary_mlm: float = 0.0,
        calibrate: bool = False,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        head_seed: int = 0,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        verbalizer = parse_verbalizer(verbalizer)
        patterns = [pattern.template for pattern in parse_patterns(patterns)]
        arguments = dict(locals())
        if not 0 <= auxiliary_mlm < 1:
            raise ValueError(f"auxiliary_mlm={auxiliary_mlm} must lie in [0, 1); PET takes 1e-4")
        parsed, tokenizer = parse_patterns(patterns), _tokenizer(pretrained, trust_remote_code)
        next_token = is_decoder(tokenizer, parsed, decoder)
        if next_token and auxiliary_mlm:
            raise ValueError(f"auxiliary_mlm={auxiliary_mlm} masks tokens, and a decoder reads no masks: leave it 0")
        words = _padded([word_tokens(verbalizer, pattern, tokenizer, decoder=next_token) for pattern in parsed])
        names = list(verbalizer)
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        super().__init__(
            AutoModelForCausalLM if next_token else AutoModelForMaskedLM,
            pretrained,
            arguments=arguments,
            metrics={
                "accuracy": MulticlassAccuracy(len(names), average="micro"),
                "f1": MulticlassF1Score(len(names), average="macro"),
                "mcc": MatthewsCorrCoef(len(names)),
                **({"by_pattern": PatternScores(len(parsed))} if len(parsed) > 1 else {}),
            },
            config_updates={
                "num_labels": len(names),
                "id2label": dict(enumerate(names)),
                "label2id": {name: i for i, name in enumerate(names)},
            },
        )
        self.labels = names
        self.patterns: list[str] = patterns
        self.masks = parsed[0].masks
        self.decoder = next_token
        self.auxiliary_mlm = auxiliary_mlm
        self.calibrate = calibrate
        self._bias: Tensor | None = None
        self.words: Tensor
        self.register_buffer("words", words, persistent=False)

    @override
    def forward(self, batch: Batch) -> Tensor:
        """Scores of the labels in each window, ``(windows, labels)``: their words' logits at the gap."""
        logits = logits_at(self.model, {name: batch[name] for name in _INPUTS if name in batch}, self.gap(batch))
        return label_scores(logits, self.words[batch["pattern"]])

    def gap(self, batch: Batch) -> Tensor:
        """Where the gap's masks are in each window, from the first on: ``(windows, masks)``."""
        return torch.sort(batch["mask_positions"], dim=1, descending=True, stable=True).indices[:, : self.masks]

    @override
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """The mean loss over the items of a training batch, or the rows of another one, in fp32."""
        if "example" in batch:  # all windows of its rows
            scores, labels = self.pattern_scores(outputs, batch).mean(1), self._row_labels(batch)
            return F.cross_entropy(scores, labels), len(labels)
        loss = F.cross_entropy(outputs, batch["labels"])
        if self.auxiliary_mlm:
            loss = (1 - self.auxiliary_mlm) * loss + self.auxiliary_mlm * self._mlm_loss(batch)
        return loss, len(outputs)

    @override
    def likelihood(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """One label a window, by its words' scores; without ``auxiliary_mlm``."""
        return Likelihood(outputs.float(), batch.get("labels"))

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Tensor, batch: Batch) -> None:
        scores = self.pattern_scores(outputs, batch)
        metrics.update(preds=scores.mean(1), target=self._row_labels(batch), pattern_scores=scores)

    def pattern_scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Log-probabilities of the labels under each pattern, ``(rows, patterns, labels)``.

        They are the mean over sets of demonstrations, and calibrated if ``calibrate`` is set.

        Args:
            outputs: What :meth:`forward` returned.
            batch: An evaluation batch: all windows of its rows, draw by draw, in each pattern by pattern.
        """
        rows = len(batch["row"])
        scores = outputs.log_softmax(-1).view(rows, -1, len(self.patterns), outputs.shape[-1])
        if self.calibrate:
            scores = (scores + self._calibration(batch)).log_softmax(-1)
        return scores.mean(1)

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """Columns for each row of the batch.

        Returns:
            ``label`` (a name), ``score`` (its probability), ``probabilities`` (a list in the order of the labels) and
            ``pattern_probabilities`` (such a list for each pattern by itself).
        """
        scores = self.pattern_scores(self(batch), batch)
        values = scores.mean(1).softmax(-1)
        return {
            "label": [self.labels[i] for i in values.argmax(-1).tolist()],
            "score": values.max(-1).values.tolist(),
            "probabilities": values.tolist(),
            "pattern_probabilities": scores.softmax(-1).tolist(),
        }

    # ---- what inputs without content prefer: found anew for each evaluation

    @override
    def on_validation_start(self) -> None:
        self._bias = None

    @override
    def on_test_start(self) -> None:
        self._bias = None

    @override
    def on_predict_start(self) -> None:
        self._bias = None

    def _calibration(self, batch: Batch) -> Tensor:
        """What to add to scores, ``(draws, patterns, labels)``. Every process finds it for itself."""
        if self._bias is not None and self._trainer is not None and self._trainer.state.stage is not None:
            return self._bias
        if "content_free" not in batch:
            raise ValueError("calibrate=True needs inputs without content in batches: give ClozeData(calibrate=True)")
        inputs = batch["content_free"]
        windows = batch["example"].numel() // len(batch["row"])
        probabilities = self(inputs).softmax(-1)
        mean = probabilities.view(-1, windows // len(self.patterns), len(self.patterns), len(self.labels)).mean(0)
        self._bias = calibration_bias(mean)
        return self._bias

    # ---- parts

    def _row_labels(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["labels"].view(len(batch["row"]), -1)[:, 0]
        return labels

    def _mlm_loss(self, batch: Batch) -> Tensor:
        if "unlabelled" not in batch:
            raise ValueError(
                f"auxiliary_mlm={self.auxiliary_mlm} needs masked texts in the batches: give ClozeData(unlabelled=...)"
            )
        texts = batch["unlabelled"]
        return token_cross_entropy(super().forward(texts), texts["labels"])[0]


def choose_pattern(module: Cloze, data: LightningDataModule, trainer: Trainer) -> Report:
    """Which of a module's patterns does best on the validation rows, each by itself.

    Args:
        module: A module with the candidates as its ``patterns``, trained or not.
        data: A :class:`~lightning_ft.data.cloze.ClozeData` with the same ``patterns`` and with ``val``.
        trainer: What runs the validation.

    Returns:
        A row for each pattern, and the best one as the fact ``best``: the highest accuracy, at equal accuracy (few rows
        make it common) the lowest loss, of these the first.

    Raises:
        ValueError: There is nothing to choose from.
    """
    if len(module.patterns) < 2:
        raise ValueError(f"patterns={module.patterns}: give the module and the data two or more to choose from")
    [values] = trainer.validate(module, datamodule=data, verbose=False)
    rows: list[dict[str, Any]] = [
        {"pattern": pattern, **{name: values[f"val_{name}_pattern{i}"] for name in ("accuracy", "loss")}}
        for i, pattern in enumerate(module.patterns)
    ]
    best = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    return Report("Patterns", {"best": best["pattern"], "accuracy of all together": values["val_accuracy"]}, rows)


def _tokenizer(pretrained: str | os.PathLike[str] | Architecture, trust_remote_code: bool) -> Any:
    """The model's tokenizer, before there is a model: it decides which kind of model."""
    if not isinstance(pretrained, Architecture):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
    if pretrained.tokenizer is None:
        raise ValueError("an Architecture without a tokenizer cannot say what the verbalizer's words are: give it one")
    return pretrained.tokenizer


def _padded(tokens: list[list[list[list[int]]]]) -> Tensor:
    """``[pattern][label][word][token]`` as a tensor, -1 where there is none."""
    words = max(len(given) for labels in tokens for given in labels)
    length = max(len(ids) for labels in tokens for given in labels for ids in given)
    flat = [
        torch.tensor(ids) for labels in tokens for given in labels for ids in [*given, *[[-1]] * (words - len(given))]
    ]
    padded: Tensor = pad_sequence(flat, batch_first=True, padding_value=-1)
    return padded.view(len(tokens), -1, words, length)
