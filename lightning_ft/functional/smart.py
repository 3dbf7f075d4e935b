"""SMART: the same answer in the worst direction nearby, and small steps from one iterate to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.functional.passes import Method, Pass, Seen, consistency
from lightning_ft.functional.perturbation import corner, draw, gradient_of, mtdnn_corner, mtdnn_divergence
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings
from lightning_ft.functional.r3f import Dropout
from lightning_ft.functional.snapshots import Answer

# Near δ = 0 the gradient is of δ's own size, 1e-5: fp16 would round it to 0. Only its direction counts.
_SCALE = 2.0**16


@dataclass(frozen=True)
class Ascent:
    """How SMART looks for the worst direction.

    Args:
        epsilon: ε, half the side of the box around each embedding.
        sigma: σ of the normal noise that it starts from: at δ = 0 the gradient is exactly 0.
        step: η, a step in units of the largest entry of an example's gradient.
        steps: How many steps.

    Raises:
        ValueError: A number is out of range.
    """

    epsilon: float = 1e-5
    sigma: float = 1e-5
    step: float = 1e-3
    steps: int = 1

    def __post_init__(self) -> None:
        for argument in ("epsilon", "sigma", "step"):
            if not getattr(self, argument) > 0:
                raise ValueError(f"{argument}={getattr(self, argument)!r} must be above 0")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be 1 or more")


def smart(
    words: PerturbedEmbeddings,
    weight: float = 1.0,
    mu: float = 0.0,
    *,
    ascent: Ascent | None = None,
    average: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dropout: Dropout = "independent",
    answer: Answer | None = None,
    mtdnn_compat: bool = False,
) -> Method:
    """L + λ · mean max ℓ(f(x + δ), f(x)) over ‖δ‖_∞ ≤ ε + μ · mean ℓ(f(x; θ), f(x; θ̃)), ℓ the symmetric KL.

    See :class:`lightning_ft.callbacks.SMART`, which runs it.

    Args:
        words: The embedded tokens x.
        weight: λ.
        mu: μ.
        ascent: How the maximum is looked for.
        average: A context in which the model has the weights θ̃.
        dropout: ``"independent"`` masks in the further passes, and none under θ̃; or ``"shared"`` ones in all.
        answer: What the logits mean, see :func:`~lightning_ft.functional.perturbation.disagreement`.
        mtdnn_compat: Climb as the mt-dnn repository does.

    Reference:
        Jiang et al. 2020, "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through
        Principled Regularized Optimization".
    """
    ascent = ascent or Ascent()
    shared = dropout == "shared"
    words.begin()
    clean = yield Pass(same_masks=shared)
    total, terms = clean.scalar, {}
    if weight:
        words.check_resolution(ascent.epsilon, "epsilon")
        aim = Seen(None, [logits.detach() for logits in clean.logits])
        aim._counted = clean.counted()
        places = list(words.places)
        deltas = [draw("normal", ascent.sigma, place.embedded) * place.mask for place in places]
        for _ in range(ascent.steps):
            words.again([delta.requires_grad_() for delta in deltas], detach=True)
            seen = yield Pass(whole=False, same_masks=shared)
            gradients = gradient_of(_climbed(aim, seen, answer, mtdnn_compat), deltas, scale=_SCALE)
            deltas = [
                _moved(d.detach(), g * place.mask, ascent, mtdnn_compat) * place.mask
                for d, g, place in zip(deltas, gradients, places, strict=True)
            ]
        words.again(deltas)
        worst = yield Pass(whole=False, same_masks=shared)
        terms["smart"] = _mtdnn_term(clean, worst, answer) if mtdnn_compat else consistency(clean, worst, answer)
        total = total + weight * clean.factor * terms["smart"]
    words.end()
    if mu:
        before = yield Pass(whole=False, same_masks=shared, within=average)
        terms["bregman"] = consistency(clean, before, answer)
        total = total + mu * clean.factor * terms["bregman"]
    return total, terms


def _climbed(aim: Seen, seen: Seen, answer: Answer | None, mtdnn_compat: bool) -> Tensor:
    if not mtdnn_compat or _regression(seen, answer):
        return consistency(aim, seen, answer)
    # Tokens without a label are left out: their rows would else lead the ascent.
    pairs = zip(seen.logits, aim.logits, aim.counted(), strict=True)
    return torch.stack([mtdnn_divergence(*_rows(a, b, counted)) for a, b, counted in pairs]).sum()


def _moved(delta: Tensor, gradient: Tensor, ascent: Ascent, mtdnn_compat: bool) -> Tensor:
    if mtdnn_compat:
        # mt-dnn adds the gradient at its own size.
        return mtdnn_corner(delta, torch.nan_to_num(gradient / _SCALE, posinf=0.0, neginf=0.0), ascent.step)
    return corner(delta, gradient, ascent.step, ascent.epsilon)


def _mtdnn_term(clean: Seen, worst: Seen, answer: Answer | None) -> Tensor:
    """mt-dnn's symmetric KL, in which each side is a constant target of the other: half the gradient."""
    if _regression(worst, answer):
        return consistency(clean, worst, answer)
    terms = []
    for a, b, counted in zip(clean.logits, worst.logits, clean.counted(), strict=True):
        one, other = (F.log_softmax(x.float(), -1) for x in _rows(a, b, counted))
        there = F.kl_div(one, other.detach(), reduction="batchmean", log_target=True)
        terms.append(there + F.kl_div(other, one.detach(), reduction="batchmean", log_target=True))
    return torch.stack(terms).mean()


def _rows(one: Tensor, other: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    return (one, other) if counted is None else (one[counted], other[counted])


def _regression(seen: Seen, answer: Answer | None) -> bool:
    return answer == "regression" or (answer is None and seen.logits[0].shape[-1] == 1)


@contextmanager
def uncached_no_grad(device: torch.device) -> Iterator[None]:
    """No gradients, and no use of autocast's cache of weights: it would hand out those that were there before."""
    kind = device.type
    with (
        torch.no_grad(),
        torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ),
    ):
        yield
