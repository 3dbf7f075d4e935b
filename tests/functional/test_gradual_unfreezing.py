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


def test_until_ends_the_release() -> None:
    phases = unfreezing_phases(BERT_BASE, until="block.0")
    assert len(phases) == 13
    assert phases[-1] == tuple(BERT_BASE[1:])
    assert unfreezing_phases(BERT_BASE, until="tail") == (("tail", "head"),)
    assert [len(phase) for phase in unfreezing_phases(BERT_BASE, until="block.8", groups_per_step=3)] == [2, 5, 6]


def test_chain_thaw_of_three_layers() -> None:
    assert unfreezing_phases(["a", "b", "c"], previous="freeze") == (("c",), ("a",), ("b",), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["tail head", "embeddings", *(f"block.{i}" for i in range(12)), " ".join(BERT_BASE)]),
        (
            {"groups_per_step": 4, "until": "block.2", "start": 3},
            [
                "block.10 block.11 tail head",
                "block.2 block.3 block.4 block.5",
                "block.6 block.7 block.8 block.9",
                " ".join(BERT_BASE[3:]),
            ],
        ),
        ({"start": 14}, [" ".join(BERT_BASE)]),
        ({"start": 13}, [" ".join(BERT_BASE[1:]), "embeddings", " ".join(BERT_BASE)]),
    ],
)
def test_chain_thaw(arguments: dict[str, Any], expected: list[str]) -> None:
    phases = unfreezing_phases(BERT_BASE, previous="freeze", **arguments)
    assert [" ".join(phase) for phase in phases] == expected


@pytest.mark.parametrize(
    ("groups", "arguments", "message"),
    [
        (["a"], {"until": "b"}, "until='b' must name the lowest group to release, one of a"),
        (["a"], {"previous": "thaw"}, "previous='thaw' must be 'keep' or 'freeze'"),
        (["a"], {"start": 0}, "start=0 must be a whole number of 1 or more"),
        (["a"], {"groups_per_step": -1}, "groups_per_step=-1 must be a whole number of 1 or more"),
        (["a"], {"start": 1.0}, "start=1.0 must be a whole number of 1 or more"),
        ([], {}, "groups is empty"),
    ],
)
def test_refuses(groups: list[str], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unfreezing_phases(groups, **arguments)
