from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_ft.core import LayerGroups
from lightning_ft.functional import decay_groups, depth_multipliers, warmup_then
from lightning_ft.functional.learning_rates import explicit_multipliers, slanted_triangular

TWELVE = ["embeddings", *(f"block.{i}" for i in range(12)), "tail", "head"]


def test_twelve_blocks() -> None:
    rates = {name: 1e-4 * factor for name, factor in depth_multipliers(TWELVE, decay=0.9).items()}
    assert rates["head"] == rates["tail"] == 1e-4
    assert rates["block.11"] == pytest.approx(9e-5)
    assert rates["block.0"] == pytest.approx(1e-4 * 0.9**12)
    assert rates["embeddings"] == pytest.approx(2.5419e-5, rel=1e-4)


def test_gap_of_electra() -> None:
    factors = depth_multipliers(TWELVE, decay=0.8, head_gap=2)
    assert factors["block.11"] == pytest.approx(0.64)
    assert 1e-4 * factors["embeddings"] == pytest.approx(4.398e-6, rel=1e-4)


def test_four_groups_of_ulmfit() -> None:
    factors = depth_multipliers(["embedding", "lstm1", "lstm2", "head"], decay=1 / 2.6)
    expected = [0.00056895, 0.0014793, 0.0038462, 0.01]
    assert [0.01 * factor for factor in factors.values()] == pytest.approx(expected, rel=1e-4)


def test_stacks_are_numbered_each_by_itself() -> None:
    groups = [
        "embeddings",
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
        "decoder.block.2",
        "head",
    ]
    assert list(depth_multipliers(groups, decay=0.5).values()) == [1 / 16, 1 / 4, 1 / 2, 1 / 8, 1 / 4, 1 / 2, 1]


def test_gap_zero_gives_the_top_block_the_rate_of_the_head() -> None:
    assert list(depth_multipliers(["block.0", "block.1", "head"], decay=0.5, head_gap=0).values()) == [0.5, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 0}, r"decay=0 must lie in \(0, 1\]"),
        ({"decay": math.nan}, r"decay=nan must lie in \(0, 1\]"),
        ({"head_gap": 0.5}, "head_gap=0.5 must be a whole number of 0 or more"),
    ],
)
def test_refuses_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth_multipliers(["head"], **arguments)


def test_decay_groups_take_each_parameter_once_and_frozen_ones_too() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(4, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["tokens"].weight
    model["norm"].requires_grad_(False)
    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
    matrices, vectors = decay_groups(parameters, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [p.ndim for p in matrices["params"]] == [2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]


def test_decay_groups_leave_out_an_empty_one() -> None:
    assert [group["weight_decay"] for group in decay_groups([nn.Parameter(torch.ones(2))], 0.1)] == [0.0]


@pytest.mark.parametrize(
    ("shape", "reference"),
    [
        ("linear", hf.get_linear_schedule_with_warmup),
        ("cosine", hf.get_cosine_schedule_with_warmup),
        ("constant", hf.get_constant_schedule_with_warmup),
    ],
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (20, 10)])
def test_warmup_then_equals_transformers(shape: Any, reference: Any, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    horizon = {} if shape == "constant" else {"num_training_steps": total}
    scheduler = reference(optimizer, num_warmup_steps=warmup, **horizon)
    factor = warmup_then(shape, total_steps=total, warmup_steps=warmup)
    for step in range(total):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert shape == "constant" or warmup >= total or factor(total + 5) == pytest.approx(0, abs=1e-12)


def test_warmup_then_without_an_end() -> None:
    assert warmup_then("constant", total_steps=math.inf, warmup_steps=2)(99) == 1.0
    with pytest.raises(
        ValueError, match='schedule="cosine" falls to 0 at the end of training, and this training has none'
    ):
        warmup_then("cosine", total_steps=math.inf, warmup_steps=2)


def test_slanted_triangle_of_the_paper() -> None:
    rates = [0.01 * slanted_triangular(step, 100) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0.0003125, 0.00515625, 0.01, 0.00515625, 0.0003125], rel=1e-12)


@pytest.mark.parametrize(("total", "cut"), [(100, 0.1), (100, 0.29), (50, 0.3), (1000, 0.05), (20, 0.5)])
def test_slanted_triangle_is_the_papers_formula_where_its_cut_is_whole(total: int, cut: float) -> None:
    n = round(total * cut)
    for step in range(total + 1):
        p = step / n if step < n else 1 - (step - n) / (n * (1 / cut - 1))
        assert slanted_triangular(step, total, cut=cut, ratio=16) == pytest.approx((1 + p * 15) / 16, abs=1e-12)
    assert max(range(total), key=lambda step: slanted_triangular(step, total, cut=cut)) == n


@pytest.mark.parametrize("total", [1, 2, 5, 9, 10, 15, 37])
def test_slanted_triangle_rises_and_falls_in_short_runs_too(total: int) -> None:
    factors = [slanted_triangular(step, total) for step in range(total + 5)]
    assert factors[0] == 1 / 32
    assert factors[max(1, total // 10)] == max(factors) == 1
    assert total == 1 or factors[total:] == pytest.approx([1 / 32] * 5)
    assert slanted_triangular(99, 1) == 1 / 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cut": 0.0}, r"cut=0.0 must be a share of training in \(0, 1\)"),
        ({"cut": 1.0}, "cut=1.0 must be a share"),
        ({"ratio": 0.5}, "ratio=0.5 must be 1 or more"),
        ({"total": math.inf}, r"total=inf must be the number of optimiser steps.* Set Trainer\(max_epochs="),
        ({"total": 0}, "total=0 must be the number of optimiser steps"),
    ],
)
def test_slanted_triangle_refuses_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slanted_triangular(0, **{"total": 10, **arguments})


def test_explicit_multipliers_are_in_the_order_of_the_groups() -> None:
    tower = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    groups = LayerGroups.of(tower, groups={"block.0": "^0", "block.1": "^1", "head": "^2"})
    assert list(explicit_multipliers(groups, {"head": 10, "bottom:1": 0.5}).items()) == [("block.0", 0.5), ("head", 10)]
    assert explicit_multipliers(groups, {}) == {}
    with pytest.raises(ValueError, match=r"rates speaks of 'block.1' twice"):
        explicit_multipliers(groups, {"blocks": 0.5, "block.1": 0.5})
