"""Bytes that a model keeps for backward, at any batch size and length, from a few small forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_ft.functional.batch_shapes import batch_size, cut_batch

_LONGEST = 64  # tokens of the longest small pass


@contextmanager
def count_saved(without: Iterable[Tensor], counts: list[int]) -> Iterator[None]:
    """Append the bytes of the storages that autograd keeps within the block, but for those of ``without``.

    What is kept is held until then, so that no storage takes the place of another. Blocks under activation
    checkpointing keep their inputs alone.

    Example:
        >>> import torch
        >>> weight, counts = torch.ones(3, requires_grad=True), []
        >>> with count_saved([weight], counts):
        ...     _ = (weight * 2).exp()
        >>> counts
        [12]
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in without}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    counts.append(sum(storage.nbytes() for storage in seen.values()))


def fit_activations(run: Callable[[Any], Any], batch: Any, weights: Iterable[Tensor]) -> int:
    """Bytes kept for backward of a batch: a + B (b + c T + d T²), for B rows of T tokens.

    The four terms are those of constants, of what is kept for a row (a pooled state), for a token (hidden states) and
    for a pair of tokens (attention weights). They are solved from forward passes of one and two rows, at three lengths.

    Args:
        run: Runs the forward pass of a batch.
        batch: The batch, whose first rows and last tokens are used.
        weights: Parameters and buffers, which are kept anyway.

    Raises:
        ValueError: The batch has no rows that it could be cut into.
    """
    size, weights = batch_size(batch), list(weights)
    if size is None:
        raise ValueError("batch must hold tensors with the same number of rows to be cut into smaller ones")
    rows, length = size
    longest = min(length, _LONGEST)
    lengths = sorted({max(1, longest // 4), max(1, longest // 2), longest}) if length else [0]
    counts: list[int] = []
    powers = [[1.0, *(float(t) ** n for n in range(len(lengths)))] for t in lengths]
    points = [(1, lengths[0], powers[0])]
    if rows > 1:
        points += [(2, t, power) for t, power in zip(lengths, powers, strict=True)]
    else:
        points += [(1, t, power) for t, power in zip(lengths[1:], powers[1:], strict=True)]
    for b, t, _ in points:
        with count_saved(weights, counts):
            kept = run(cut_batch(batch, b, t if length else None))
        del kept
    terms = [[power[0], *(b * value for value in power[1:])] for b, _, power in points]
    solved = torch.linalg.lstsq(
        torch.tensor(terms, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)[:, None], driver="gelsd"
    ).solution.flatten()
    wanted = [1.0, *(rows * float(length) ** n for n in range(len(lengths)))]
    return round(float(solved @ torch.tensor(wanted, dtype=torch.float64)))
