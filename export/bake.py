"""Models whose weights are computed when they run, as models that hold them: adapters, pruning, parametrisations.

The user's model is never changed: what must be rewritten is copied first.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_ft.functional.masked_weights import check_masks, masked_weights
from lightning_ft.functional.peft_parts import follow_layout, is_adapter_layer
from lightning_ft.functional.quantise import dequantise
from lightning_ft.functional.quantised_layers import QuantisedLinear


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and ``AveragedModel``, whose weights are its own.

    Of an ``AveragedModel`` these are the averaged ones.
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, torch.optim.swa_utils.AveragedModel):
            model = model.module
        else:
            return model


def core_model(model: nn.Module) -> nn.Module:
    """The model inside a ``PeftModel``, which has the adapters in it and computes with them.

    Raises:
        ValueError: Its adapters are no part of the model's weights: they make prompts.
    """
    model = unwrapped(model)
    if not _is_peft(model):
        return model
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        kind = model.active_peft_config.peft_type.value  # type: ignore[union-attr]
        raise ValueError(
            f"source: {kind} puts learnt vectors before each text, which no weights can take in: give a `head` with a "
            "GraphWrapper that calls the PeftModel, or train LoRA, which can be merged"
        )
    return unwrapped(model.get_base_model())  # type: ignore[operator]


def baked(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A model that computes the same with plain weights.

    Weights in four or eight bits are floats again, adapters of peft are merged, masks of ``torch.nn.utils.prune`` and
    parametrisations of ``torch.nn.utils.parametrize`` (weight and spectral norm, LoRA by hand) are applied, and
    compiled parts are put back as they were written.

    Args:
        model: Left as it is.

    Returns:
        ``model`` itself where there is nothing to do, else a copy on the CPU; and what was done.

    Raises:
        ValueError: An adapter cannot be merged.
        RuntimeError: A mask of MovementPruning keeps another number of weights than was chosen.
    """
    found = list(_findings(model))
    if not found:
        return model, []
    copied = _copy(model)
    copied.eval()  # a spectral norm in training mode changes whenever it is read
    copied = _unwrap_inside(copied)
    dequantise(copied.cpu())
    follow_layout(copied)
    _merge(copied)
    applied: list[Tensor] = []
    if masked_weights(copied):
        check_masks(copied)
    for module in list(copied.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
        if parametrize.is_parametrized(module):
            _own_class(module)
            _apply_parametrizations(module, applied)
    return copied, sorted(set(found))


def _findings(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        if isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None:
            yield "compiled parts as they were written"
        if isinstance(module, QuantisedLinear):
            yield "quantised weights as floats"
        if is_adapter_layer(module):
            yield "adapters merged"
        if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            yield "pruning applied"
        if parametrize.is_parametrized(module):
            yield "parametrisations applied"


def _copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU. Tensors that a pruned layer computed last time, of which autograd knows, are not copied."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in known:
                value = parameter.detach().to("cpu", copy=True)
                known[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in known:
                known[id(buffer)] = buffer.detach().to("cpu", copy=True)
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().to("cpu", copy=True)
    return copy.deepcopy(model, known)


def _own_class(module: nn.Module) -> None:
    """Take a copied module out of the class that torch made for the original alone, and would take apart with it."""
    shared = type(module)
    content = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)


def _apply_parametrizations(module: nn.Module, applied: list[Tensor]) -> None:
    """Put plain weights in the place of computed ones. A tied weight, which several owners compute, is changed once."""
    for name, steps in list(module.parametrizations.items()):  # type: ignore[operator, union-attr]
        original = getattr(steps, "original", None)
        done = any(original is tensor for tensor in applied)
        parametrize.remove_parametrizations(module, name, leave_parametrized=not done)
        if original is not None and not done:
            applied.append(original)


def _unwrap_inside(model: nn.Module) -> nn.Module:
    """Compiled parts replaced by what they were compiled from."""
    for module in list(model.modules()):
        module._compiled_call_impl = None
        for name, child in list(module.named_children()):
            if (inner := unwrapped(child)) is not child:
                setattr(module, name, inner)
    return unwrapped(model)


# ---- adapters


def _is_peft(module: nn.Module) -> bool:
    # Without an import: where peft was never loaded, nothing is of peft.
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


def _merge(model: nn.Module) -> None:
    """Replace each adapter by the layer that it adapts, with the adapter's part in its weights."""
    for path, module in list(model.named_modules()):
        if not path or not is_adapter_layer(module):
            continue
        parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if not is_adapter_layer(parent):  # an adapter of an adapter goes with its outer one
            setattr(parent, name, _merged(path, module))
    for module in model.modules():
        with suppress(AttributeError):
            del module._hf_peft_config_loaded  # of a transformers model, to which an adapter was added


def _merged(path: str, module: Any) -> nn.Module:
    try:
        if hasattr(module, "unload_and_optionally_merge_module"):
            result = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True, adapter_names=None)
            result = module.get_base_layer()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"source: the adapter {type(module).__name__} at {path} cannot be merged into its layer ({error}): export "
            "the model without it, or train one that can be, such as LoRA"
        ) from error
    plain: nn.Module = result
    return plain


# ---- depth


def check_depth(model: nn.Module) -> None:
    """See that the configuration, which is written beside the graph, has as many layers as the model.

    Raises:
        ValueError: It has not.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
    except Exception:  # noqa: BLE001  code of whoever wrote the model's class; then nothing can be said
        return
    lists = {name: len(module) for name, module in twin.named_modules() if isinstance(module, nn.ModuleList)}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) != lists.get(name, len(module)):
            raise ValueError(
                f"model: its configuration says {lists[name]} layers, and {name} has {len(module)}: take layers out "
                "with lightning_ft.functional.layer_removal.remove_layers, or the callback LayerRemoval, which tell "
                "the configuration"
            )
