"""How far weights have moved from a reference, layer group by layer group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_ft.core.sharding import local, sum_of_squares


@torch.no_grad()
def distances(groups: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    """‖θ − θ⁰‖ of each group, ``(groups,)``, in fp32 on the parameters' device; without host synchronisation.

    Differences are taken in the parameters' precision (fp32 where the reference has another one), squares summed in
    fp32, over all processes that share sharded parameters: call it on all of them. One fused pass a group, whose
    differences are all that is held beside the weights.

    Args:
        groups: Of each group its parameters θ and their references θ⁰, in the same order; on any device.

    Example:
        >>> distances([([torch.tensor([4.0, 1.0])], [torch.tensor([1.0, 5.0])]), ([torch.ones(4)], [torch.zeros(4)])])
        tensor([5., 2.])
    """
    return torch.stack([_squared(theta, reference) for theta, reference in groups]).sqrt()


def _squared(parameters: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    theta = [local(p.detach()) for p in parameters]
    origin = [local(r).to(p.device, non_blocking=True) for p, r in zip(theta, references, strict=True)]
    if any(p.dtype != r.dtype for p, r in zip(theta, origin, strict=True)):
        theta, origin = [p.float() for p in theta], [r.float() for r in origin]
    return sum_of_squares(torch._foreach_sub(theta, origin), like=parameters, dtype=torch.float32)
