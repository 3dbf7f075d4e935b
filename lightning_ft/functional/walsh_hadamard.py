"""The Walsh-Hadamard transform, exact and differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    """As a matrix X of r rows: H x = (H_c (H_r X)ᵀ)ᵀ. Each addition is then over contiguous rows."""
    bits = values.shape[-1].bit_length() - 1
    rows = 1 << bits // 2
    matrix = values.reshape(-1, rows, values.shape[-1] // rows)
    first = _butterflies(matrix.clone(memory_format=torch.contiguous_format))
    second = _butterflies(first.transpose(1, 2).contiguous())
    return second.transpose(1, 2).reshape(values.shape)


def _butterflies(matrix: Tensor) -> Tensor:
    """H over the middle dimension, in place of ``matrix`` and one more of its size: two launches a factor of two."""
    count, size, width = matrix.shape
    source, target = matrix, torch.empty_like(matrix)
    half = 1
    while half < size:
        shape = (count * size // (2 * half), 2, half * width)
        pairs, sums = source.view(shape), target.view(shape)
        torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        source, target = target, source
        half *= 2
    return source
