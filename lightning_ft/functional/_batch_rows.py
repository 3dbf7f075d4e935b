"""Rows of a batch that somebody else's data made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each of its tensors changed; what is no tensor is the same object."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = copy.copy(batch)
        for name, value in batch.items():
            changed[name] = map_tensors(value, change)  # type: ignore[index]  # all that collators make are mutable
        return changed
    if isinstance(batch, list | tuple) and any(isinstance(part, Tensor | Mapping | list | tuple) for part in batch):
        parts = [map_tensors(part, change) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def row_count(batch: Any) -> int | None:
    """The first dimension that all tensors of a batch share; None where they share none."""
    sizes = {len(tensor) for tensor in _tensors(batch) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def first_size(batch: Any) -> int | None:
    """The first dimension of the first tensor."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), None)


def take_rows(batch: Any, rows: slice, of: int) -> Any:
    """Some rows of a batch of ``of`` rows: of each tensor and list of values of that length. The rest is kept."""
    if isinstance(batch, Mapping):
        taken = copy.copy(batch)
        for name, value in batch.items():
            taken[name] = take_rows(value, rows, of)  # type: ignore[index]
        return taken
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and len(batch) == of else batch
    if isinstance(batch, list | tuple):
        if any(isinstance(part, Tensor | Mapping) for part in batch):
            parts = [take_rows(part, rows, of) for part in batch]
            return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        return batch[rows] if len(batch) == of else batch
    return batch


def prepare(batch: Any, device: torch.device) -> Any:
    """The batch on a device, in fp32, and such that autograd may keep it: not so what was made in inference mode."""

    def move(tensor: Tensor) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        moved = tensor.to(device, torch.float32 if half else tensor.dtype)
        return moved.clone() if moved.is_inference() else moved

    return map_tensors(batch, move)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)
