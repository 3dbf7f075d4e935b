"""Quadratic pulls towards a reference, in fused passes and without autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ft.core.sharding import local, sum_of_squares

_PIECE = 1 << 19  # values handled at once on a CPU: 2 MB, which stay in its caches


class QuadraticPenalty:
    """Ω(θ) = (α/2) Σ fᵢ (θᵢ − θ⁰ᵢ)², with θ⁰ = 0 where no reference is given, and f = 1 where no weights are.

    ``add_grad_`` is the gradient of ``value`` (the coupled form, through the optimiser), ``pull_`` one step of
    gradient descent on it (the decoupled form, beside the optimiser). For plain SGD both move θ alike but for η²αf
    times the gradient of the loss; for Adam the coupled one is rescaled by 1/√v like any gradient.

    Of parameters sharded as ``DTensor`` (FSDP2) each process pulls its own part; ``value`` sums over all processes
    and is to be called on all of them. References and weights may be of another precision or device than θ: they are
    then brought over tensor by tensor.

    Args:
        strength: α ≥ 0.
        reference: θ⁰, one tensor a parameter, in the order in which parameters will be passed; None for zero.
        weights: f ≥ 0, in the shapes of the reference: for EWC, the Fisher information. None for 1.
        rows: For each parameter None, or which of its rows (of this process's part) weigh anything: its ``weights``
            are those rows alone then, and no other row is touched. See :func:`weighted_rows`.

    Raises:
        ValueError: ``strength`` is negative; weights without a reference, or rows without weights.

    Example:
        >>> theta = torch.tensor([1.0], requires_grad=True)
        >>> penalty = QuadraticPenalty(0.01, [torch.tensor([0.5])])
        >>> theta.grad = torch.zeros(1)
        >>> penalty.add_grad_([theta])
        >>> round(theta.grad.item(), 6)
        0.005
        >>> penalty.pull_([theta], learning_rate=0.1)
        >>> round(theta.item(), 6)
        0.9995
    """

    def __init__(
        self,
        strength: float,
        reference: Sequence[Tensor] | None = None,
        weights: Sequence[Tensor] | None = None,
        rows: Sequence[Tensor | None] | None = None,
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength!r} must be 0 or more")
        if weights is not None and reference is None:
            raise ValueError("weights need a reference: pass zeros where θ⁰ is 0")
        if rows is not None and weights is None:
            raise ValueError("rows need weights: they say which rows these are of")
        self.strength = strength
        self.reference = None if reference is None else list(reference)
        self.weights = None if weights is None else list(weights)
        self.rows = [None] * len(self.reference or ()) if rows is None else list(rows)

    def value(self, parameters: Sequence[Tensor]) -> Tensor:
        """Ω, a scalar on the parameters' device; differentiable, and free of host synchronisation."""
        if not parameters:
            return torch.zeros(())
        theta = [local(parameter) for parameter in parameters]
        if self.reference is None:
            differences = theta
        else:
            references = _beside(theta, self.reference)
            theta, references = (
                [t if r is None else t[r.to(t.device)] for t, r in zip(tensors, self.rows, strict=True)]
                for tensors in (theta, references)
            )
            differences = list(torch._foreach_sub(theta, references))
            if self.weights is not None:
                roots = [w.to(p.dtype).sqrt() for p, w in zip(theta, _beside(theta, self.weights), strict=True)]
                differences = list(torch._foreach_mul(differences, roots))
        return 0.5 * self.strength * sum_of_squares(differences, like=parameters)

    @torch.no_grad()
    def add_grad_(
        self, parameters: Sequence[Tensor], *, scale: Tensor | None = None, members: Sequence[int] | None = None
    ) -> None:
        """Add αf(θ − θ⁰) to ``.grad``. Parameters without a gradient take no part, as in the optimiser.

        Args:
            parameters: θ, in the order of the reference.
            scale: The loss scale, where the gradients are still scaled (a 0-d tensor: no host copy).
            members: Indices of the parameters that take part, where another optimiser has the others.
        """
        chosen = range(len(parameters)) if members is None else members
        live = [i for i in chosen if parameters[i].grad is not None]
        if not live or self.strength == 0:
            return
        theta = [local(parameters[i].detach()) for i in live]
        gradients = [local(g) for i in live if (g := parameters[i].grad) is not None]
        if self.reference is None:
            pull = theta if scale is None else torch._foreach_mul(theta, scale)
            torch._foreach_add_(gradients, pull, alpha=self.strength)
        else:
            self._add_pull_(gradients, theta, live, self.strength, scale)

    @torch.no_grad()
    def pull_(
        self, parameters: Sequence[Tensor], *, learning_rate: float | Tensor, members: Sequence[int] | None = None
    ) -> None:
        """θ ← θ − ηαf(θ − θ⁰), in place. Parameters without a gradient were not stepped, and stay.

        Args:
            parameters: θ, in the order of the reference.
            learning_rate: η of this step; a tensor is never copied to the host.
            members: Indices of the parameters to move, where not all have this learning rate.
        """
        chosen = range(len(parameters)) if members is None else members
        live = [i for i in chosen if parameters[i].grad is not None]
        if not live or self.strength == 0:
            return
        theta = [local(parameters[i].detach()) for i in live]
        rate = learning_rate * self.strength
        if self.reference is None:
            torch._foreach_mul_(theta, 1 - rate)
            return
        references = [local(self.reference[i]) for i in live]
        alike = all(p.dtype == r.dtype and p.device == r.device for p, r in zip(theta, references, strict=True))
        if isinstance(rate, Tensor):
            self._add_pull_(theta, theta, live, -1.0, rate.to(theta[0].device))
        elif self.weights is None and alike:
            torch._foreach_lerp_(theta, references, weight=rate)
        else:
            self._add_pull_(theta, theta, live, -rate, None)

    def _add_pull_(
        self, targets: list[Tensor], theta: list[Tensor], live: list[int], strength: float, scale: Tensor | None
    ) -> None:
        assert self.reference is not None
        references = [local(self.reference[i]) for i in live]
        weights = [None if self.weights is None else local(self.weights[i]) for i in live]
        fused: list[int] = []
        for j, (i, tensors) in enumerate(zip(live, zip(targets, theta, references, weights, strict=True), strict=True)):
            target, parameter, reference, weight = tensors
            if (rows := self.rows[i]) is not None:
                assert weight is not None
                _add_to_rows_(target, parameter, reference, weight, rows, strength, scale)
            elif parameter.device.type == "cpu" or reference.device != parameter.device:
                # A second copy in main memory is brought over for one piece at a time.
                _add_by_pieces_(target, parameter, reference, weight, strength, scale)
            else:
                fused.append(j)
        if not fused:
            return
        differences = torch._foreach_sub([theta[j] for j in fused], [references[j] for j in fused])
        if self.weights is not None:
            torch._foreach_mul_(differences, [w for j in fused if (w := weights[j]) is not None])
        if scale is not None:
            torch._foreach_mul_(differences, scale)
        torch._foreach_add_([targets[j] for j in fused], differences, alpha=strength)


def weighted_rows(weight: Tensor) -> Tensor | None:
    """The rows with a value above zero, or None if they are most of them.

    The Fisher information of an embedding is zero for each token that the data did not have: a pass over the whole
    table would spend most of its time on them.

    Args:
        weight: This process's part of f, of any shape.
    """
    if weight.ndim < 2 or not len(weight):
        return None
    rows = weight.flatten(1).any(1).nonzero().flatten()
    return rows if len(rows) <= len(weight) // 2 else None


def _add_to_rows_(
    target: Tensor,
    parameter: Tensor,
    reference: Tensor,
    weight: Tensor,
    rows: Tensor,
    strength: float,
    scale: Tensor | None,
) -> None:
    origin = reference[rows.to(reference.device)].to(parameter.device)
    rows = rows.to(parameter.device)
    difference = parameter[rows].sub_(origin)
    difference.mul_(weight.to(parameter.device))
    target.index_add_(0, rows, difference if scale is None else difference.mul_(scale), alpha=strength)


def _beside(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [local(t).to(p.device, non_blocking=True) for p, t in zip(parameters, tensors, strict=True)]


def _add_by_pieces_(
    target: Tensor, parameter: Tensor, reference: Tensor, weight: Tensor | None, strength: float, scale: Tensor | None
) -> None:
    """t ← t + scale · α · f · (θ − θ⁰), the difference taken first: αθ − αθ⁰ leaves rounding noise where θ = θ⁰.

    On a CPU, foreach is a loop of its own, and a temporary as large as the model costs more in page faults than the
    arithmetic: pieces that share one temporary are 3.5 times faster (a weighted pull of 11M: 4.1 against 14 ms).
    """
    goals, thetas, origins, *factors = _pieces([target, parameter, reference, *([] if weight is None else [weight])])
    # A pull is an interpolation, which reads θ once less.
    pull = target is parameter and weight is not None and reference.dtype == weight.dtype == parameter.dtype
    kind = weight.dtype if pull and weight is not None else torch.promote_types(parameter.dtype, reference.dtype)
    temporary = torch.empty_like(thetas[0], dtype=kind)
    for i, (goal, theta, origin) in enumerate(zip(goals, thetas, origins, strict=True)):
        origin = origin.to(theta.device, non_blocking=True)
        factor = factors[0][i].to(theta.device, non_blocking=True) if factors else None
        # The last piece may be shorter.
        room = temporary if len(thetas) == 1 else temporary[: len(theta)]
        if pull and factor is not None:
            share = torch.mul(factor, -strength, out=room)
            goal.lerp_(origin, share if scale is None else share.mul_(scale))
            continue
        difference = torch.sub(theta, origin, out=room)
        if scale is not None:
            difference.mul_(scale)
        if factor is None:
            goal.add_(difference, alpha=strength)
        else:
            goal.addcmul_(difference, factor.to(goal.dtype), value=strength)


def _pieces(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Views of at most ``_PIECE`` values of tensors of one shape, alike for all; whole where a tensor has gaps."""
    if tensors[0].numel() <= _PIECE or not all(tensor.is_contiguous() for tensor in tensors):
        return [[tensor] for tensor in tensors]
    return [torch.split(tensor.view(-1), _PIECE) for tensor in tensors]
