"""AdapterFusion: attention over what several trained adapters would add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.core.layers import Layers, as_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.adapter_layers import all_adapters, linear
from lightning_ft.functional.bottleneck import active_adapters, adapter_parameters, freeze, use_adapters
from lightning_ft.functional.invertible_adapter import all_couplings
from lightning_ft.functional.trained_part import train_only


class Fusion(nn.Module):
    """Σₙ αₙ V zₙ with α = softmaxₙ(Q h · K zₙ): h is the adapters' input, zₙ what the n-th would add.

    V = I + ΔV, with ΔV = 0 at first: the adapters' own output, and weight decay pulls V to the identity, as the
    paper's penalty does. Q and K are drawn from N(0, 0.02²).

    Args:
        width: Of h and zₙ.
        generator: Of the first weights.
        like: A tensor on the device where it is to be.
    """

    def __init__(self, width: int, generator: torch.Generator, like: Tensor) -> None:
        super().__init__()
        self.query, self.key = (
            linear(torch.empty(width, width).normal_(0, 0.02, generator=generator), like) for _ in range(2)
        )
        self.value_delta = nn.Parameter(torch.zeros(width, width, device=like.device))

    def forward(self, hidden: Tensor, added: Sequence[Tensor]) -> Tensor:
        """What is to be added in place of one of ``added``, each ``(…, width)``."""
        dtype = self.value_delta.dtype
        stacked = torch.stack([part.to(dtype) for part in added], -2)
        scores = self.key(stacked) @ self.query(hidden.to(dtype)).unsqueeze(-1)
        weights = scores.float().softmax(-2).to(dtype)
        mixed = (weights * stacked).sum(-2)
        result: Tensor = mixed + mixed @ self.value_delta.T
        return result.to(hidden.dtype)


def add_fusion(
    module: nn.Module,
    *,
    names: Sequence[str],
    below: Sequence[str] = (),
    seed: int = 0,
    layers: Layers | Mapping[str, Any] | None = None,
) -> Report:
    """y ← y + Σₙ αₙ V zₙ at each place of these adapters, which freeze: the fusion and the head train.

    α is a softmax over the adapters, of the products of a query made of their input h and keys made of what each would
    add, zₙ (:class:`Fusion`). Of one adapter it is, at first, just that adapter; of several it is no identity.

    Args:
        module: A module that has the adapters, trained.
        names: Of the adapters to fuse, all at the same places.
        below: Adapters at work below the fusion (a language's).
        seed: Of the first weights of queries and keys.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Returns:
        The places, and how many parameters train.

    Raises:
        ValueError: There are no such adapters; they are at different places; there is a fusion already.

    Reference:
        Pfeiffer, Kamath, Rücklé, Cho and Gurevych 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer
        Learning".
    """
    fused, where = list(names), as_layers(layers)
    use_adapters(module, [*below, *fused])  # refuses unknown names
    if two := [name for couplings in all_couplings(module) for name in couplings.names() if name in fused]:
        raise ValueError(
            f"names={fused!r}: {', '.join(two)} changes the token embeddings, of which there can be no mixture; put it "
            "below the fusion (below=)"
        )
    freeze(adapter_parameters(module))
    generator = torch.Generator().manual_seed(seed)
    made: list[nn.Parameter] = []
    rows = []
    for path, adapters in all_adapters(module):
        here = [name for name in fused if name in adapters.names()]
        if not here:
            continue
        if here != fused:
            raise ValueError(f"names={fused!r} must be at the same places, and at {path} are {', '.join(here)} alone")
        if adapters.fused:
            raise ValueError(f"there is a fusion already, of {', '.join(adapters.fused)}: a model has one")
        fusion = Fusion(adapters.width, generator, next(adapters.parameters()))
        adapters.add_module("fusion", fusion)
        adapters.fused = fused
        made += fusion.parameters()
        rows.append({"place": path, "parameters": sum(p.numel() for p in fusion.parameters())})
    use_adapters(module, [*below, fused])
    sizes = train_only(module, made, where)
    return Report("AdapterFusion", {"adapters": fused, "stack": active_adapters(module), **sizes}, rows)
