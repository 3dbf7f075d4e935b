from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ft.functional.gradient_norms import group_squares, joined


def parameter(*gradient: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    result = nn.Parameter(torch.zeros(len(gradient), dtype=dtype))
    result.grad = torch.tensor(gradient, dtype=dtype)
    return result


def test_groups_and_what_has_no_gradient() -> None:
    one, two, half = parameter(3.0, 4.0), parameter(12.0), parameter(2.0, dtype=torch.bfloat16)
    frozen, unused = parameter(9.0).requires_grad_(False), nn.Parameter(torch.zeros(1))
    groups = {"a": [one, two], "b": [frozen, unused], "c": [half, frozen]}
    assert group_squares(groups, {one, two, half, frozen, unused}).tolist() == [169.0, -1.0, 4.0]
    assert group_squares(groups, {two}).tolist() == [144.0, -1.0, -1.0]
    assert group_squares(groups, set()).tolist() == [-1.0, -1.0, -1.0]


def test_sparse_gradients() -> None:
    table = nn.Embedding(4, 1, sparse=True)
    table(torch.tensor([1, 1, 2])).sum().backward()
    assert group_squares({"a": [table.weight]}, {table.weight}).tolist() == [5.0]


def test_two_optimisers_share_groups() -> None:
    one, other = torch.tensor([4.0, -1.0, -1.0, 1.0]), torch.tensor([-1.0, 9.0, -1.0, 2.0])
    assert joined(one, other).tolist() == [4.0, 9.0, -1.0, 3.0]
    assert joined(None, other) is other


def test_refuses_fsdp1() -> None:
    piece = parameter(1.0)
    piece._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="FSDP1 shares layers out in pieces"):
        group_squares({"a": [piece]}, {piece})
