"""Batches of other sizes, without data, or made up from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ft.functional._batch_rows import map_tensors, row_count


def is_shapes(batch: Any) -> bool:
    """Whether this maps names to sizes, such as ``{"input_ids": (8, 128)}``."""
    sizes = batch.values() if isinstance(batch, Mapping) and batch else [None]
    return all(isinstance(size, tuple | list) and all(isinstance(n, int) for n in size) for size in sizes)


def example_batch(batch: Any, device: torch.device) -> Any:
    """A batch of the shapes and types of another, or token ids of given shapes, on a device."""
    if is_shapes(batch):
        return {name: torch.zeros(tuple(size), dtype=torch.int64, device=device) for name, size in batch.items()}
    return map_tensors(batch, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def batch_size(batch: Any) -> tuple[int, int] | None:
    """Rows, and tokens in each (0 if no integers have two dimensions); None for tensors of unequal rows."""
    rows, lengths = row_count(batch), []

    def note(tensor: Tensor) -> Tensor:
        if tensor.ndim > 1 and not tensor.is_floating_point():
            lengths.append(tensor.shape[1])
        return tensor

    map_tensors(batch, note)
    return None if rows is None else (rows, lengths[0] if lengths else 0)


def cut_batch(batch: Any, rows: int, length: int | None = None) -> Any:
    """The first rows of a batch, and of each the last ``length`` tokens: an end-of-sequence token stays."""
    size = batch_size(batch)
    assert size is not None

    def cut(tensor: Tensor) -> Tensor:
        tensor = tensor[:rows] if tensor.ndim else tensor
        for dim in range(1, tensor.ndim if length is not None else 0):
            if tensor.shape[dim] == size[1] and length is not None:
                tensor = tensor.narrow(dim, size[1] - length, length)
        return tensor.contiguous()  # as a collator makes it

    return map_tensors(batch, cut)
