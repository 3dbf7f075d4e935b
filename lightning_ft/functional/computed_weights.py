"""Pretrained weights that a frozen model reads with something added to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_ft.core.base_weights import base_names, mark_base
from lightning_ft.core.fresh import fresh_parameters
from lightning_ft.core.layers import as_layers
from lightning_ft.core.sharding import is_sharded

Named = dict[str, nn.Parameter]


def pretrained_weights(module: nn.Module, layers: Mapping[str, Any] | None, what: str) -> Named:
    """The parameters outside the head that train and are floating-point numbers, tied ones once, by name.

    Args:
        module: Its layers are looked for.
        layers: Where they are: the arguments of :class:`~lightning_ft.core.Layers`.
        what: Who asks, for messages.

    Raises:
        ValueError: There is none; the module is quantised or altered already; weights are sharded.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and not child.weight.is_floating_point():
            raise ValueError(
                f"{name} has quantised weights ({type(child).__name__}), and {what} computes with floats: load the "
                "model without quantisation, or train adapters over it (PEFT, BottleneckAdapters)"
            )
    if altered := base_names(module):
        raise ValueError(
            f"{what} changes what pretrained weights are read as, and {type(module).__name__} is altered already "
            f"({len(altered)} of its tensors are a frozen base): use one such method at a time"
        )
    groups = as_layers(layers).of(module)
    fresh = fresh_parameters(module)
    found = {
        name: parameter
        for group in groups
        if group != "head"
        for name, parameter in groups.named_parameters(group)
        if parameter.is_floating_point() and parameter.requires_grad and parameter.numel() and parameter not in fresh
    }
    if not found:
        raise ValueError(
            f"{what} found no pretrained parameter that trains: everything outside the head of "
            f"{type(module).__name__} is frozen or quantised"
        )
    if sharded := [name for name, p in found.items() if is_sharded(p)]:
        raise ValueError(f"{what} computes whole weights, and {sharded[0]} is sharded: use DDP or one device")
    return found


def compute_weights(module: nn.Module, weights: Named, make: Callable[[int, nn.Parameter], nn.Module]) -> None:
    """Let each weight be read through a parametrisation of its own, and freeze what is below as the base.

    All owners of a tied weight get the same one.

    Args:
        module: Where the owners are looked for.
        weights: What is to be computed.
        make: The parametrisation of the i-th weight; it may keep parameters of its own.

    Raises:
        ValueError: A recurrent layer, which keeps lists of its weights and would never read the computed ones.
    """
    chosen = set(weights.values())
    owners = [
        (child, name, parameter)
        for child in module.modules()
        for name, parameter in child._parameters.items()
        if parameter is not None and parameter in chosen
    ]
    for child, _, _ in owners:
        if isinstance(child, nn.RNNBase):
            raise ValueError(
                f"{type(child).__name__} keeps its weights in a list of its own, and would not see computed ones: "
                "freeze it first (requires_grad_(False)), so that it is left alone"
            )
    made = {parameter: make(i, parameter) for i, parameter in enumerate(weights.values())}
    for child, name, parameter in owners:
        # `unsafe` spares a computation of each weight as a check.
        parametrize.register_parametrization(child, name, made[parameter], unsafe=True)
    mark_base(module, made)


def size_of(weights: Named) -> int:
    """Number of values."""
    return sum(parameter.numel() for parameter in weights.values())


def once_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.autograd.function.once_differentiable``, typed."""
    wrapped: Callable[..., Any] = torch.autograd.function.once_differentiable(function)
    return wrapped
