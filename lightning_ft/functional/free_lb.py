"""FreeLB: adversarial training that learns from every step of the ascent."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.functional.climbed_losses import ClimbedLosses
from lightning_ft.functional.passes import Method, Pass
from lightning_ft.functional.perturbation import direction, even_noise, project
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings, Place


def free_lb(
    words: PerturbedEmbeddings,
    step_size: float = 0.1,
    steps: int = 2,
    *,
    magnitude: float = 0.6,
    max_norm: float = 0.0,
) -> Method:
    """1/K Σₖ L(x + δₖ), δ₀ ~ U(−1, 1)·m/√(Ld), δₖ₊₁ = Π(δₖ + α gₖ/‖gₖ‖_F), gₖ = ∂L(x + δₖ)/∂δₖ.

    See :class:`lightning_ft.callbacks.FreeLB`, which runs it.

    Args:
        words: The embedded tokens x.
        step_size: α.
        steps: K.
        magnitude: m; 0 starts at x.
        max_norm: Radius of the ball that Π projects to; 0 for none.

    Reference:
        Zhu et al. 2020, "FreeLB: Enhanced Adversarial Training for Natural Language Understanding".
    """
    # The noise comes from a generator of its own, since the first pass draws it where later ones draw nothing.
    seed = int(torch.randint(2**62, ())) if magnitude else 0

    def start(place: Place) -> Tensor | None:
        if not magnitude:
            return torch.zeros_like(place.embedded, dtype=torch.float32).requires_grad_() if steps > 1 else None
        generator = torch.Generator(place.embedded.device).manual_seed(seed + len(words.places))
        noise = even_noise(magnitude, place.real, place.embedded.shape[-1], generator=generator)
        return noise.requires_grad_()

    words.begin(start)
    seen = yield Pass(same_masks=True)
    climbed = ClimbedLosses(words)
    for _ in range(steps - 1):
        gradients = climbed.add(seen)
        moved = [
            d.detach() + step_size * direction(g * place.mask)
            for d, g, place in zip(words.deltas, gradients, words.places, strict=True)
        ]
        words.again([(project(d, max_norm) if max_norm else d).requires_grad_() for d in moved])
        seen = yield Pass(same_masks=True)
    words.end()
    last = seen.scalar
    return (climbed.total() + last) / steps if steps > 1 else last, {"adversarial_loss": last}
