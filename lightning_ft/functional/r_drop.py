"""R-Drop: two dropout masks, one answer."""

from __future__ import annotations

from lightning_ft.functional.passes import Method, Pass, consistency
from lightning_ft.functional.snapshots import Answer


def r_drop(weight: float = 1.0, *, answer: Answer | None = None) -> Method:
    """(L₁ + L₂)/2 + α · mean ½ [KL(p₁‖p₂) + KL(p₂‖p₁)] of two passes with dropout masks of their own.

    See :class:`lightning_ft.callbacks.RDrop`, which runs it.

    Args:
        weight: α.
        answer: What the logits mean, see :func:`~lightning_ft.functional.perturbation.disagreement`; of regression
            the squared difference takes the place of the bracket.

    Reference:
        Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks".
    """
    one = yield Pass()
    two = yield Pass()
    term = consistency(one, two, answer) / 2
    return (one.scalar + two.scalar) / 2 + weight * one.factor * term, {"r_drop": term}
