"""Perturbations of embedded tokens, and distances between what a model says with and without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.functional.snapshots import Answer

Noise = Literal["uniform", "normal"]


def symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) = Σ (p − q)(ln p − ln q) of each row, in fp32: p and q are the softmax of two logits.

    Args:
        one: Logits ``(..., classes)``.
        other: Logits of the same shape.

    Returns:
        ``(...)``.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
        >>> symmetric_kl(p.log(), q.log())
        tensor([0.4159])
    """
    log_p, log_q = F.log_softmax(one.float(), -1), F.log_softmax(other.float(), -1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def disagreement(one: Tensor, other: Tensor, answer: Answer | None = None) -> Tensor:
    """How far apart two answers to the same rows are: one number a row, in fp32.

    Args:
        one: Logits ``(..., labels)``.
        other: Logits of the same shape.
        answer: ``"single_label"``: :func:`symmetric_kl`; ``"multi_label"``: the same of each label's Bernoulli, summed;
            ``"regression"``: the squared difference, summed. None: regression where there is one column, else
            single_label.

    Example:
        >>> disagreement(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        tensor([4.])
    """
    if answer is None:
        answer = "regression" if one.ndim < 2 or one.shape[-1] == 1 else "single_label"
    if answer == "single_label":
        return symmetric_kl(one, other)
    one, other = one.float(), other.float()
    apart = one - other
    each = apart * (one.sigmoid() - other.sigmoid()) if answer == "multi_label" else apart.square()
    return each.sum(-1) if each.ndim > 1 else each


def mean_over(rows: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean of the rows that are counted (None: of all); 0 of none.

    Example:
        >>> mean_over(torch.tensor([1.0, 5.0]), torch.tensor([False, True]))
        tensor(5.)
    """
    if counted is None:
        return rows.mean()
    return (rows * counted).sum() / counted.sum().clamp(min=1)


def draw(kind: Noise, size: float, like: Tensor) -> Tensor:
    """Noise of the shape of ``like`` in fp32: U(−``size``, ``size``), or N(0, ``size``²).

    Example:
        >>> bool(draw("uniform", 0.1, torch.empty(100)).abs().max() <= 0.1)
        True
    """
    noise = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return noise.uniform_(-size, size) if kind == "uniform" else noise.normal_(0, size)


def even_noise(magnitude: float, real: Tensor, width: int, *, generator: torch.Generator | None = None) -> Tensor:
    """U(−1, 1) · ``magnitude`` / √(L d) on the L real tokens of each example, 0 elsewhere: of norm ``magnitude``/√3.

    Args:
        magnitude: FreeLB's initial magnitude, NEFTune's α.
        real: Which tokens count, ``(..., seq)``.
        width: d.
        generator: On the device of ``real``; by default torch's own.

    Returns:
        ``(..., seq, width)`` in fp32.

    Example:
        >>> noise = even_noise(5.0, torch.tensor([[True, True, False]]), 8)
        >>> bool(noise[0, 2].abs().max() == 0), bool(noise.abs().max() <= 5 / (2 * 8) ** 0.5)
        (True, True)
    """
    real = real.float()
    size = magnitude / (real.sum(-1, keepdim=True) * width).clamp(min=1).sqrt()
    noise = torch.empty(*real.shape, width, device=real.device).uniform_(-1, 1, generator=generator)
    return noise * (real * size).unsqueeze(-1)


def norms(values: Tensor, order: float = 2.0) -> Tensor:
    """The norm of each example over its whole sequence, ``(..., 1, 1)`` of ``(..., seq, width)``.

    Example:
        >>> norms(torch.tensor([[[3.0], [4.0]]])).item()
        5.0
    """
    size: Tensor = torch.linalg.vector_norm(values, order, dim=(-2, -1), keepdim=True)
    return size


def direction(gradient: Tensor, order: float = 2.0) -> Tensor:
    """g/‖g‖ of each example; 0 where the norm is 0 or not finite, as an overflow in fp16 makes it.

    Example:
        >>> direction(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])).tolist()
        [[[0.6000000238418579, 0.800000011920929]], [[0.0, 0.0]]]
    """
    size = norms(gradient, order)
    usable = (size > 0) & (size < math.inf)
    return torch.where(usable, gradient / torch.where(usable, size, 1.0), 0.0)


def project(delta: Tensor, radius: float) -> Tensor:
    """The nearest point of the ball ‖δ‖₂ ≤ ``radius``, for each example.

    Example:
        >>> project(torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]]), 1.0).tolist()
        [[[0.6000000238418579, 0.800000011920929]], [[0.30000001192092896, 0.4000000059604645]]]
    """
    size = norms(delta)
    return torch.where(size > radius, delta * (radius / size.clamp(min=1e-30)), delta)


def corner(delta: Tensor, gradient: Tensor, step: float, epsilon: float) -> Tensor:
    """SMART's ascent step: δ ← clip(δ + ``step`` · g/‖g‖_∞, ±``epsilon``), ‖·‖_∞ over each example.

    Example:
        >>> corner(torch.tensor([[[1e-3, 0.0]]]), torch.tensor([[[2.0, -1.0]]]), 1e-3, 1e-5).tolist()
        [[[9.999999747378752e-06, -9.999999747378752e-06]]]
    """
    return (delta + step * direction(gradient, math.inf)).clamp(-epsilon, epsilon)


def mtdnn_corner(delta: Tensor, gradient: Tensor, step: float, epsilon: float = 1e-6) -> Tensor:
    """The step that the mt-dnn repository runs: δ ← (δ + ``step`` · g) / (max|·| of each token + ``epsilon``).

    Its largest entry is near 1, whatever the noise was: nothing projects it to a small ball.

    Example:
        >>> mtdnn_corner(torch.zeros(1, 1, 2), torch.tensor([[[2.0, -1.0]]]), 1.0).round(decimals=3).tolist()
        [[[1.0, -0.5]]]
    """
    moved = delta + step * gradient
    return moved / (moved.abs().amax(-1, keepdim=True) + epsilon)


def mtdnn_divergence(logits: Tensor, target: Tensor, epsilon: float = 1e-6) -> Tensor:
    """What mt-dnn climbs instead of KL: 2 Σ p (r_p − r_q), summed, with r = −ln(1/(p + ε) − 1 + ε) held constant.

    Args:
        logits: Of the perturbed pass, ``(..., classes)``.
        target: Clean ones.
        epsilon: ε.
    """
    p, q = F.log_softmax(logits.float(), -1).exp(), F.log_softmax(target.float(), -1).exp()
    r_p, r_q = (-(1 / (x + epsilon) - 1 + epsilon).detach().log() for x in (p, q))
    return (p * (r_p - r_q) * 2).sum()


def gradient_of(loss: Tensor, deltas: Sequence[Tensor], *, scale: float = 2.0**10, keep: bool = False) -> list[Tensor]:
    """∂loss/∂δ and nothing else: no parameter's ``.grad`` is touched, and none of its hooks runs.

    Args:
        loss: A scalar.
        deltas: Leaves that it depends on.
        scale: The loss is multiplied by it, and the gradients are left so: only their direction counts. Under fp16
            they would underflow without. A power of two changes no bit where nothing under- or overflows.
        keep: Whether the graph is needed again.

    Raises:
        ValueError: The model computes its activations again, in the form of checkpointing that this cannot pass.
    """
    return or_zeros(differentiate(loss * scale, deltas, keep=keep), deltas)


def or_zeros(gradients: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in fp32, 0 where there is none."""
    return [torch.zeros_like(leaf) if g is None else g.float() for g, leaf in zip(gradients, leaves, strict=True)]


def differentiate(loss: Tensor, leaves: Sequence[Tensor], *, keep: bool = False) -> list[Tensor | None]:
    """``torch.autograd.grad``; None where the loss does not depend on a leaf.

    Raises:
        ValueError: See :func:`gradient_of`.
    """
    try:
        with torch.autocast(loss.device.type, enabled=False):
            return list(torch.autograd.grad(loss, leaves, retain_graph=keep, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "re-entrant gradient checkpointing gives no gradient to a perturbation: enable it with "
            '{"use_reentrant": False}, or use the callback ActivationCheckpointing'
        ) from error
