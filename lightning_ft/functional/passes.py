"""Losses that need several passes over one batch, written apart from who runs the passes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_ft.core.undisturbed import RandomState, replay
from lightning_ft.functional.perturbation import disagreement, mean_over
from lightning_ft.functional.snapshots import Answer

_GRADIENT_SCALE = 2.0**16


@dataclass(frozen=True)
class Pass:
    """What a method wants to be run next, on the same batch.

    Args:
        whole: The whole training step, for its loss; else the model alone, for its logits.
        same_masks: With the random numbers of the first pass, so that dropout is the same. In the first pass: it will
            be asked for.
        within: A context to run it in.
    """

    whole: bool = True
    same_masks: bool = False
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Seen:
    """What a pass gave.

    Args:
        loss: The loss of the training step; of a pass of the model alone, none.
        logits: Those of each call of the model.
        factor: What the step has multiplied its mean loss by; a term that is added takes the same.
    """

    loss: Tensor | None
    logits: Sequence[Tensor] = ()
    factor: Tensor | float = 1.0
    _counted: list[Tensor | None] = field(default_factory=list)

    @property
    def scalar(self) -> Tensor:
        """The loss, which was asked for."""
        assert self.loss is not None
        return self.loss

    def counted(self) -> list[Tensor | None]:
        """Which positions of logits ``(batch, seq, classes)`` the loss reads; None for logits of whole rows.

        Read off ∂loss/∂logits, which is zero just where a label is −100, wherever a project keeps its labels and
        whether it shifts them or not.

        Raises:
            ValueError: The loss does not come from the logits.
        """
        if not self._counted:
            self._counted = [self._of(logits) if logits.ndim > 2 else None for logits in self.logits]
        return self._counted

    def _of(self, logits: Tensor) -> Tensor:
        found = None
        if logits.requires_grad:
            with torch.autocast(logits.device.type, enabled=False):
                (found,) = torch.autograd.grad(
                    self.scalar * _GRADIENT_SCALE, [logits], retain_graph=True, allow_unused=True
                )
        if found is None:
            raise ValueError(
                f"the loss is not computed from the logits {tuple(logits.shape)} that were found, so the labelled "
                "tokens among them cannot be told: say where those are that it reads, logits=..."
            )
        return found.ne(0).any(-1)


Result = tuple[Tensor, dict[str, Tensor]]
"""The loss to differentiate, and what may be logged of it."""

Method = Generator[Pass, Seen, Result]
"""A method asks for passes, the first being the plain training step, and returns the loss."""


def consistency(clean: Seen, other: Seen, answer: Answer | None) -> Tensor:
    """The mean disagreement of two passes over the rows, or over the labelled tokens."""
    if not clean.logits or len(clean.logits) != len(other.logits):
        raise ValueError(
            f"the first pass gave logits {len(clean.logits)} times and a further one {len(other.logits)} times: "
            "perturbation methods need a training_step that does the same when it is called again on a batch"
        )
    terms = [
        mean_over(disagreement(a, b, answer), counted)
        for a, b, counted in zip(clean.logits, other.logits, clean.counted(), strict=True)
    ]
    return torch.stack(terms).mean()


def perturbed_loss(method: Method, step: Callable[[], Tensor | tuple[Tensor, Tensor]]) -> Tensor:
    """Run a method over passes of your own: for training steps that a callback cannot call again.

    Args:
        method: Such as ``free_lb(words, 0.1, steps=3)``, with ``words = PerturbedEmbeddings(module)`` made once.
        step: Computes the loss of the batch, or loss and logits, without logging; it is called for each pass.

    Returns:
        The loss to differentiate, once.

    Example:
        >>> from torch import nn
        >>> from lightning_ft.core.token_inputs import TokenInputs
        >>> from lightning_ft.functional.fgm import fgm
        >>> from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1))
        >>> words, ids = PerturbedEmbeddings(model, TokenInputs(embedding="0")), torch.tensor([[1, 2]])
        >>> plain = model(ids).sum()
        >>> bool(perturbed_loss(fgm(words, 1.0), lambda: model(ids).sum()) > 2 * plain)
        True
    """

    def run(wanted: Pass) -> Seen:
        with wanted.within():
            found = step()
        loss, *logits = found if isinstance(found, tuple) else (found,)
        return Seen(loss, logits)

    return complete(method, first=run)[0]


def complete(method: Method, first: Callable[[Pass], Seen], again: Callable[[Pass], Seen] | None = None) -> Result:
    """Run a method to its end.

    Args:
        method: The method.
        first: Runs the first pass.
        again: Runs the others; by default ``first``.
    """
    try:
        wanted = next(method)
        state = RandomState.now() if wanted.same_masks else None
        return resume(method, first(wanted), again or first, state)
    finally:
        method.close()


def resume(method: Method, seen: Seen, again: Callable[[Pass], Seen], state: RandomState | None) -> Result:
    """Go on after a pass.

    Args:
        method: Waits for what the first pass saw.
        seen: What it saw.
        again: Runs the other passes.
        state: Of the generators, before the first pass; None where it is not wanted.
    """
    while True:
        try:
            wanted = method.send(seen)
        except StopIteration as end:
            result: Result = end.value
            return result
        with replay(state) if wanted.same_masks and state is not None else nullcontext():
            seen = again(wanted)


def logged(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without their graphs."""
    return {name: value.detach() for name, value in values.items()}
