"""What a model's outputs say: the distribution of the labels, given the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.core.fisher import Variant

Family = Literal["categorical", "bernoulli", "gaussian"]


@dataclass(frozen=True)
class Likelihood:
    """log p(y | x) of a batch, as a sum of terms that are independent given x, each of one example.

    Of a classifier each example has one term, of a language model one for each labelled token. No factor is left out:
    label smoothing, class weights and the mean over tokens belong to losses, not here.

    Args:
        outputs: ``(terms, outcomes)``, with their graph: logits of ``"categorical"`` (one of the outcomes is true) and
            ``"bernoulli"`` (each is or is not), means of ``"gaussian"`` (of variance 1: log p = −½ ‖y − outputs‖²).
        labels: What the data say: ``(terms,)`` for categorical, negative where nothing; else ``(terms, outcomes)``.
            None where the data are not labelled.
        family: Which distribution.
        example: Which example of the batch each term belongs to, ``(terms,)``; by default the terms are the examples.
        examples: Their number, where ``example`` is given; an example may be without a term.

    Raises:
        ValueError: Shapes that do not fit.

    Example:
        >>> Likelihood(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).examples
        4
    """

    outputs: Tensor
    labels: Tensor | None
    family: Family = "categorical"
    example: Tensor | None = None
    examples: int = -1

    def __post_init__(self) -> None:
        if self.outputs.ndim != 2:
            raise ValueError(f"outputs has shape {tuple(self.outputs.shape)}: it must be (terms, outcomes)")
        expected = self.outputs.shape[:1] if self.family == "categorical" else self.outputs.shape
        if self.labels is not None and self.labels.shape != expected:
            raise ValueError(
                f"labels has shape {tuple(self.labels.shape)}, and for {self.family} outputs of shape "
                f"{tuple(self.outputs.shape)} it must be {tuple(expected)}"
            )
        if self.example is None:
            object.__setattr__(self, "examples", len(self.outputs))
        elif self.examples < 0 or self.example.shape != self.outputs.shape[:1]:
            raise ValueError(
                f"example has shape {tuple(self.example.shape)} and examples={self.examples}: give the number of the "
                f"example of each of {len(self.outputs)} terms, and how many examples there are"
            )

    @classmethod
    def of_tokens(cls, logits: Tensor, labels: Tensor) -> Likelihood:
        """A term for each labelled token of each row.

        Args:
            logits: ``(batch, seq, vocab)``.
            labels: ``(batch, seq)``, -100 where there is none.

        Example:
            >>> terms = Likelihood.of_tokens(torch.zeros(2, 3, 5), torch.tensor([[1, -100, 4], [-100, -100, -100]]))
            >>> terms.examples, terms.example.tolist(), terms.outputs.shape
            (2, [0, 0], torch.Size([2, 5]))
        """
        chosen = labels != -100
        # fp32 for these alone: they are few, and a vocabulary is wide.
        return cls(logits[chosen].float(), labels[chosen], example=chosen.nonzero()[:, 0], examples=len(labels))

    # ---- ∂ log p / ∂ outputs

    def scores(self, variant: Variant, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Vectors v ``(terms, outcomes)`` with Σ_v (∂outputs/∂θ · v)², summed for each example, its share of F.

        ``empirical`` and ``sampled``: one, the gradient of log p of the label.

        ``exact``: with S = E_y[s sᵀ] the covariance of the gradient s at the outputs, the columns of any M, M Mᵀ = S,
        do. S = diag(p) − p pᵀ of a categorical term has rank C − 1, and its Cholesky factor is known in closed form
        (Tanabe and Sagae 1992), so C − 1 backward passes suffice and not C: one for two classes. Terms of one example
        are independent, so that cross terms vanish in the mean: each has passes of its own, which the first (second, …)
        terms of all examples share.
        """
        outputs = self.outputs.detach()
        if variant == "empirical":
            yield self._score(outputs, self._given())
        elif variant == "sampled":
            yield self._score(outputs, self._draw(outputs, generator))
        else:
            rank = self._rank()
            for number in range(int(rank.max()) + 1 if len(rank) else 0):
                mine = (rank == number)[:, None]
                for column in range(self.columns):
                    yield self._column(outputs, column) * mine

    @property
    def columns(self) -> int:
        """Of the factor M: how many backward passes the exact variant takes for one term of each example."""
        return self.outputs.shape[1] - (self.family == "categorical")

    def passes(self) -> int:
        """How many backward passes the exact variant takes for this batch."""
        rank = self._rank()
        return self.columns * (int(rank.max()) + 1 if len(rank) else 0)

    def owners(self) -> Tensor:
        """Which example each term belongs to."""
        if self.example is not None:
            return self.example
        return torch.arange(len(self.outputs), device=self.outputs.device)

    def _order(self) -> Tensor:
        return torch.argsort(self.owners(), stable=True)

    def _rank(self) -> Tensor:
        """Of each term, how many terms of its example come before it."""
        owners, order = self.owners(), self._order()
        counts = torch.bincount(owners, minlength=max(1, self.examples))
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[owners[order]]
        return rank

    def _given(self) -> Tensor:
        if self.labels is None:
            raise ValueError('variant="empirical" needs labels, and the data have none: take "sampled" or "exact"')
        return self.labels

    def _score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.family == "gaussian":
            return labels.to(outputs.dtype) - outputs
        if self.family == "bernoulli":
            return labels.to(outputs.dtype) - outputs.sigmoid()
        told = labels >= 0
        one_hot = F.one_hot(labels.clamp(min=0).long(), outputs.shape[1]).to(outputs.dtype)
        return (one_hot - outputs.softmax(-1)) * told[:, None]

    def _draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        width = 1 if self.family == "categorical" else outputs.shape[1]
        # On the CPU and by example, so that neither the device nor the size of batches decides what is drawn.
        uniform = torch.empty(len(outputs), width, dtype=torch.float64)
        uniform[self._order().cpu()] = torch.rand(uniform.shape, generator=generator, dtype=torch.float64)
        uniform = uniform.to(outputs.device if outputs.device.type != "mps" else "cpu")
        outputs = outputs.to(uniform.device, torch.float64)
        if self.family == "gaussian":
            drawn: Tensor = outputs + torch.special.ndtri(uniform.clamp(min=1e-300))
        elif self.family == "bernoulli":
            drawn = (uniform < outputs.sigmoid()).double()
        else:
            cumulative = outputs.softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
            drawn = drawn.clamp(max=outputs.shape[1] - 1)
        return drawn.to(self.outputs.device)

    def _column(self, outputs: Tensor, number: int) -> Tensor:
        """One column of M, for every term."""
        if self.family != "categorical":
            column = torch.zeros_like(outputs)
            p = outputs[:, number].sigmoid()
            column[:, number] = 1.0 if self.family == "gaussian" else (p * (1 - p)).sqrt()
            return column
        p = outputs.softmax(-1)
        # The probability of all outcomes from this one on, and after it; summed, as 1 − p cancels where p is near 1.
        after = p[:, number + 1 :].sum(-1)
        here = p[:, number] + after
        ratio = (p[:, number] / here).nan_to_num(0.0).sqrt()
        column = -p * ratio[:, None] / after.sqrt().clamp(min=torch.finfo(p.dtype).tiny)[:, None]
        column[:, number] = ratio * after.sqrt()
        column[:, :number] = 0
        return column
