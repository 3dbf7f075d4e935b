"""FGM and PGD: one step, or several, towards the words that the model handles worst."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.functional.climbed_losses import ClimbedLosses
from lightning_ft.functional.passes import Method, Pass
from lightning_ft.functional.perturbation import direction, gradient_of, project
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings, Place
from lightning_ft.functional.r3f import Dropout


def fgm(
    words: PerturbedEmbeddings, epsilon: float = 1.0, *, weight: float = 1.0, dropout: Dropout = "shared"
) -> Method:
    """L(x) + w · L(x + r), r = ε g/‖g‖₂, g = ∂L(x)/∂x: :func:`pgd` with one step of the radius.

    See :class:`lightning_ft.callbacks.FGM`, which runs it.

    Args:
        words: The embedded tokens x.
        epsilon: ε.
        weight: w.
        dropout: ``"shared"`` masks in both passes, or ``"independent"`` ones.

    Reference:
        Miyato, Dai and Goodfellow 2017, "Adversarial Training Methods for Semi-Supervised Text Classification".
    """
    return pgd(words, epsilon, epsilon, 1, weight=weight, dropout=dropout)


def pgd(
    words: PerturbedEmbeddings,
    epsilon: float = 1.0,
    step_size: float = 0.3,
    steps: int = 3,
    *,
    weight: float = 1.0,
    dropout: Dropout = "shared",
) -> Method:
    """L(x) + w · L(x + r_K), rₖ₊₁ = Π(rₖ + α gₖ/‖gₖ‖₂), gₖ = ∂L(x + rₖ)/∂rₖ, r₀ = 0, Π to the ball of radius ε.

    See :class:`lightning_ft.callbacks.PGD`, which runs it.

    Args:
        words: The embedded tokens x.
        epsilon: ε.
        step_size: α.
        steps: K.
        weight: w.
        dropout: ``"shared"`` masks in all passes, or ``"independent"`` ones.

    Reference:
        Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".
    """
    shared = dropout == "shared"
    words.begin(_nowhere)
    seen = yield Pass(same_masks=shared)
    clean = ClimbedLosses(words)
    for k in range(steps):
        # The clean pass is part of the loss; those in between serve the ascent alone.
        gradients = gradient_of(seen.scalar, words.deltas) if k else clean.add(seen)
        moved = [
            project(d.detach() + step_size * direction(g * place.mask), epsilon)
            for d, g, place in zip(words.deltas, gradients, words.places, strict=True)
        ]
        words.again([d.requires_grad_(k + 1 < steps) for d in moved])
        seen = yield Pass(same_masks=shared)
    words.end()
    return clean.total() + weight * seen.scalar, {"adversarial_loss": seen.scalar}


def _nowhere(place: Place) -> Tensor:
    return torch.zeros_like(place.embedded, dtype=torch.float32).requires_grad_()
