"""The Walsh-Hadamard transform, exact and differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Buffers = tuple[Tensor, Tensor]
_CACHED = 2**19
"""Values of each of two buffers that a CPU's caches hold. Of up to 2²¹ values all passes in one go are faster."""


def walsh_hadamard(values: Tensor) -> Tensor:
    """H x over the last dimension, H₁ = (1), H₂ₙ = (Hₙ Hₙ; Hₙ −Hₙ): entries of ±1, no normalisation, H H = n I.

    n log₂ n additions and no multiplication, so that no setting of matrix precision touches it. H is symmetric: its
    derivative is itself.

    Args:
        values: x, shape (..., n) with n a power of two.

    Raises:
        ValueError: n is no power of two.

    Example:
        >>> walsh_hadamard(torch.tensor([1.0, 0.0, 2.0, 0.0]))
        tensor([ 3.,  3., -1., -1.])
    """
    size = values.shape[-1] if values.ndim else 0
    if size < 1 or size & (size - 1):
        raise ValueError(f"values has shape {tuple(values.shape)}: its last dimension must be a power of two")
    transformed: Tensor = _WalshHadamard.apply(values)  # type: ignore[no-untyped-call]
    return transformed


class _WalshHadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _transform(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return walsh_hadamard(gradients[0])


def _transform(values: Tensor) -> Tensor:
    """As a matrix X of r rows: H x = (H_c (H_r X)ᵀ)ᵀ. Each addition is then over contiguous rows.

    Two buffers serve all passes: on a CPU a fresh one costs more, in pages, than what is written into it.
    """
    bits = values.shape[-1].bit_length() - 1
    rows, columns = 1 << bits // 2, 1 << bits - bits // 2
    matrix = values.reshape(-1, rows, columns)
    if len(matrix) == 1 and matrix.numel() > 4 * _CACHED and matrix.device.type == "cpu":
        return _in_pieces(_in_pieces(matrix)).reshape(values.shape)
    spare = values.new_empty(matrix.shape), values.new_empty(matrix.shape)
    matrix, spare = _turned(*_butterflies(matrix, spare))
    matrix, _ = _turned(*_butterflies(matrix, spare))
    return matrix.reshape(values.shape)


def _butterflies(matrix: Tensor, spare: Buffers) -> tuple[Tensor, Buffers]:
    """H over the middle dimension, two launches a factor of two, and the buffers, the one to write into next first."""
    count, size, width = matrix.shape
    half = 1
    while half < size:
        target, other = spare
        shape = (count * size // (2 * half), 2, half * width)
        pairs, sums = matrix.reshape(shape), target.view(shape)
        torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        matrix, spare = target.view(count, size, width), (other, target)
        half *= 2
    return matrix, spare


def _in_pieces(matrix: Tensor) -> Tensor:
    """H over the rows of one large matrix, turned: a few columns at a time, which stay in the cache for all passes."""
    _, rows, columns = matrix.shape
    width = max(1, _CACHED // rows)
    target = matrix.new_empty(1, columns, rows)
    spare = matrix.new_empty(1, rows, width), matrix.new_empty(1, rows, width)
    for start in range(0, columns, width):
        sums, _ = _butterflies(matrix[:, :, start : start + width], spare)
        target[0, start : start + width].copy_(sums[0].t())
    return target


def _turned(matrix: Tensor, spare: Buffers) -> tuple[Tensor, Buffers]:
    """Rows and columns exchanged, and the buffers, the one to write into next first."""
    count, rows, columns = matrix.shape
    target = spare[0].view(count, columns, rows)
    if count == 1:  # torch copies a transposed matrix, but not a batch of them, block by block: nine times as fast
        target[0].copy_(matrix[0].t())
    else:
        target.copy_(matrix.transpose(1, 2))
    return target, (spare[1], spare[0])
