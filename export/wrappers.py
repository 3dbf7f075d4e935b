"""What of a model goes into a graph: positional tensors in, a tuple of named tensors out.

``torch.export`` needs an explicit signature (a ``**kwargs`` forward fails) and plain outputs (a cache object
among them fails), so each kind of head has one wrapper here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class GraphWrapper(nn.Module, ABC):
    """A model with the signature of its graph.

    Args:
        model: The model to call. It is a submodule, never a copy.
    """

    outputs: ClassVar[tuple[str, ...]]
    """Names of the tensors that ``forward`` returns."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

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
        # Named only when given: DistilBERT's forward has no such argument.
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **types)
        if "logits" not in output:
            raise TypeError(
                f"model: expected one whose output has logits, got {type(self.model).__name__}: "
                "load it with AutoModelForSequenceClassification"
            )
        return (output.logits,)


def graph_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Names of the inputs that the model reads and the tokenizer makes, in a wrapper's order.

    ``token_type_ids`` is one of them unless the model has fewer than two types (DeBERTa-v2 accepts the
    argument and ignores it; GPT-2 accepts it, but its tokenizer makes none).
    """
    reads_types = (
        "token_type_ids" in inspect.signature(model.forward).parameters
        and getattr(model.config, "type_vocab_size", 2) > 1
        and "token_type_ids" in tokenizer.model_input_names
    )
    return ("input_ids", "attention_mask", *(("token_type_ids",) if reads_types else ()))
