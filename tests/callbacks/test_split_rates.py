from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ft.callbacks._split_rates import SplitRates


@pytest.mark.parametrize("first", [0, 1])
def test_factors_of_two_owners_multiply_and_leave_one_by_one(first: int) -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a, b]}, {"params": [c], "lr": 2.0}], lr=1.0)
    own = optimizer.param_groups
    splits = [SplitRates(optimizer, {id(a): 0.5}), SplitRates(optimizer, {id(a): 4.0, id(c): 0.25})]

    def step() -> list[float]:
        for parameter in (a, b, c):
            parameter.grad = torch.ones(1)
            parameter.data.zero_()
        optimizer.step()
        assert optimizer.param_groups is own
        assert [(len(group["params"]), group["lr"]) for group in own] == [(2, 1.0), (1, 2.0)]
        return [-a.item(), -b.item(), -c.item()]

    assert step() == [2.0, 1.0, 0.5]
    assert step() == [2.0, 1.0, 0.5]
    splits[first].remove()
    assert step() == [[4.0, 1.0, 0.5], [0.5, 1.0, 2.0]][first]
    splits[1 - first].remove()
    splits[1 - first].remove()  # once is enough
    assert step() == [1.0, 1.0, 2.0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
