"""How far weights have moved from a reference, layer group by layer group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_ft.core.sharding import local, sum_of_squares

_PIECE = 1 << 16  # values handled at once on a CPU


@torch.no_grad()
def distances(groups: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    """‖θ − θ⁰‖ of each group, ``(groups,)``, in fp32 on the parameters' device; without host synchronisation.

    Differences are taken in the parameters' precision (the wider one, where the reference has another), squares summed
    in fp32, over all processes that share sharded parameters: call it on all of them. On an accelerator one fused pass
    a group, whose differences are held beside the weights meanwhile; on a CPU piece by piece.

    Args:
        groups: Of each group its parameters θ and their references θ⁰, in the same order; on any device.

    Example:
        >>> distances([([torch.tensor([4.0, 1.0])], [torch.tensor([1.0, 5.0])]), ([torch.ones(4)], [torch.zeros(4)])])
        tensor([5., 2.])
    """
    return torch.stack([_squared(theta, reference) for theta, reference in groups]).sqrt()


def _squared(parameters: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    theta = [local(p.detach()) for p in parameters]
    origin = [local(r) for r in references]
    if theta[0].device.type == "cpu":
        norms = [_norm_by_pieces(p, r) for p, r in zip(theta, origin, strict=True)]
        return sum_of_squares(norms, like=parameters)
    origin = [r.to(p.device, non_blocking=True) for p, r in zip(theta, origin, strict=True)]
    if any(p.dtype != r.dtype for p, r in zip(theta, origin, strict=True)):
        theta, origin = [p.float() for p in theta], [r.float() for r in origin]
    return sum_of_squares(torch._foreach_sub(theta, origin), like=parameters, dtype=torch.float32)


def _norm_by_pieces(theta: Tensor, origin: Tensor) -> Tensor:
    """‖θ − θ⁰‖ on a CPU: differences that stay in its cache cost a fifth of a temporary of the model's size."""
    pieces = [torch.split(tensor.reshape(-1), _PIECE) for tensor in (theta, origin.cpu())]
    pairs = zip(*pieces, strict=True)
    norms = [torch.linalg.vector_norm(p - r, dtype=torch.float32) for p, r in pairs]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
