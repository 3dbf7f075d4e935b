"""Losses that are both climbed by a perturbation and learned from, by one backward pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from lightning_ft.functional.passes import Seen
from lightning_ft.functional.perturbation import differentiate, gradient_of, or_zeros
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings


class ClimbedLosses:
    """Adds up losses, each of which says in passing where its perturbation δ should go.

    ∂loss/∂δ and the gradients of the weights come from one backward pass, after which nothing holds the graph any more.
    :meth:`total` hands the weights' gradients on when it is differentiated: accumulation, loss scales, clipping and DDP
    meet the sum of the losses, and one backward pass.

    A graph is kept, and only ∂loss/∂δ taken from it, where gradients are better not taken ahead of time: in fp16, whose
    loss scale has to reach every layer; under FSDP2, which has the whole gradient of one layer at a time, and never of
    all; for weights with hooks on their gradient (to see the whole of it), on another device than the loss, or of a
    tensor class of their own.

    Args:
        words: The embedded tokens that are perturbed.
    """

    def __init__(self, words: PerturbedEmbeddings) -> None:
        self._words = words
        self._losses: list[Tensor] = []
        self._gradients: dict[Tensor, Tensor] = {}

    def add(self, seen: Seen) -> list[Tensor]:
        """Add the loss of a pass that has just run; in ``seen`` it has no graph from then on.

        Returns:
            ∂loss/∂δ at each place, in fp32. Only their direction counts.

        Raises:
            ValueError: See :func:`~lightning_ft.functional.perturbation.gradient_of`.
        """
        loss, deltas = seen.scalar, self._words.deltas
        leaves = leaves_of(loss, without=deltas)
        if self._words.sharded or not all(_plain(leaf, loss) for leaf in leaves) or self._in_fp16(loss):
            self._losses.append(loss)
            return gradient_of(loss, deltas, keep=True)
        # Kept, since passes may share a part (weights that are computed once); it goes when nothing refers to it.
        found = differentiate(loss, [*deltas, *leaves], keep=True)
        seen.loss = loss.detach()
        self._losses.append(seen.loss)
        del loss
        given = zip(leaves, found[len(deltas) :], strict=True)
        self._take({leaf: gradient for leaf, gradient in given if gradient is not None})
        return or_zeros(found[: len(deltas)], deltas)

    def _take(self, gradients: dict[Tensor, Tensor]) -> None:
        if both := [leaf for leaf in gradients if leaf in self._gradients]:
            # Not in place: autograd may have given one tensor to two leaves.
            sums = torch._foreach_add([self._gradients[leaf] for leaf in both], [gradients[leaf] for leaf in both])
            gradients.update(zip(both, sums, strict=True))
        self._gradients |= gradients

    def total(self) -> Tensor:
        """The sum of what was added, to be differentiated once."""
        total = torch.stack(self._losses).sum()
        if not self._gradients:
            return total
        given: Tensor = _Given.apply(total, list(self._gradients.values()), *self._gradients)  # type: ignore[no-untyped-call]
        return given

    def _in_fp16(self, loss: Tensor) -> bool:
        kind = loss.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return autocast or any(place.embedded.dtype == torch.float16 for place in self._words.places)


def leaves_of(loss: Tensor, *, without: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors whose ``.grad`` a backward pass of a loss adds to.

    Example:
        >>> weight, frozen = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> [leaf is weight for leaf in leaves_of((weight * frozen).sum())]
        [True]
    """
    left, met = [loss.grad_fn], set[Node]()
    leaves: list[Tensor] = []
    while left:
        node = left.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaf: Tensor = node.variable  # type: ignore[attr-defined]
            if all(leaf is not other for other in without):
                leaves.append(leaf)
        left.extend(following for following, _ in node.next_functions)
    return leaves


def _plain(leaf: Tensor, loss: Tensor) -> bool:
    return (
        type(leaf) in (Tensor, nn.Parameter)
        and leaf.dtype != torch.float16
        and leaf.device == loss.device
        and not leaf._backward_hooks
    )


class _Given(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The value itself is differentiated, too: it may hold losses whose graphs were kept.
        return upstream, None, *torch._foreach_mul(ctx.gradients, upstream)
