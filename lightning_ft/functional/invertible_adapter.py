"""MAD-X's invertible adapter: a language's own token embeddings, going in and, inverted, coming out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.adapter_layers import CHILD, Bottleneck, BottleneckConfig


class Coupling(nn.Module):
    """o₁ = e₁ + F(e₂), o₂ = e₂ + G(o₁), on the halves of an embedding: invertible, and at first the identity.

    F and G are bottlenecks of half the width, each with its own reduction (MAD-X: 2).

    Args:
        width: Of the embedding; even.
        config: Of F and G, complete.
        generator: Of the first weights.
        like: A tensor on the device where it is to be.

    Raises:
        ValueError: The width is odd.

    Example:
        >>> config = BottleneckConfig(2, "relu", "bert", 1.0)
        >>> coupling = Coupling(8, config, torch.Generator().manual_seed(0), torch.zeros(1))
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(coupling.inverse(coupling(x)), x, atol=1e-6)
        True

    Reference:
        Dinh, Krueger and Bengio 2015, "NICE: Non-linear Independent Components Estimation"; Pfeiffer, Vulić, Gurevych
        and Ruder 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer".
    """

    def __init__(self, width: int, config: BottleneckConfig, generator: torch.Generator, like: Tensor) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"an invertible adapter halves the embedding, whose width must be even and is {width}")
        self.first = Bottleneck(width // 2, config, generator, like)
        self.second = Bottleneck(width // 2, config, generator, like)

    def forward(self, embedded: Tensor) -> Tensor:
        """Of the tokens' embeddings."""
        one, two = embedded.chunk(2, -1)
        one = one + self.first(two)
        return torch.cat([one, two + self.second(one)], -1)

    def inverse(self, hidden: Tensor) -> Tensor:
        """What goes to the output layer that shares the embedding's weights."""
        one, two = hidden.chunk(2, -1)
        two = two - self.second(one)
        return torch.cat([one - self.first(two), two], -1)


class Couplings(nn.Module):
    """The invertible adapters behind an embedding, and which of them are at work, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []

    def names(self) -> list[str]:
        """Of the adapters."""
        return list(self._modules)

    def forward(self, embedded: Tensor) -> Tensor:
        """The embeddings of tokens, adapted."""
        for name in self.active:
            embedded = self._modules[name](embedded)  # type: ignore[misc]
        return embedded

    def inverse(self, hidden: Tensor) -> Tensor:
        """All of them inverted, the last one first."""
        for name in reversed(self.active):
            hidden = self._modules[name].inverse(hidden)  # type: ignore[union-attr, operator]
        return hidden


class _Invert:
    """Forward pre-hook of an output layer."""

    def __init__(self, couplings: Couplings) -> None:
        self.couplings = couplings

    def __call__(self, module: nn.Module, args: Any) -> Any:
        return (self.couplings.inverse(args[0]), *args[1:])


def _follow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    adapted: Tensor = module.adapters(output)  # type: ignore[operator]
    return adapted


def couplings_at(module: nn.Module, embedding: nn.Embedding) -> Couplings:
    """The invertible adapters of an embedding: behind every embedding, before every other layer, with its weights."""
    if isinstance(known := getattr(embedding, CHILD, None), Couplings):
        return known
    couplings = Couplings()
    for child in list(module.modules()):
        if child._parameters.get("weight") is embedding.weight:
            if isinstance(child, nn.Embedding):
                child.add_module(CHILD, couplings)
                child.register_forward_hook(_follow)
            else:
                child.register_forward_pre_hook(_Invert(couplings))
    return couplings


def all_couplings(module: nn.Module) -> list[Couplings]:
    """Every one in a module."""
    return [child for child in module.modules() if isinstance(child, Couplings)]
