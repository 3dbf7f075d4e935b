"""The variance of scores, split into what the head's initialisation and what the order of the data contribute."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VarianceSplit:
    """Components of variance; each None where the design does not tell it apart.

    Args:
        total: The scores' variance, N − 1 in the denominator; None for fewer than two scores.
        init: Of the head's initialisation.
        order: Of the order of the data.
        residual: All else: what the two do together, dropout, and chance.
        note: What a reader of the numbers should know, in words; empty where there is nothing.
    """

    total: float | None
    init: float | None = None
    order: float | None = None
    residual: float | None = None
    note: str = ""


def variance_split(
    scores: Sequence[float] | Tensor, init: Sequence[Hashable], order: Sequence[Hashable]
) -> VarianceSplit:
    """Estimate how much of the scores' variance each of two seeds makes.

    Model: ``y = μ + a[init] + b[order] + e``, all three drawn at random with variances σ²_a, σ²_b, σ²_e. Each factor's
    sum of squares, beyond what the other explains, is set equal to its expectation (Henderson's method III):

    ``R(a | μ, b) = tr(Zₐᵀ (P − P_b) Zₐ) σ²_a + rank(P − P_b) σ²_e``, and so for b, with
    ``σ²_e = yᵀ(I − P)y / (N − rank P)``

    where P projects onto both factors and the mean, P_b onto b and the mean, and Zₐ holds the indicators of a. On a
    full grid of I × J runs this is the two-way analysis of variance, ``σ²_a = (MS_a − MS_e) / J``; cells that are
    missing (collapsed runs) or run twice are allowed. Estimates are unbiased and may come out negative: these are given
    as 0, with a note.

    On a paired design, where the two seeds change together, they cannot be told apart, and no component is given.

    Args:
        scores: Of the runs, ``(N,)``.
        init: Seed of the initialisation of each run.
        order: Seed of the data's order of each run.

    Raises:
        ValueError: The lengths differ, or a score is not finite.

    Example:
        >>> split = variance_split([1.0, 2.0, 3.0, 4.0], init=[0, 0, 1, 1], order=[0, 1, 0, 1])
        >>> round(split.init, 6), round(split.order, 6), round(split.residual, 6)
        (2.0, 0.5, 0.0)

    Reference:
        Searle, Casella and McCulloch 1992, "Variance Components", chapter 5; Dodge et al. 2020, "Fine-Tuning Pretrained
        Language Models: Weight Initializations, Data Orders, and Early Stopping".
    """
    y = torch.as_tensor(scores, dtype=torch.float64).flatten()
    if not len(y) == len(init) == len(order):
        raise ValueError(f"scores, init and order must be of one length, not {len(y)}, {len(init)} and {len(order)}")
    if not y.isfinite().all():
        raise ValueError(f"scores={y.tolist()} must be finite: leave the others out")
    if len(y) < 2:
        return VarianceSplit(None, note="Variance needs two scores or more.")
    total, y = float(y.var()), y - y.mean()
    a, b = _indicators(init), _indicators(order)
    one = y.new_ones(len(y), 1)
    both, only_a, only_b = _projector(one, a, b), _projector(one, a), _projector(one, b)
    rank, rank_a, rank_b = (round(float(p.trace())) for p in (both, only_a, only_b))
    if why := _inseparable(len(y), rank, rank_a, rank_b):
        return VarianceSplit(total, note=why)
    residual = float(y @ (y - both @ y)) / (len(y) - rank)
    of_init = _component(y, a, both - only_b, rank - rank_b, residual)
    of_order = _component(y, b, both - only_a, rank - rank_a, residual)
    rounding = 1e-12 * total
    below = [name for name, value in (("initialisation", of_init), ("order", of_order)) if value < -rounding]
    note = f"The estimate for {' and '.join(below)} is below zero and given as 0: too few runs to see it." * bool(below)
    return VarianceSplit(total, max(of_init, 0.0), max(of_order, 0.0), max(residual, 0.0), note)


def _indicators(levels: Sequence[Hashable]) -> Tensor:
    """One column for each level, ``(N, levels)``."""
    known = list(dict.fromkeys(levels))
    return torch.nn.functional.one_hot(torch.tensor([known.index(level) for level in levels]), len(known)).double()


def _projector(*columns: Tensor) -> Tensor:
    """The orthogonal projection onto the columns' span, ``(N, N)``."""
    design = torch.cat(columns, dim=1)
    projector: Tensor = design @ torch.linalg.pinv(design)
    return projector


def _component(y: Tensor, levels: Tensor, beyond: Tensor, freedom: int, residual: float) -> float:
    """σ² of a factor, from its sum of squares beyond the other's."""
    weight = float((levels * (beyond @ levels)).sum())
    return (float(y @ beyond @ y) - freedom * residual) / weight


def _inseparable(count: int, rank: int, rank_a: int, rank_b: int) -> str:
    """Why the components cannot be told apart, or nothing."""
    if rank_a == 1 and rank_b == 1:
        return "All runs have the same seeds of initialisation and order: what varies is neither."
    if rank_a == 1 or rank_b == 1:
        one, other = ("initialisation", "order") if rank_a == 1 else ("order", "initialisation")
        return f"All runs have the same seed of {one}: what the {other} contributes cannot be told from chance."
    if rank in (rank_a, rank_b):
        return (
            "The seeds of initialisation and order change together (paired, not a grid): what each contributes cannot "
            "be told apart. Run a grid of seeds to see it."
        )
    if rank == count:
        return "Too few runs share a seed: what the seeds contribute cannot be told from chance. Run a full grid."
    return ""
