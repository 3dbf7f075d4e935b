"""What of a model goes into a graph: positional tensors in, a tuple of named tensors out.

``torch.export`` needs an explicit signature (a ``**kwargs`` forward fails) and plain outputs (a cache object
among them fails), so each kind of head has one wrapper here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ft.functional.verbaliser import label_scores, logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
"""What a tokenizer makes and a model reads, each ``(batch, sequence)``."""


class GraphWrapper(nn.Module, ABC):
    """A model with the signature of its graph. Derive from it for a head of your own, or for another module.

    Args:
        model: The model to call, of Hugging Face or any other. It is a submodule, never a copy.
    """

    outputs: tuple[str, ...]
    """Names of the tensors that ``forward`` returns."""

    per_token: ClassVar[tuple[str, ...]] = ()
    """Those of them that begin ``(batch, sequence)``: what they hold at padding means nothing and is not compared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @abstractmethod
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the graph's outputs.

        Args:
            input_ids: ``(batch, sequence)``, int64.
            attention_mask: ``(batch, sequence)``, int64; 0 on padding.
            token_type_ids: ``(batch, sequence)``, int64; None for a model without them.

        Returns:
            One tensor for each name in ``outputs``.
        """

    def axes(self, name: str) -> Mapping[int, str]:
        """Names of the axes of an input that may have any size."""
        return {0: "batch", 1: "sequence"}

    def sample(self, tokens: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The graph's inputs, in the order of its signature, made of random tokens: what it is traced and compared on.

        Args:
            tokens: Those of ``input_ids``, ``attention_mask`` and ``token_type_ids`` that the model reads.
            generator: For whatever else is to be drawn.
        """
        return dict(tokens)

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of ``forward`` that the graph's inputs make, which may be lists of them; in the same order.

        Args:
            inputs: By the graph's names: tensors, or what stands for each.
        """
        return dict(inputs)

    def _read(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Any:
        # Named only when given: DistilBERT's forward has no such argument.
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self._kind == "xlnet":
            attention_mask = attention_mask.float()  # 1.0 - mask, of integers, is more than the exporter can decompose
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **types)

    @property
    def _kind(self) -> str:
        return getattr(getattr(self.model, "config", None), "model_type", "")

    def _take(self, output: Any, *names: str) -> tuple[Tensor, ...]:
        if missing := [name for name in names if name not in output]:
            raise TypeError(
                f"model: expected one whose output has {' and '.join(missing)}, got {type(self.model).__name__}: load "
                "it with the Auto class of its head, such as AutoModelForSequenceClassification"
            )
        return tuple(output[name] for name in names)


class Logits(GraphWrapper):
    """The ``logits`` of any Hugging Face model whose output has them.

    Args:
        model: For example an ``AutoModelForSequenceClassification``.
    """

    outputs = ("logits",)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the logits; arguments as in :meth:`GraphWrapper.forward`."""
        return self._take(self._read(input_ids, attention_mask, token_type_ids), "logits")

    def sample(self, tokens: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """An encoder-decoder classifies a row's last end-of-sequence token: each row ends with one."""
        config: Any = getattr(self.model, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            return dict(tokens)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        last = (mask * torch.arange(mask.shape[1])).argmax(1, keepdim=True)
        return {**tokens, "input_ids": ids.scatter(1, last, config.eos_token_id)}


class TokenLogits(Logits):
    """The ``logits`` of each token: of a tagger, ``(batch, sequence, labels)``, or of a masked language model."""

    per_token = ("logits",)


class Spans(GraphWrapper):
    """``start_logits`` and ``end_logits`` of extractive question answering, both ``(batch, sequence)``."""

    outputs = ("start_logits", "end_logits")
    per_token = outputs

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the logits; arguments as in :meth:`GraphWrapper.forward`."""
        return self._take(self._read(input_ids, attention_mask, token_type_ids), *self.outputs)


class Choices(GraphWrapper):
    """The ``logits`` of multiple choice, ``(batch, choices)``; all inputs are ``(batch, choices, sequence)``."""

    outputs = ("logits",)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the logits; arguments as in :meth:`GraphWrapper.forward`, with an axis more."""
        return self._take(self._read(input_ids, attention_mask, token_type_ids), "logits")

    def axes(self, name: str) -> Mapping[int, str]:
        """Batch, choices and sequence."""
        return {0: "batch", 1: "choices", 2: "sequence"}

    def sample(self, tokens: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Each row with two or three choices, which are other rows' tokens."""
        choices = 2 + tokens["input_ids"].shape[1] % 2
        return {name: torch.stack([v.roll(i, 0) for i in range(choices)], 1) for name, v in tokens.items()}


class Features(GraphWrapper):
    """``last_hidden_state``, ``(batch, sequence, hidden)``, and its mean over tokens, ``embedding``.

    Args:
        model: A model without a head, such as ``AutoModel`` gives; of an encoder-decoder the encoder is taken.
    """

    outputs = ("last_hidden_state", "embedding")
    per_token = ("last_hidden_state",)

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        paired = getattr(config, "is_encoder_decoder", False) and callable(getattr(model, "get_encoder", None))
        super().__init__(model.get_encoder() if paired else model)  # type: ignore[operator]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the features; arguments as in :meth:`GraphWrapper.forward`."""
        (states,) = self._take(self._read(input_ids, attention_mask, token_type_ids), "last_hidden_state")
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return states, (states * mask).sum(1) / mask.sum(1)


class LabelScores(GraphWrapper):
    """The ``scores`` of a cloze's labels, ``(batch, labels)``: only they leave the graph, never a whole vocabulary.

    Args:
        model: A masked or causal language model.
        words: Tokens of each label's words, ``(patterns, labels, words, masks)``, −1 where there is none, as
            :class:`~lightning_ft.modules.Cloze` has them.
    """

    outputs = ("scores",)

    def __init__(self, model: nn.Module, words: Tensor) -> None:
        super().__init__(model)
        self.words: Tensor
        self.register_buffer("words", words.cpu(), persistent=False)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        gap: Tensor,
        pattern: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the scores.

        Args:
            input_ids: ``(batch, sequence)``, int64.
            attention_mask: ``(batch, sequence)``, int64; 0 on padding.
            gap: Where the masks are, or the token before the word for a decoder: ``(batch, masks)``, int64.
            pattern: The number of each row's pattern, ``(batch,)``, int64.
            token_type_ids: ``(batch, sequence)``, int64; None for a model without them.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: value for name, value in inputs.items() if value is not None}
        return (label_scores(logits_at(self.model, given, gap), self.words[pattern]),)

    def axes(self, name: str) -> Mapping[int, str]:
        """The gap has as many places as words have tokens."""
        return {0: "batch"} if name in ("gap", "pattern") else super().axes(name)

    def sample(self, tokens: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Any tokens may be the gap."""
        mask = tokens["attention_mask"]
        patterns, masks = self.words.shape[0], self.words.shape[-1]
        gap = torch.multinomial(mask.float(), masks, replacement=True, generator=generator)
        pattern = torch.randint(patterns, (len(mask),), generator=generator)
        made = {**tokens, "gap": gap.sort(1).values, "pattern": pattern}
        order = ("input_ids", "attention_mask", "gap", "pattern", "token_type_ids")
        return {name: made[name] for name in order if name in made}


def graph_inputs(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Those of :data:`TOKENS` that the model reads and the tokenizer makes.

    ``token_type_ids`` is one of them unless the model has fewer than two types (DeBERTa-v2 accepts the
    argument and ignores it; GPT-2 accepts it, but its tokenizer makes none).
    """
    reads_types = (
        "token_type_ids" in inspect.signature(model.forward).parameters
        and getattr(getattr(model, "config", None), "type_vocab_size", 2) > 1
        and "token_type_ids" in tokenizer.model_input_names
    )
    return TOKENS if reads_types else TOKENS[:2]
