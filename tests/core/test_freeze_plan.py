from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups

PHASES = [("c",), ("b", "c"), ("a",)]


@pytest.fixture
def model() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})


@pytest.fixture
def groups(model: nn.ModuleDict) -> LayerGroups:
    return LayerGroups.of(model, groups={name: f"^{name}" for name in "abc"})


def training(model: nn.ModuleDict) -> str:
    return "".join(name for name, layer in model.items() if all(p.requires_grad for p in layer.parameters()))


def test_stages_in_any_order(model: nn.ModuleDict, groups: LayerGroups) -> None:
    plan = FreezePlan(groups, PHASES)
    assert training(model) == "abc"  # a plan changes nothing by itself
    assert (plan.last_stage, [plan.trainable_parameters(i) for i in range(3)]) == (2, [6, 12, 6])
    assert plan.apply(0) == []
    assert training(model) == "c"
    assert {id(p) for p in plan.apply(1)} == {id(p) for p in model["b"].parameters()}
    assert training(model) == "bc"
    assert {id(p) for p in plan.apply(2)} == {id(p) for p in model["a"].parameters()}
    assert training(model) == "a"
    plan.restore()
    assert training(model) == "abc"


def test_freezing_drops_the_gradient(model: nn.ModuleDict, groups: LayerGroups) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    FreezePlan(groups, PHASES).apply(1)
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False, False, False]


def test_what_was_frozen_is_never_touched(model: nn.ModuleDict, groups: LayerGroups) -> None:
    model["b"].weight.requires_grad_(False)
    plan = FreezePlan(groups, PHASES)
    assert plan.trainable_parameters(1) == 8
    for stage in range(3):
        assert all(p is not model["b"].weight for p in plan.apply(stage))
        assert not model["b"].weight.requires_grad
    plan.restore()
    assert not model["b"].weight.requires_grad


def test_what_always_trains(model: nn.ModuleDict, groups: LayerGroups) -> None:
    model["b"].bias.requires_grad_(False)
    plan = FreezePlan(groups, PHASES, always=[model["a"].bias, model["b"].bias])
    plan.apply(0)
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, False, True, True]
    assert [name for name, _ in plan.training(0)] == ["a.bias", "c.weight", "c.bias"]
    assert [name for name, _ in plan.frozen(0)] == ["a.weight", "b.weight"]
    assert plan.trainable_parameters(0) == 8
    plan.restore()
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True, True]


def test_refuses_phases_that_cannot_be(model: nn.ModuleDict, groups: LayerGroups) -> None:
    with pytest.raises(ValueError, match="phases is empty"):
        FreezePlan(groups, [])
    with pytest.raises(ValueError, match=r"phases name \['d'\], but the model's groups are \['a', 'b', 'c'\]"):
        FreezePlan(groups, [("c", "d")])
    model["b"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"phase 1 \(\['b'\]\) has no parameter that can train"):
        FreezePlan(groups, [("c",), ("b",)])
