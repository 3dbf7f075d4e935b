from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lightning_ft.functional import unfreezing_phases

BERT_BASE = ["embeddings", *(f"block.{i}" for i in range(12)), "tail", "head"]


def test_four_units_train_one_two_three_four() -> None:
    assert unfreezing_phases(["a", "b", "c", "head"]) == (
        ("head",),
        ("c", "head"),
        ("b", "c", "head"),
        ("a", "b", "c", "head"),
    )


def test_bert_base_has_fourteen_phases() -> None:
    phases = unfreezing_phases(BERT_BASE)
    assert len(phases) == 14
    assert phases[0] == ("tail", "head")
    assert phases[1] == ("block.11", "tail", "head")
    assert phases[-1] == tuple(BERT_BASE)


@pytest.mark.parametrize(
    ("start", "step", "units"),
    [
        (1, 4, [1, 5, 9, 13, 14]),
        (3, 5, [3, 8, 13, 14]),
        (14, 1, [14]),
        (99, 1, [14]),
        (1, 13, [1, 14]),
        (1, 99, [1, 14]),
    ],
)
def test_bundles(start: int, step: int, units: list[int]) -> None:
    phases = unfreezing_phases(BERT_BASE, start=start, groups_per_step=step)
    assert [len(phase) - 1 for phase in phases] == units  # head and tail are one unit
    assert all(set(a) < set(b) for a, b in pairwise(phases))


def test_works_without_head_and_tail() -> None:
    assert unfreezing_phases(["stem", "layer1"]) == (("layer1",), ("stem", "layer1"))
    assert unfreezing_phases(["only"]) == (("only",),)


@pytest.mark.parametrize(
    ("groups", "arguments", "message"),
    [
        (["a"], {"start": 0}, "start=0 must be a whole number of 1 or more"),
        (["a"], {"groups_per_step": -1}, "groups_per_step=-1 must be a whole number of 1 or more"),
        (["a"], {"start": 1.0}, "start=1.0 must be a whole number of 1 or more"),
        ([], {}, "groups is empty"),
    ],
)
def test_refuses(groups: list[str], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unfreezing_phases(groups, **arguments)
