"""The expected best of n runs against an enumeration of all draws, and its band."""

from __future__ import annotations

from itertools import product
from statistics import mean

import pytest
import torch

from lightning_ft.functional.expected_best import expected_best, expected_best_band

SCORES = [0.6, 0.5, 0.7]


def test_the_numbers_of_the_paper() -> None:
    found = expected_best(SCORES, [1, 2])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.64444444444], dtype=torch.float64))
    # The lowest of two, by symmetry about 0.6.
    lowest = expected_best(SCORES, [1, 2], mode="min")
    torch.testing.assert_close(lowest, torch.tensor([0.6, 0.55555555556], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["max", "min"])
def test_it_is_the_mean_over_all_draws(mode: str) -> None:
    scores = [0.31, -1.5, 0.7, 0.7, 2.0]
    best = max if mode == "max" else min
    for n in (1, 2, 3, 4):
        every = mean(best(draw) for draw in product(scores, repeat=n))
        assert expected_best(scores, [n], mode=mode).item() == pytest.approx(every, abs=1e-12)  # type: ignore[arg-type]


def test_it_comes_near_the_best_and_never_above() -> None:
    found = expected_best(SCORES, [1, 5, 50, 5000])
    assert (found.diff() >= 0).all()
    assert found[-1] == pytest.approx(0.7)
    assert found.max() <= 0.7
    assert expected_best([0.4], [1, 7]).tolist() == [0.4, 0.4]


def test_the_band_is_the_quantiles_of_resampled_studies() -> None:
    # Of three scores there are 27 samples, equally likely: the band's ends are quantiles over them.
    n = [1, 3]
    samples = torch.stack([expected_best(list(draw), n) for draw in product(SCORES, repeat=3)])
    ends = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = samples.repeat(1000, 1).quantile(ends, dim=0)
    band = expected_best_band(SCORES, n, level=0.5, draws=20_000)
    torch.testing.assert_close(band.expected, expected_best(SCORES, n))
    torch.testing.assert_close(band.low, low, atol=1e-9, rtol=0)
    torch.testing.assert_close(band.high, high, atol=1e-9, rtol=0)


def test_the_band_covers_what_new_studies_would_show() -> None:
    # 300 studies of 40 runs each, with normal scores: the true E[max of 5 normal scores] is 1.16296.
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(300):
        scores = torch.randn(40, generator=generator)
        band = expected_best_band(scores, [5], draws=300, seed=seed)
        inside += bool(band.low[0] <= 1.16296 <= band.high[0])
    assert 0.84 <= inside / 300 <= 0.98  # percentiles of a best score are known to cover a little less than they say


def test_the_band_is_around_the_curve_seeded_and_disturbs_nothing() -> None:
    scores = torch.rand(12, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    for mode in ("max", "min"):
        band = expected_best_band(scores, range(1, 13), mode=mode)  # type: ignore[arg-type]
        assert (band.low < band.expected).all()
        assert (band.expected < band.high).all()
        again = expected_best_band(scores, range(1, 13), mode=mode)  # type: ignore[arg-type]
        assert all(torch.equal(one, other) for one, other in zip(band, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    flat = expected_best_band([0.5] * 4, [1, 2])
    torch.testing.assert_close(flat.low, flat.high)


def test_lowest_is_the_mirror_of_highest() -> None:
    high = expected_best_band(SCORES, [1, 2, 3])
    low = expected_best_band([-score for score in SCORES], [1, 2, 3], mode="min")
    torch.testing.assert_close(low.expected, -high.expected)
    torch.testing.assert_close(low.low, -high.high)
    torch.testing.assert_close(low.high, -high.low)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": []}, "one finite number or more"),
        ({"scores": [0.5, float("nan")]}, "one finite number or more"),
        ({"n": [0]}, "numbers of runs, 1 or more"),
        ({"mode": "best"}, "mode='best' must be 'max' or 'min'"),
        ({"level": 1.0}, r"level=1.0 must lie in \(0, 1\)"),
        ({"draws": 0}, "draws=0 must be 1 or more"),
    ],
)
def test_what_it_refuses(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        expected_best_band(**{"scores": SCORES, "n": [1], **change})  # type: ignore[arg-type]
