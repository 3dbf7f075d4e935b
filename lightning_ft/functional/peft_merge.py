"""Adapters of peft as a part of the weights: a plain model that computes the same."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lightning_ft.core.base_weights import unmark_base
from lightning_ft.core.report import Report
from lightning_ft.functional.alterations import forget
from lightning_ft.functional.peft_methods import _do_nothing
from lightning_ft.functional.peft_parts import TUNER, follow_layout, is_adapter_layer
from lightning_ft.functional.peft_prompts import prompts_of


def merge(module: nn.Module, *, dequantise: bool = False) -> Report:
    """Merge the adapter that acts into the weights, in place, and take all of peft out of the module.

    W ← W + (α/r)BA and the like. Its checkpoints are whole ones from then on. For a copy:
    ``merge(copy.deepcopy(module))``.

    Args:
        module: The adapted module.
        dequantise: Put floating-point layers in place of quantised ones first: those with which the adapter was
            trained. Merged into quantised weights, the adapter's part would be rounded away with them.

    Returns:
        How many layers were merged.

    Raises:
        ValueError: There is no adapter, or it makes prompts, which no weights can take in; the base is quantised.

    Example:
        >>> merge(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: module: Linear has no adapter of peft to merge
    """
    found = [child for child in module.modules() if is_adapter_layer(child)]
    if (prompts := prompts_of(module)) is not None:
        kind = next(iter(prompts.configs.values())).peft_type.value
        raise ValueError(f"module: {kind} puts learnt vectors before each text, which no weights can take in: use LoRA")
    if not found:
        raise ValueError(f"module: {type(module).__name__} has no adapter of peft to merge")
    names = [adapter for layer in found for adapter in getattr(layer, "active_adapters", ())]
    if quantised := _quantised(module):
        if not dequantise:
            raise ValueError(
                f"module: {len(quantised)} layers are quantised ({quantised[0]}), and would round the adapter away: "
                "merge(module, dequantise=True) puts floating-point layers in their place"
            )
        _dequantise(module)
        forget(module, "quantise")
    for owner in [child for child in module.modules() if TUNER in vars(child)]:
        _merge_model(owner)
    forget(module, "peft")
    unmark_base(module)
    vars(module).pop("_lightning_ft_peft_heads", None)
    return Report(
        "Adapter merged", {"adapters": sorted(set(names)), "layers": len(found), "dequantised": len(quantised)}
    )


def plain_model(model: Any) -> Any:
    """A model without adapters that computes the same: itself, or a merged copy.

    Raises:
        ValueError: Its adapters make prompts.
    """
    if TUNER not in vars(model) and prompts_of(model) is None:
        return model
    copied = copy.deepcopy(model)
    merge(copied, dequantise=True)
    return copied


def _merge_model(model: Any) -> None:
    tuner = vars(model).pop(TUNER)
    tuner.merge_and_unload(safe_merge=True)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    for child in model.modules():
        for key in [key for key, hook in child._forward_pre_hooks.items() if hook is _do_nothing]:
            del child._forward_pre_hooks[key]
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)


def _quantised(module: nn.Module) -> list[str]:
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not is_adapter_layer(child) and not child.weight.is_floating_point()
    ]


def _dequantise(module: nn.Module) -> None:
    from lightning_ft.functional.quantise import dequantise

    dequantise(module)
    follow_layout(module)
    if left := _quantised(module):
        raise ValueError(
            f"module: {left[0]} was quantised by another package, so its floating-point weights are not at hand: load "
            "the model without quantisation, and the adapter over it (save_adapter, load_adapter)"
        )
