"""The score to expect of the best of n runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class ExpectedBest(NamedTuple):
    """Expected best scores, one for each number of runs, and a band around them."""

    expected: Tensor
    low: Tensor
    high: Tensor


def expected_best(scores: Sequence[float] | Tensor, n: Sequence[int], *, mode: Literal["max", "min"] = "max") -> Tensor:
    """The expected best of n scores that are drawn, with replacement, from those that were seen.

    ``E[max of n] = Σᵢ vᵢ [(i/N)ⁿ − ((i−1)/N)ⁿ]``, with the N scores sorted, v₁ ≤ … ≤ v_N. It says what n runs are
    worth, whichever seeds they get; it never exceeds the best score seen, and is too low where n comes near N. A score
    by which the best run is chosen is optimistic by construction: say the chosen run's test score, too.

    Args:
        scores: Of all runs, ``(N,)``. A run that failed is a draw as well: give it the score that it is worth.
        n: Numbers of runs, each 1 or more.
        mode: Whether the best score is the highest or the lowest.

    Returns:
        ``(len(n),)``, in float64.

    Raises:
        ValueError: There are no scores, one is not finite, or a number of runs is below 1.

    Example:
        >>> expected_best([0.5, 0.6, 0.7], [1, 2]).tolist()
        [0.6, 0.6444444444444444]

    Reference:
        Dodge, Gururangan, Card, Schwartz and Smith 2019, "Show Your Work: Improved Reporting of Experimental Results".
    """
    values, sign = _sorted(scores, n, mode)
    return sign * (values @ _weights(len(values), n))


def expected_best_band(
    scores: Sequence[float] | Tensor,
    n: Sequence[int],
    *,
    mode: Literal["max", "min"] = "max",
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> ExpectedBest:
    """:func:`expected_best` with a bootstrap band: how much it would vary with the runs that happened to be made.

    The scores are resampled, N of N with replacement, ``draws`` times; the band lies between the percentiles
    (1 − level)/2 and (1 + level)/2 of what the formula gives for each sample. No sample holds a score better than those
    seen: the band is somewhat too narrow at its better side, most of all for n near N.

    Args:
        scores: Of all runs, ``(N,)``.
        n: Numbers of runs, each 1 or more.
        mode: Whether the best score is the highest or the lowest.
        level: Of confidence, in (0, 1), at each n by itself.
        draws: Number of samples.
        seed: Of the samples; no other generator is touched.

    Raises:
        ValueError: As :func:`expected_best`; ``level`` or ``draws`` is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must lie in (0, 1): 0.95 for a band of 95 %")
    if draws < 1:
        raise ValueError(f"draws={draws!r} must be 1 or more")
    values, sign = _sorted(scores, n, mode)
    weights = _weights(len(values), n)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    # Values are sorted: sorting the picks sorts the samples.
    samples = values[picks.sort(dim=1).values] @ weights
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = sign * samples.quantile(ends, dim=0)
    return ExpectedBest(sign * (values @ weights), torch.minimum(low, high), torch.maximum(low, high))


def _sorted(scores: Sequence[float] | Tensor, n: Sequence[int], mode: str) -> tuple[Tensor, int]:
    """The scores, worst first, as numbers of which the highest is best; and the sign that makes them scores again."""
    if mode not in ("max", "min"):
        raise ValueError(f"mode={mode!r} must be 'max' or 'min'")
    values = torch.as_tensor(scores, dtype=torch.float64).flatten()
    if not len(values) or not values.isfinite().all():
        raise ValueError(f"scores={values.tolist()} must be one finite number or more: leave out or replace the others")
    if any(count < 1 for count in n):
        raise ValueError(f"n={list(n)} must be numbers of runs, 1 or more")
    sign = 1 if mode == "max" else -1
    return (sign * values).sort().values, sign


def _weights(count: int, n: Sequence[int]) -> Tensor:
    """The probability that the i-th of ``count`` sorted values is the best of n draws, ``(count, len(n))``."""
    shares = torch.arange(count + 1, dtype=torch.float64) / count
    return (shares[:, None] ** torch.tensor(list(n), dtype=torch.float64)).diff(dim=0)
