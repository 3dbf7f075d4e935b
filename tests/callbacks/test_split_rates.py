"""Groups that are split while an optimiser steps: against arithmetic, other hooks, and optimisers of all sorts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_ft.callbacks._rate_factor import RateFactor
from lightning_ft.callbacks._split_rates import SplitRates, own_rates


def scalars(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(count)]


def moved(optimizer: Any, *parameters: nn.Parameter, start: float = 0.0) -> list[float]:
    """By how much a step with gradients of one lowers parameters: SGD's rates, where nothing decays."""
    for parameter in parameters:
        parameter.grad = torch.ones(1)
        parameter.data.fill_(start)
    optimizer.step()
    return [start - parameter.item() for parameter in parameters]


def assert_clean(optimizer: Any) -> None:
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("first", [0, 1])
def test_factors_of_two_owners_multiply_and_leave_one_by_one(first: int) -> None:
    a, b, c = scalars(3)
    optimizer = torch.optim.SGD([{"params": [a, b]}, {"params": [c], "lr": 2.0}], lr=1.0)
    own = optimizer.param_groups
    splits = [SplitRates(optimizer, {id(a): 0.5}), SplitRates(optimizer, {id(a): 4.0, id(c): 0.25})]

    def step() -> list[float]:
        steps = moved(optimizer, a, b, c)
        assert optimizer.param_groups is own
        assert [(len(group["params"]), group["lr"]) for group in own] == [(2, 1.0), (1, 2.0)]
        return steps

    assert step() == [2.0, 1.0, 0.5]
    assert step() == [2.0, 1.0, 0.5]
    splits[first].remove()
    assert step() == [[4.0, 1.0, 0.5], [0.5, 1.0, 2.0]][first]
    splits[1 - first].remove()
    splits[1 - first].remove()  # once is enough
    assert step() == [1.0, 1.0, 2.0]
    assert_clean(optimizer)


def test_who_is_named_by_one_owner_is_not_decayed() -> None:
    """SGD adds decay · θ to a gradient of 1, and θ is 2."""
    a, b, c = scalars(3)
    optimizer = torch.optim.SGD([a, b, c], lr=1.0, weight_decay=0.25)
    splits = [SplitRates(optimizer, {id(a): 0.5}, undecayed={id(a)}), SplitRates(optimizer, {}, undecayed={id(b)})]
    assert moved(optimizer, a, b, c, start=2.0) == [0.5, 1.0, 1.5]
    splits[1].remove()
    assert moved(optimizer, a, b, c, start=2.0) == [0.5, 1.5, 1.5]
    splits[0].remove()
    assert moved(optimizer, a, b, c, start=2.0) == [1.5, 1.5, 1.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25]


def test_optimisers_without_a_rate_or_a_decay_step_as_they_are() -> None:
    class Fixed(torch.optim.Optimizer):
        def __init__(self, parameters: Any, **defaults: Any) -> None:
            self.seen: list[list[dict[str, Any]]] = []
            super().__init__(parameters, defaults)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.seen.append([{k: v for k, v in group.items() if k != "params"} for group in self.param_groups])

    a, b = scalars(2)
    relative, bare = Fixed([a, b], lr=None, weight_decay=0.5), Fixed([a, b], lr=1.0)
    for optimizer in (relative, bare):
        SplitRates(optimizer, {}, undecayed={id(b)})
        optimizer.step()
    assert relative.seen == [[{"lr": None, "weight_decay": 0.5}, {"lr": None, "weight_decay": 0.0}]]
    assert bare.seen == [[{"lr": 1.0}]]


def test_own_rates_of_two_owners_nest() -> None:
    layers = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(layers, lr=0.1, weight_decay=0.1)
    splits = [*own_rates("One", [optimizer], {layers[0]: 1.0}), *own_rates("Two", [optimizer], {layers[1]: 10.0})]
    groups = optimizer.param_groups
    for _ in range(3):
        for p in layers:
            p.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.param_groups is groups
        assert [len(group["params"]) for group in groups] == [3]
    assert layers[0].tolist() == [-2.0, -2.0]
    assert layers[1].tolist() == [-29.0, -29.0]
    for split in splits:
        split.remove()
    assert_clean(optimizer)


def test_an_own_rate_follows_schedules_and_other_factors() -> None:
    a, b, c = scalars(3)
    first = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=2.0)
    schedule = LambdaLR(first, lambda step: 0.5 ** (step + 1))  # below its base from the start
    second = torch.optim.SGD([c], lr=1.0)
    cycle = OneCycleLR(second, 4.0, total_steps=10, cycle_momentum=False)
    own_rates("Owner", [first, second], {b: 8.0, c: 1.0})
    SplitRates(first, {id(b): 0.25})
    assert moved(first, a, b) == [1.0, 1.0]
    schedule.step()
    assert moved(first, a, b) == [0.5, 0.5]
    assert moved(second, c) == pytest.approx([1 / 25])  # a cycle begins at a 25th of its highest rate
    while cycle.get_last_lr() != [4.0]:
        cycle.step()
    assert moved(second, c) == [1.0]


