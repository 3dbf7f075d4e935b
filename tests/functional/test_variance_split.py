"""Components of variance: hand-made tables of the analysis of variance, and simulations with known components."""

from __future__ import annotations

from statistics import mean, variance

import pytest
import torch

from lightning_ft.functional.variance_split import variance_split

INITS, ORDERS = [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]


def by_hand(table: list[list[float]]) -> tuple[float, float, float]:
    """The two-way analysis of variance without replication, as a textbook writes it."""
    rows, columns = len(table), len(table[0])
    whole = mean(value for row in table for value in row)
    row_means = [mean(row) for row in table]
    column_means = [mean(row[j] for row in table) for j in range(columns)]
    ms_rows = columns * variance(row_means)
    ms_columns = rows * variance(column_means)
    rest = [(table[i][j] - row_means[i] - column_means[j] + whole) ** 2 for i in range(rows) for j in range(columns)]
    ms_rest = sum(rest) / ((rows - 1) * (columns - 1))
    return (ms_rows - ms_rest) / columns, (ms_columns - ms_rest) / rows, ms_rest


def test_a_full_grid_is_the_two_way_analysis_of_variance() -> None:
    # Row means 2 and 5, column means 2, 3.5 and 5, residuals 0 but for ±0.5 in four cells:
    # SS_rows = 13.5, SS_columns = 9, SS_rest = 1; so MS 13.5, 4.5, 0.5.
    scores = [0.0, 2.0, 4.0, 4.0, 5.0, 6.0]
    split = variance_split(scores, INITS, ORDERS)
    assert split.residual == pytest.approx(0.5)
    assert split.init == pytest.approx((13.5 - 0.5) / 3)
    assert split.order == pytest.approx((4.5 - 0.5) / 2)
    assert split.total == pytest.approx(variance(scores))
    assert split.note == ""


def test_random_grids_agree_with_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((2, 2), (5, 4), (3, 7)):
        table = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        table = table + 3 * torch.randn(rows, 1, generator=generator) + 2 * torch.randn(1, columns, generator=generator)
        cells = [(i, j) for j in range(columns) for i in range(rows)]  # in another order than the table's
        split = variance_split([table[c] for c in cells], [f"i{i}" for i, _ in cells], [j for _, j in cells])
        for found, expected in zip((split.init, split.order, split.residual), by_hand(table.tolist()), strict=True):
            assert found == pytest.approx(max(expected, 0.0), abs=1e-9)


def simulated(design: list[tuple[int, int]], studies: int) -> torch.Tensor:
    """Mean components over studies, before anything was cut off at 0: large effects make that rare."""
    generator = torch.Generator().manual_seed(3)
    found = []
    init, order = [i for i, _ in design], [j for _, j in design]
    for _ in range(studies):
        a = 2.0 * torch.randn(max(init) + 1, generator=generator, dtype=torch.float64)
        b = 1.0 * torch.randn(max(order) + 1, generator=generator, dtype=torch.float64)
        e = 0.3 * torch.randn(len(design), generator=generator, dtype=torch.float64)
        split = variance_split(a[init] + b[order] + e, init, order)
        found.append([split.init, split.order, split.residual])
    return torch.tensor(found).mean(0)


@pytest.mark.parametrize("missing", [0, 11], ids=["full", "with holes"])
def test_it_finds_the_components_that_were_put_in(missing: int) -> None:
    design = [(i, j) for i in range(8) for j in range(6)]
    for k in range(missing):
        design.pop((k * 7) % len(design))
    assert len(design) == 48 - missing
    found = simulated(design, 400)
    assert found.tolist() == pytest.approx([4.0, 1.0, 0.09], rel=0.12)


def test_one_seeds_effect_does_not_leak_into_the_others() -> None:
    design = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 1), (2, 0)]  # a grid with holes
    init, order = [i for i, _ in design], [j for _, j in design]
    scores = torch.rand(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + torch.tensor(init)
    before = variance_split(scores, init, order)
    after = variance_split(scores + 100.0 * torch.tensor(order), init, order)
    assert after.order is not None
    assert after.order > 1000
    assert (after.init, after.residual) == pytest.approx((before.init, before.residual))


def test_cells_run_twice_are_allowed() -> None:
    # y = a + b exactly: no residual, whichever cells there are.
    design = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1), (2, 1)]
    scores = [10.0 * i + j for i, j in design]
    split = variance_split(scores, [i for i, _ in design], [j for _, j in design])
    assert split.residual == pytest.approx(0.0, abs=1e-9)
    assert split.init is not None
    assert split.init > 10
    # b is 0 or 1: two values at distance 1, of variance 1/2.
    assert split.order == pytest.approx(0.5)


def test_a_component_below_zero_is_zero_and_said_so() -> None:
    split = variance_split([1.0, 2.0, 2.0, 1.0], [0, 0, 1, 1], [0, 1, 0, 1])  # all interaction
    assert (split.init, split.order) == (0.0, 0.0)
    assert split.residual == pytest.approx(1.0)
    assert "initialisation and order is below zero and given as 0" in split.note


def test_equal_scores_have_no_variance_and_no_complaint() -> None:
    split = variance_split([0.5] * 6, INITS, ORDERS)
    assert (split.total, split.init, split.order) == (0.0, 0.0, 0.0)
    assert split.residual == pytest.approx(0.0, abs=1e-20)
    assert split.note == ""


@pytest.mark.parametrize(
    ("init", "order", "said"),
    [
        ([0, 1, 2, 3], [7, 8, 9, 10], "paired, not a grid"),
        ([0, 0, 1, 1], [0, 1, 2, 3], "change together"),  # each order belongs to one initialisation
        ([0, 0, 0, 0], [0, 1, 2, 3], "All runs have the same seed of initialisation"),
        ([0, 1, 2, 3], [5, 5, 5, 5], "All runs have the same seed of order"),
        ([0, 0, 0, 0], [5, 5, 5, 5], "what varies is neither"),
        ([0, 0, 1, 2], [0, 1, 1, 1], "Too few runs share a seed"),
    ],
)
def test_what_cannot_be_told_apart_is_not_given(init: list[int], order: list[int], said: str) -> None:
    scores = [0.1, 0.4, 0.2, 0.9]
    split = variance_split(scores, init, order)
    assert (split.init, split.order, split.residual) == (None, None, None)
    assert split.total == pytest.approx(variance(scores))
    assert said in split.note


def test_one_score_or_none_has_no_variance() -> None:
    assert variance_split([], [], []).total is None
    assert "two scores" in variance_split([0.3], [1], [1]).note


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="of one length, not 2, 1 and 2"):
        variance_split([0.1, 0.2], [1], [1, 2])
    with pytest.raises(ValueError, match="must be finite"):
        variance_split([0.1, float("inf")], [1, 2], [1, 2])
