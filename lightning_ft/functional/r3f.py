"""R3F: similar answers to a text and to a slightly noisy one."""

from __future__ import annotations

from typing import Literal

from lightning_ft.functional.passes import Method, Pass, consistency
from lightning_ft.functional.perturbation import Noise, draw
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings
from lightning_ft.functional.snapshots import Answer

Dropout = Literal["independent", "shared"]
"""Whether a further pass draws dropout masks of its own, or has those of the first."""


def r3f(
    words: PerturbedEmbeddings,
    weight: float = 1.0,
    epsilon: float = 1e-5,
    *,
    noise: Noise = "uniform",
    dropout: Dropout = "independent",
    answer: Answer | None = None,
) -> Method:
    """L + λ · mean [KL(p‖q) + KL(q‖p)], with p = f(x) and q = f(stop(x) + z), z ~ U(−ε, ε) or N(0, ε²).

    See :class:`lightning_ft.callbacks.R3F`, which runs it.

    Args:
        words: The embedded tokens x.
        weight: λ.
        epsilon: ε.
        noise: ``"uniform"`` or ``"normal"``.
        dropout: ``"independent"`` masks in the noisy pass, as published, or ``"shared"`` ones.
        answer: What the logits mean, see :func:`~lightning_ft.functional.perturbation.disagreement`.

    Reference:
        Aghajanyan et al. 2021, "Better Fine-Tuning by Reducing Representational Collapse".
    """
    shared = dropout == "shared"
    words.begin()
    clean = yield Pass(same_masks=shared)
    words.check_resolution(epsilon, "epsilon")
    # Drawn here, and not while the pass runs, which would shift its dropout masks.
    noises = [draw(noise, epsilon, place.embedded) * place.mask for place in words.places]
    words.again(noises, detach=True)
    noisy = yield Pass(whole=False, same_masks=shared)
    words.end()
    term = consistency(clean, noisy, answer)
    return clean.scalar + weight * clean.factor * term, {"r3f": term}
