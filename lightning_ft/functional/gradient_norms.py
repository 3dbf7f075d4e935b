"""Gradient norms of layer groups, without waiting for the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_ft.core.sharding import is_piece, is_sharded, local, sum_of_squares

ABSENT = -1.0
"""What stands for a group of which nothing has a gradient."""


@torch.no_grad()
def group_squares(groups: Mapping[str, Sequence[nn.Parameter]], held: Collection[nn.Parameter]) -> Tensor:
    """Squared gradient norms of groups of parameters, ``(groups,)`` in fp32, in one fused pass.

    Under FSDP2 each group takes a collective: call on all processes.

    Args:
        groups: Parameters by group.
        held: Those that count, such as an optimiser's; frozen ones do not.

    Returns:
        On the gradients' device; below 0 for groups without a gradient.

    Raises:
        ValueError: FSDP1, whose processes hold pieces that do not know what they are of.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> group_squares({"block.0": [], "head": [weight]}, {weight})
        tensor([-1., 25.])
    """
    live = [[p for p in members if p in held and p.requires_grad and p.grad is not None] for members in groups.values()]
    everyone = [p for members in live for p in members]
    if any(is_piece(p) for p in everyone):
        raise ValueError(
            "FSDP1 shares layers out in pieces without a norm of their own: use FSDP2 (fully_shard), or DDP"
        )
    if not everyone:
        return torch.full((len(live),), ABSENT)
    device = everyone[0].device
    if any(is_sharded(p) for p in everyone):
        sums = [sum_of_squares([_grad(p) for p in own], like=own, dtype=torch.float32) for own in live if own]
        squares = torch.stack([one.to(device) for one in sums])
    else:
        norms = torch._foreach_norm([_grad(p) for p in everyone], dtype=torch.float32)
        all_squares = torch.stack([norm.to(device) for norm in norms]).square()
        parts = torch.split(all_squares, [len(own) for own in live if own])
        squares = torch.stack([part.sum() for part in parts])
    found = iter(squares.unbind())
    absent = squares.new_full((), ABSENT)
    return torch.stack([next(found) if own else absent for own in live])


def joined(one: Tensor | None, other: Tensor) -> Tensor:
    """Of two optimisers' parts of the same groups the whole."""
    if one is None:
        return other
    return torch.where(one < 0, other, torch.where(other < 0, one, one + other))


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    grad = local(parameter.grad)
    return grad.coalesce().values() if grad.is_sparse else grad
