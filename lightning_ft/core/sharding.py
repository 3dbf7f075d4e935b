"""What a model looks like to those who speak of its parts, when it is sharded: wrappers, names, whole shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes under which FSDP1 and activation checkpointing keep the module that they stand for."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that a wrapper of FSDP1 or of activation checkpointing stands for."""
    while inner := next((module._modules[name] for name in _WRAPPERS if module._modules.get(name) is not None), None):
        module = inner
    return module


def plain_class(module: nn.Module) -> type:
    """The class of a module without what wraps it, and before FSDP2 or a parametrisation put its own in front."""
    cls = type_before_parametrizations(unwrapped(module))
    index = getattr(cls, "_orig_cls_mro_index", None)
    return cls if index is None else cls.__mro__[index]


def plain_name(name: str) -> str:
    """A parameter's or module's name without the wrappers in it, as in ``module.state_dict()``."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_plain_modules(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()`` as it was before wrapping: no wrapper in it, nor in any name."""
    for name, child in module.named_modules(remove_duplicate=remove_duplicate):
        if unwrapped(child) is child:
            yield plain_name(name), child


def named_plain_parameters(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """``module.named_parameters()`` under the names that it had before wrapping."""
    for name, parameter in module.named_parameters(remove_duplicate=remove_duplicate):
        yield plain_name(name), parameter


def full_shapes(module: nn.Module) -> dict[nn.Parameter, torch.Size]:
    """The shape of each whole parameter of ``module``, of which a process may hold a piece, or nothing.

    FSDP2's parameters (``DTensor``) tell their whole shape themselves. FSDP1's are local 1-D pieces; their shapes are
    in the wrappers: those inside ``module``, and the one that Lightning's ``FSDPStrategy`` puts around it.

    Raises:
        ValueError: FSDP1 with ``use_orig_params=False``, which melts the parameters of many layers into one; a piece
            whose wrapper cannot be reached.
    """
    parameters = list(module.parameters())
    if any(getattr(p, "_is_flat_param", False) for p in parameters):
        raise ValueError(
            "FullyShardedDataParallel(use_orig_params=False) melts the parameters of a whole unit into one, of which "
            "no part can have a depth, a rate or a frozen state of its own: wrap with use_orig_params=True (the "
            "default of Lightning's FSDPStrategy), or use FSDP2 (fully_shard)"
        )
    shapes = {p: p.shape for p in parameters if not is_piece(p)}
    if len(shapes) < len(parameters):
        known = dict(_pieces([module, *_around(module)]))
        if lost := sum(p not in shapes and p not in known for p in parameters):
            raise ValueError(
                f"module must hold the FSDP1 wrappers of its parameters: {lost} of {len(parameters)} are pieces of "
                "unknown shape; pass the module that FullyShardedDataParallel returned"
            )
        shapes |= {p: known[p] for p in parameters if p in known}
    return shapes


def is_piece(parameter: Tensor) -> bool:
    """Whether a parameter is FSDP1's: a 1-D piece that does not know its whole shape."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of a parameter alone, FSDP1's or FSDP2's."""
    return is_piece(parameter) or hasattr(parameter, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a ``DTensor``, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sum_of_squares(
    tensors: Sequence[Tensor], *, like: Sequence[Tensor] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The sum of squares of all values, over all processes that share them; differentiable.

    Call on all of those processes. One collective for each way of sharding; none where nothing is sharded.

    Args:
        tensors: Local parts (:func:`local`) or whole tensors.
        like: Parameters that are sharded as ``tensors`` are; by default the tensors themselves.
        dtype: In which to sum; by default the tensors' own.
    """
    parts: dict[Any, list[Tensor]] = {}
    models: Sequence[Any] = like or tensors
    for tensor, model in zip(tensors, models, strict=True):
        parts.setdefault(_sharing(model), []).append(local(tensor))
    sums = [
        _over_processes(torch.stack(torch._foreach_norm(part, dtype=dtype)).square().sum(), key)
        for key, part in parts.items()
    ]
    return torch.stack(sums).sum()


def squares_over_processes(squares: Sequence[Tensor], *, like: Sequence[Tensor]) -> float:
    """The sum of what each process found for its own part of each tensor. Call on all processes.

    Args:
        squares: 0-D and on the CPU, one a tensor.
        like: Tensors that are sharded as those are.
    """
    parts: dict[Any, list[float]] = {}
    for square, model in zip(squares, like, strict=True):
        parts.setdefault(_sharing(model), []).append(float(square))
    sums = []
    for key, part in parts.items():
        device = None if key is None else key[0].device_type
        sums.append(float(_over_processes(torch.tensor(math.fsum(part), dtype=torch.float64, device=device), key)))
    return math.fsum(sums)


def _sharing(tensor: Any) -> Any:
    # HSDP, tensor parallelism: each mesh and placement has its own processes to sum over.
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "device_mesh") else None


def _over_processes(total: Tensor, key: Any) -> Tensor:
    if key is None:
        return total
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = key
    shares = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    summed: Tensor = DTensor.from_local(total, mesh, shares, run_check=False).full_tensor()
    return summed


def _pieces(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Parameter, torch.Size]]:
    for root in modules:
        for child in root.modules():
            # The handle is FSDP1's only record of what it flattened.
            flat: Any = getattr(vars(child).get("_handle"), "flat_param", None)
            if flat is not None and flat._params is not None:
                yield from zip(flat._params, flat._shapes, strict=True)


def _around(module: nn.Module) -> list[nn.Module]:
    """The wrapper outside a LightningModule, which only its trainer's strategy holds."""
    model = getattr(getattr(getattr(module, "_trainer", None), "strategy", None), "model", None)
    return [model] if isinstance(model, nn.Module) else []
