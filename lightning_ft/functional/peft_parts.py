"""What lies where in a module that is adapted by peft: the transformer, its head, its linear layers, the adapters."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_ft.core.layers import Layers

TUNER = "_lightning_ft_peft_tuner"
"""Attribute of an adapted model that holds peft's object for it."""


def find_transformer(module: nn.Module, path: str | None, layers: Layers) -> tuple[str, nn.Module]:
    """The module that is adapted, and its path.

    Raises:
        ValueError: There is none, or several, or none at ``path``.
    """
    models = _outermost_models(module)
    if path is not None:
        known = dict(module.named_modules())
        if path not in known:
            raise ValueError(f"module={path!r} is no submodule; models of transformers: {', '.join(models) or 'none'}")
        return path, known[path]
    if len(models) > 1:
        raise ValueError(
            f"module= must say which model to adapt: {type(module).__name__} has {', '.join(models)}; write "
            f"module={next(iter(models))!r}"
        )
    if models:
        return next(iter(models.items()))
    try:
        layers.of(module)
    except ValueError as error:
        raise ValueError(
            f"no transformer found in {type(module).__name__}: it holds no model of transformers, and {error}. Say "
            'module="path.to.the.network"'
        ) from error
    return "", module


def _outermost_models(module: nn.Module) -> dict[str, nn.Module]:
    # Without an import: where transformers was never loaded, nothing is of it.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return {}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if isinstance(child, modeling.PreTrainedModel) and not any(
            f"{name}.".startswith(f"{o}.") or not o for o in found
        ):
            found[name] = child
    return found


def head_parameters(module: nn.Module, transformer: nn.Module, layers: Layers) -> set[nn.Parameter]:
    """The head's, without a language model's output layer, which is pretrained, unless ``layers`` names the head."""
    groups = layers.of(module)
    head = set(groups.head)
    if layers.head is not None or layers.groups is not None:
        return head
    output = getattr(transformer, "get_output_embeddings", lambda: None)()
    return head - (set(output.parameters()) if isinstance(output, nn.Module) else set())


def head_modules(transformer: nn.Module, head: Collection[nn.Parameter]) -> list[str]:
    """Paths of the largest modules inside a model that hold nothing but the head's parameters."""
    found: list[str] = []
    for name, child in transformer.named_modules():
        own = set(child.parameters())
        if name and own and own <= set(head) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def linear_names(transformer: nn.Module, head: Collection[nn.Parameter]) -> list[str]:
    """Names of the linear layers (of torch, of bitsandbytes, Conv1D of transformers) outside the head."""
    conv = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    attention = {p for m in transformer.modules() if isinstance(m, nn.MultiheadAttention) for p in m.parameters()}
    output = getattr(transformer, "get_output_embeddings", lambda: None)()
    apart = set(head) | attention | (set(output.parameters()) if isinstance(output, nn.Module) else set())
    return [
        name
        for name, child in transformer.named_modules()
        if isinstance(child, nn.Linear | conv) and not set(child.parameters()) & apart
    ]


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether a layer is one that peft has put in another's place."""
    utils, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    kinds = getattr(utils, "BaseTunerLayer", None), getattr(other, "AuxiliaryTrainingWrapper", None)
    return any(kind is not None and isinstance(module, kind) for kind in kinds)


def follow_layout(module: nn.Module) -> None:
    """Tell adapters how their layers store weights: a ``Conv1D`` was an ``nn.Linear`` while it was quantised."""
    layers: list[Any] = [child for child in module.modules() if is_adapter_layer(child)]
    for layer in layers:
        if hasattr(layer, "fan_in_fan_out"):
            layer.fan_in_fan_out = type(layer.get_base_layer()).__name__ == "Conv1D"


def adapter_parameters(module: nn.Module) -> set[nn.Parameter]:
    """What peft has added to a module: adapters, prompts, copies of ``modules_to_save``."""
    found: set[nn.Parameter] = set()
    for child in module.modules():
        if is_adapter_layer(child) or getattr(child, "is_lightning_ft_prompts", False):
            inner = getattr(child, "base_layer", None) or getattr(child, "original_module", None)
            found |= set(child.parameters()) - set(inner.parameters() if isinstance(inner, nn.Module) else ())
    return found


def second_factors(transformer: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The B of all LoRA layers, whose learning rate LoRA+ sets apart."""
    pairs = [getattr(child, "lora_B", None) for child in transformer.modules() if is_adapter_layer(child)]
    return [
        p
        for layers in pairs
        if isinstance(layers, nn.ModuleDict) and adapter in layers
        for p in layers[adapter].parameters()
    ]


def tuner_of(transformer: nn.Module) -> Any:
    """The object of peft that manages the adapters in a model; None where there are none, or prompts only."""
    return vars(transformer).get(TUNER)