def test_a_base_is_that_of_before_a_restore() -> None:
    a, b = scalars(2)
    optimizer = torch.optim.SGD([a, b], lr=2.0)
    own_rates("Owner", [optimizer], {b: 8.0})
    halved = optimizer.state_dict()
    halved["param_groups"][0]["lr"] = 1.0  # somebody's own schedule, without a scheduler
    optimizer.load_state_dict(halved)
    assert moved(optimizer, a, b) == [1.0, 4.0]


class Swapping:
    """Hooks of somebody else, who has the optimiser step copies of its groups, at twice the rate."""

    def __init__(self, optimizer: Any) -> None:
        self.own: Any = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Any, *_: Any) -> None:
        self.own = optimizer.param_groups
        self.swapped = [{**group, "lr": group["lr"] * 2} for group in self.own]
        optimizer.param_groups = self.swapped

    def _after(self, optimizer: Any, *_: Any) -> None:
        assert optimizer.param_groups is self.swapped
        optimizer.param_groups = self.own


def factor_of_two(optimizer: Any) -> None:
    RateFactor("Owner", [optimizer]).value = 2.0


@pytest.mark.parametrize("other", [Swapping, factor_of_two])
@pytest.mark.parametrize("first", [True, False], ids=["other first", "other last"])
def test_other_hooks_run_within_and_a_step_that_raised_leaves_nothing(other: Callable[[Any], Any], first: bool) -> None:
    def out_of_memory() -> None:
        raise MemoryError

    a, b = scalars(2)
    optimizer = torch.optim.SGD([a, b], lr=1.0)
    own = optimizer.param_groups
    if first:
        other(optimizer)
    split = SplitRates(optimizer, {id(b): 0.25}, undecayed={id(b)})
    if not first:
        other(optimizer)
    for _ in range(2):
        assert moved(optimizer, a, b) == [2.0, 0.5]
        with pytest.raises(MemoryError):
            optimizer.step(out_of_memory)
        assert moved(optimizer, a, b) == [2.0, 0.5]
        assert optimizer.param_groups is own
        assert [(len(group["params"]), group["lr"]) for group in own] == [(2, 1.0)]
    with pytest.raises(MemoryError):
        optimizer.step(out_of_memory)
    split.remove()
    assert optimizer.param_groups is own
    assert moved(optimizer, a, b) == [2.0, 2.0]


def test_other_hooks_see_what_is_stepped() -> None:
    a, b = scalars(2)
    optimizer = torch.optim.SGD([a, b], lr=1.0)
    seen: list[list[float]] = []

    def look(optimizer: Any, *_: Any) -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    SplitRates(optimizer, {id(b): 0.25})
    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    moved(optimizer, a, b)
    moved(optimizer, a, b)
    assert seen == [[1.0, 0.25]] * 8


def test_values_that_an_optimiser_keeps_in_its_groups_run_on_and_rates_do_not() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return super().step(closure)

    a, b = scalars(2)
    optimizer = Counting([a, b], lr=1.0, weight_decay=0.5)
    own_rates("Owner", [optimizer], {a: 4.0})  # the first, whose part is copied back
    moved(optimizer, a, b)
    moved(optimizer, a, b)
    (group,) = optimizer.param_groups
    assert (group["count"], group["lr"], group["weight_decay"]) == (2, 1.0, 0.5)


def test_refuses_parameters_that_no_optimiser_holds() -> None:
    a, b, c = scalars(3)
    optimizers = [torch.optim.SGD([a], lr=1.0), torch.optim.SGD([a, b], lr=1.0)]
    with pytest.raises(
        ValueError, match="Owner added 3 tensors to the model, and 1 of them are in no optimiser: build"
    ):
        own_rates("Owner", optimizers, dict.fromkeys((a, b, c), 1.0))
    for optimizer in optimizers:
        assert_clean(optimizer)
    assert len(own_rates("Owner", optimizers, {a: 1.0})) == 2
    assert len(own_rates("Owner", optimizers, {b: 1.0})) == 1


def test_refuses_a_rate_that_cannot_be_set_or_is_zero() -> None:
    (a,) = scalars(1)
    rateless = torch.optim.SGD([a], lr=1.0)
    rateless.param_groups[0]["lr"] = None
    wrapper: Any = SimpleNamespace(param_groups=[{"params": [a], "lr": 1.0}])
    for optimizer, name in ((rateless, "SGD"), (wrapper, "SimpleNamespace")):
        message = rf"Owner gives some parameters a learning rate of their own, and {name} has none .* such as AdamW"
        with pytest.raises(ValueError, match=message):
            own_rates("Owner", [optimizer], {a: 1.0})
    message = (
        r"Owner: a group of SGD has the base learning rate 0\.0, of which nothing can take a share: give it a rate"
    )
    with pytest.raises(ValueError, match=message):
        own_rates("Owner", [torch.optim.SGD([a], lr=0.0)], {a: 1.0})
