"""Next-token prediction: plain text, or instructions with their answers."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.aggregation import MeanMetric
from typing_extensions import override

from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.functional.packing import keeps_documents_apart, move_padding
from lightning_ft.functional.token_loss import token_cross_entropy
from lightning_ft.metrics.perplexity import LossPerplexity
from lightning_ft.modules.base import Batch, Schedule, TransformerModule
from lightning_ft.modules.checkpoint import Architecture
from lightning_ft.modules.generation import check_generation, generation_settings

if TYPE_CHECKING:
    from transformers import GenerationConfig


class CausalLM(TransformerModule):
    """Fine-tune a decoder (GPT-2, Llama, Qwen, …) to continue text, or to answer instructions.

    Loss: -Σₜ log p(wₜ | w₁ … wₜ₋₁) / n over the n tokens whose label is not -100; a label stands at the token itself,
    not at the one before it. Metrics, logged as ``val_…`` and ``test_…`` over whole epochs: ``perplexity`` and
    ``accuracy``, the share of tokens that were the most probable ones. Predictions: the text that follows the prompt.

    Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, ``(batch, seq)`` each, padded on either
    side; or, packed, with ``input_ids``, ``labels`` and ``position_ids``, which begin anew at each document, and no
    ``attention_mask``. With the first packed batch the model is tried, and refused if it reads across documents.

    Args:
        pretrained: Folder or hub name of the pretrained model, or an
            :class:`~lightning_ft.modules.Architecture` for random weights.
        max_new_tokens: Tokens that a prediction may have; it ends earlier at an end-of-sequence token.
        num_beams: Beams of the search for the most probable text; 1 is greedy.
        temperature: Draw tokens from the softmax of logits / temperature; 0 takes the most probable ones.
        top_p: Draw from the most probable tokens that together have this probability.
        token_weighted: Average the loss over all tokens of an optimiser step, and not over its micro-batches.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of the new head's weights.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: A number is out of range; later, a model that cannot take packed documents, or a prompt too long.
    """

    head_is_pretrained = True

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Architecture,
        *,
        max_new_tokens: int = 128,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
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
        chosen: Any = {
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "temperature": temperature,
            "top_p": top_p,
        }
        check_generation(**chosen)
        from transformers import AutoModelForCausalLM

        super().__init__(
            AutoModelForCausalLM,
            pretrained,
            arguments=arguments,
            metrics={"perplexity": LossPerplexity(), "accuracy": MeanMetric()},
            token_weighted=token_weighted,
        )
        self.max_new_tokens = max_new_tokens
        self._settings = generation_settings(**chosen)
        self._packs = False

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The model's logits, ``(batch, seq, vocab)``."""
        # Not token_type_ids, which GPT-2 would add as further words.
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        if "attention_mask" not in given and "position_ids" in given:
            self._check_packing(given["input_ids"])
        elif given.keys() == {"input_ids", "attention_mask"} and self._pads_left:
            # Absolute positions would else begin in the padding; that of the padding itself is of no account.
            given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        # A cache would be filled for nothing, would hide packed documents, and cannot be with gradient checkpointing.
        logits: Tensor = self.model(**given, use_cache=False).logits
        return logits

    @override
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy over the labelled tokens, in fp32, and their number."""
        return token_cross_entropy(*_labelled(outputs, batch))

    @override
    def likelihood(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """A token after each token of a row that is labelled, given the true ones before it."""
        return Likelihood.of_tokens(outputs[:, :-1], batch["labels"][:, 1:])

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Tensor, batch: Batch) -> None:
        logits, labels = _labelled(outputs, batch)
        if len(labels):
            loss = F.cross_entropy(logits, labels)
            right = (logits.argmax(-1) == labels).float().mean()
            metrics.update(loss=loss, tokens=len(labels), value=right, weight=len(labels))

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """``text``, what the model writes after the prompt, without special tokens, for each row of the batch.

        Raises:
            ValueError: The module has no tokenizer, or the longest prompt leaves no room for ``max_new_tokens``.
        """
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer, and the architecture came without one: Architecture(config, …)")
        ids = batch["input_ids"]
        mask, ids = move_padding(batch.get("attention_mask", torch.ones_like(ids)), ids, left=True)
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = int(mask.sum(1).max())
        if room is not None and longest + self.max_new_tokens > room:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={self.max_new_tokens} exceed the model's {room} "
                "positions: lower max_new_tokens, or the data's max_length"
            )
        written = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self._generation())
        new = written[:, ids.shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {"text": texts}

    @property
    def _pads_left(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.padding_side == "left"

    def _generation(self) -> GenerationConfig:
        """The settings that the model brings, with ours in place of its way of choosing tokens."""
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(
            **self._settings,
            eos_token_id=self._ends(settings.eos_token_id),
            pad_token_id=self.model.config.pad_token_id,
            use_cache=True,
        )
        return settings

    def _ends(self, known: int | list[int] | None) -> list[int] | None:
        """Where a text ends: what the model says, and the tokenizer's end of sequence, which answers are taught with.

        The two differ in base models whose tokenizer has the chat format's end of a turn.
        """
        assert self.tokenizer is not None
        ends = [*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id]
        return sorted({end for end in ends if end is not None}) or None

    def _check_packing(self, input_ids: Tensor) -> None:
        if not self._packs and not keeps_documents_apart(self.model, input_ids):
            many = "" if len(input_ids) == 1 else ", or, with flash attention, batch_size=1"
            raise ValueError(
                f"{type(self.model).__name__} with {self.model.config._attn_implementation!r} attention reads across "
                f"documents that are packed into one sequence: set packing=False{many}"
            )
        self._packs = True


def _labelled(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits before each labelled token, ``(tokens, vocab)`` in fp32, and the labels, ``(tokens,)``."""
    labels = batch["labels"][:, 1:]
    chosen = labels != -100
    # fp32 for these alone: prompts and padding are most of a batch, and a vocabulary is wide.
    return logits[:, :-1][chosen].float(), labels[chosen]
