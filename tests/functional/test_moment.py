from __future__ import annotations

import copy

import torch
from torch import Tensor

from lightning_ft.functional.moment import Moment


class Source:
    """Counts how often its value is computed."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.tensor = torch.nn.Parameter(torch.ones(2))
        self.computed = 0

    def _compute(self) -> Tensor:
        self.computed += 1
        return self.tensor * 2

    def read(self) -> Tensor:
        return self.moment.once("w", [self.tensor], self._compute)


def test_computes_at_each_read_outside_of_a_moment_and_once_within() -> None:
    source = Source(moment := Moment())
    source.read(), source.read()
    assert source.computed == 2
    moment.begin(1)
    assert source.read() is source.read()
    assert source.computed == 3
    moment.begin(2)
    source.read()
    assert source.computed == 4
    moment.drop()
    source.read()
    assert (source.computed, moment.stamp) == (5, (2,))
    moment.end()
    source.read(), source.read()
    assert source.computed == 7


def test_a_write_to_what_it_is_computed_of_makes_a_new_value() -> None:
    source = Source(moment := Moment())
    moment.begin()
    before = source.read()
    before.sum().backward()
    torch.optim.AdamW([source.tensor], lr=0.1, foreach=True).step()
    assert not torch.equal(source.read(), before)


def test_gradient_modes_do_not_share_a_value() -> None:
    source = Source(moment := Moment())
    moment.begin()
    with torch.no_grad():
        assert not source.read().requires_grad
    assert source.read().requires_grad
    with torch.inference_mode():
        assert source.read().is_inference()
    assert not source.read().is_inference()


def test_a_copy_shares_nothing() -> None:
    source = Source(moment := Moment())
    moment.begin(5)
    source.read()
    assert copy.deepcopy(moment).stamp is None
