"""BitFit: of a pretrained model only the biases train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_ft.core.base_weights import base_names
from lightning_ft.core.layers import Layers, as_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.trained_part import train_only


def bit_fit(module: nn.Module, *, layers: Layers | Mapping[str, Any] | None = None) -> Report:
    """Train the biases, of norms too, and the head; all else is the frozen base.

    A bias is a parameter of which the last component of the name is exactly ``bias``, and the stacked bias of queries,
    keys and values in ``nn.MultiheadAttention``. (T5's ``relative_attention_bias.weight`` is a matrix of position
    weights.) The biases of layers with quantised weights are in floating point, and train.

    Args:
        module: Any module that holds the model.
        layers: Where the head is, if it is not found by itself.

    Returns:
        How many biases there are outside the head, and their share of the model's parameters outside it.

    Raises:
        ValueError: The model has no biases (Llama, T5, ModernBERT); another change froze the model before.

    Example:
        >>> import transformers
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        >>> bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
        >>> print(bit_fit(bert))
        BitFit
          biases: 320
          share: 0.02323
          trainable: 354
          parameters: 13,810

    Reference:
        Ben Zaken, Goldberg and Ravfogel 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
        Masked Language-models".
    """
    where = as_layers(layers)
    if base_names(module):
        raise ValueError(
            "BitFit says itself what of the pretrained model trains, and another change froze it already: list BitFit "
            "before the other callback"
        )
    groups = where.of(module)
    head = set(groups.head)
    biases = dict.fromkeys(p for _, p in named_biases(module) if p not in head)
    if not biases:
        raise ValueError(
            f"BitFit trains biases, and {type(module).__name__} has none outside its head (Llama, T5 and ModernBERT "
            "are made without): take LoRA or BottleneckAdapters, or Freeze('head', parameters=...) for its norms"
        )
    count = sum(p.numel() for p in biases)
    body = sum(p.numel() for p in module.parameters() if p not in head)
    return Report("BitFit", {"biases": count, "share": count / body, **train_only(module, biases, where)})


def named_biases(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every bias, under the names of ``module.named_parameters()``."""
    for path, child in module.named_modules():
        for name, parameter in child._parameters.items():
            stacked = name == "in_proj_bias" and isinstance(child, nn.MultiheadAttention)
            if parameter is not None and (name == "bias" or stacked):
                yield f"{path}.{name}".lstrip("."), parameter
