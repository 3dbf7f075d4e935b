"""A linear layer that computes with its weight divided by the largest singular value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def spectral_norm(weight: Tensor, *, squarings: int = 10) -> Tensor:
    """σ(W) = uᵀWv, the largest singular value, differentiable: ∂σ/∂W = u vᵀ.

    u is found by power iteration on the smaller Gram matrix, squared again and again (2¹⁰ iterations): without a draw,
    a state, or a wait for the device.

    Args:
        weight: ``(out, in)``.
        squarings: How often the Gram matrix is squared.

    Example:
        >>> round(spectral_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).item(), 5)
        4.0
    """
    weight = weight.float()
    with torch.no_grad():
        tall = weight.shape[0] > weight.shape[1]
        matrix = weight.T if tall else weight
        gram = matrix @ matrix.T
        for _ in range(squarings):
            gram = gram / gram.norm().clamp(min=1e-30)
            gram = gram @ gram
        # Of the columns, all multiples of u by now, the longest.
        u = gram[:, gram.diagonal().argmax()]
        u = u / u.norm().clamp(min=1e-30)
        v = matrix.T @ u
        v = v / v.norm().clamp(min=1e-30)
    return torch.dot(v, weight @ u) if tall else torch.dot(u, weight @ v)


def normalised(weight: Tensor) -> Tensor:
    """W / σ(W), in the type of W.

    Example:
        >>> normalised(torch.tensor([[0.0, 5.0]]))
        tensor([[0., 1.]])
    """
    return (weight / spectral_norm(weight).clamp(min=1e-12)).to(weight.dtype)


class NormalisedLayer:
    """Lets a linear layer compute with W/σ(W) while its parameter stays W; ends with :meth:`remove`.

    While ``forward`` runs the normalised weight stands before the parameter, in the layer's instance dictionary.

    Args:
        layer: The layer.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> normal = NormalisedLayer(layer)
        >>> round(layer(torch.eye(2)).norm().item(), 4)
        1.0
        >>> normal.remove()
        >>> round(layer.weight.norm().item(), 4)
        1.0
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._handles = [
            layer.register_forward_pre_hook(_put),
            layer.register_forward_hook(_take, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off, and leave W/σ(W) in the place of W: the layer computes what it computed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with torch.no_grad():
            self.layer.weight.copy_(normalised(self.layer.weight))


def _put(layer: nn.Module, args: Any) -> None:
    vars(layer)["weight"] = normalised(layer._parameters["weight"])  # type: ignore[arg-type]


def _take(layer: nn.Module, args: Any, output: Any) -> None:
    vars(layer).pop("weight", None)
