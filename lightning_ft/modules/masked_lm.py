"""Masked language modelling: go on pretraining an encoder on texts of a domain, a task or a language."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from typing_extensions import override

from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.functional.token_loss import token_cross_entropy
from lightning_ft.metrics.perplexity import LossPerplexity
from lightning_ft.modules.base import Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture


class MaskedLM(TransformerModule):
    """Train an encoder to tell the masked tokens of a text; with domain texts, domain-adaptive pretraining.

    Loss: cross-entropy of the tokens with a label. Metrics, logged as ``val_…`` and ``test_…`` over whole epochs:
    ``perplexity`` (of the masked tokens) and ``accuracy`` (share of them that the model finds). Perplexities compare
    only between models with one tokenizer, on the same masks.

    Batches are mappings with ``input_ids`` and ``attention_mask``, both ``(batch, seq)``, and ``labels``, the true
    tokens where one is masked and -100 elsewhere, ``(batch, seq)``.

    The pretrained model must bring its language modelling head; a warning names the weights of which new ones were
    drawn. :meth:`save_pretrained` writes the folder that a classifier of the domain starts from.

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` for random weights.
        top_k: Tokens that a prediction names for each mask.
        token_weighted: Average the loss over all masked tokens of an optimiser step, and not over its micro-batches.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of the new head's weights, where the pretrained model brings none.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: A number is out of range.

    Reference:
        Gururangan et al. 2020, "Don't Stop Pretraining: Adapt Language Models to Domains and Tasks".
    """

    head_is_pretrained = True

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        *,
        top_k: int = 5,
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
        arguments = dict(locals())
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be 1 or more: it is the number of tokens named for each mask")
        from transformers import AutoModelForMaskedLM

        super().__init__(
            AutoModelForMaskedLM,
            pretrained,
            arguments=arguments,
            metrics={"perplexity": LossPerplexity(), "accuracy": MeanMetric()},
            token_weighted=token_weighted,
        )
        self.top_k = top_k

    @override
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss over the masked tokens of a batch, in fp32, and their number."""
        return token_cross_entropy(*_masked(outputs, batch))

    @override
    def likelihood(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """A token for each mask of a row."""
        return Likelihood.of_tokens(outputs, batch["labels"])

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Tensor, batch: Batch) -> None:
        logits, labels = _masked(outputs, batch)
        metrics["perplexity"].update(*self.loss(outputs, batch))
        metrics["accuracy"].update((logits.argmax(-1) == labels).float())

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """What stands at the mask tokens of each row.

        Returns:
            ``tokens``: for each mask, in order, a list of the ``top_k`` likeliest tokens, each ``{"token": …,
            "score": its probability}``; and ``filled``, the text with the likeliest token at each mask, without special
            tokens, as the tokenizer writes it.

        Raises:
            ValueError: The tokenizer has no mask token, or the module none at all.
        """
        words = self.tokenizer
        if words is None or words.mask_token_id is None:
            raise ValueError(
                "predictions fill in the tokenizer's mask token, and this module has no tokenizer that knows one: give "
                "pretrained a folder with the tokenizer's files, or Architecture(config, tokenizer)"
            )
        ids = batch["input_ids"]
        mask = ids == words.mask_token_id
        best = self(batch)[mask].float().softmax(-1).topk(self.top_k)
        # Of no rows at all, transformers makes one text.
        names = words.batch_decode(best.indices.reshape(-1, 1)) if len(best.indices) else []
        flat = [{"token": n, "score": s} for n, s in zip(names, best.values.flatten().tolist(), strict=True)]
        of_mask = iter([flat[start : start + self.top_k] for start in range(0, len(flat), self.top_k)])
        filled = words.batch_decode(ids.masked_scatter(mask, best.indices[:, 0]), skip_special_tokens=True)
        return {"tokens": [[next(of_mask) for _ in range(count)] for count in mask.sum(1).tolist()], "filled": filled}


def _masked(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits, in fp32, and labels of the masked tokens: ``(tokens, vocabulary)`` and ``(tokens,)``.

    Taken out before they are converted: of seven tokens one is masked, and the logits are the largest tensor there is.
    """
    chosen = batch["labels"] != -100
    return logits[chosen].float(), batch["labels"][chosen]
