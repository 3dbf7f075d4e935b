"""The committed table of parity: it has every cell that the tests have, and what it says is within tolerance."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch

from lightning_ft.export.quantize import Precision
from tests.export.test_heads import CELLS, CLASSES, NO_CLASS, SETTINGS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_table", BENCHMARKS / "parity_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["parity_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((BENCHMARKS / "results" / "parity.json").read_text("utf-8"))
    return content


def test_every_cell_is_in_the_committed_table(table: ModuleType, committed: dict[str, Any]) -> None:
    names = [f"{row['task']} {row['family']}" for row in committed["rows"]]
    assert names == [cell.name for cell in table.CELLS]
    assert set(names) >= {f"{task} {family}" for task, family in CELLS}
    assert all(set(row["precisions"]) == set(get_args(Precision)) for row in committed["rows"])
    # Head x architecture is whole: a cell or a reason.
    assert set(names) | table.IMPOSSIBLE.keys() >= {f"{task} {family}" for task in CLASSES for family in SETTINGS}
    assert not set(names) & table.IMPOSSIBLE.keys()
    assert table.IMPOSSIBLE.keys() == {f"{task} {family}" for task, families in NO_CLASS.items() for family in families}


def test_the_text_is_that_of_the_figures(table: ModuleType, committed: dict[str, Any]) -> None:
    text = (BENCHMARKS / "results" / "parity.md").read_text("utf-8")
    assert text == table.markdown(committed["rows"], committed["machine"])
    for name, reason in table.IMPOSSIBLE.items():
        assert f"| {name.replace(' ', ' | ')} | {reason} |" in text


def test_all_is_within_tolerance(table: ModuleType, committed: dict[str, Any]) -> None:
    impossible = set()
    for row in committed["rows"]:
        cell, found = (row["task"], row["family"]), row["precisions"]
        assert found["fp32"]["worst"] <= table.TOLERANCES["fp32"], cell
        if "impossible" in found["fp16"]:
            impossible.add((*cell, "fp16"))
            continue
        # Random weights of large variance make attention sharp: single outputs, which the table marks, move further.
        assert found["fp16"]["distance"] <= 2 * table.TOLERANCES["fp16"], cell
    assert impossible == table.CRASHES.keys()


def test_distances(table: ModuleType) -> None:
    got = [{"logits": torch.tensor([[1.0, 3.0], [5.0, 5.5]])}]
    expected = [{"logits": torch.tensor([[1.0, 4.0], [5.0, 2.0]])}]
    mask = [torch.tensor([True, True])]
    found = table._distances(got, expected, mask, ())
    assert found["worst"] == pytest.approx(3.5 / 5)
    assert found["distance"] == pytest.approx(((1 + 3.5**2) / (1 + 16 + 25 + 4)) ** 0.5)
    assert found["agreement"] == 0.5
    masked = table._distances(got, expected, [torch.tensor([True, False])], ("logits",))
    assert (masked["worst"], masked["agreement"]) == (pytest.approx(1 / 4), 1.0)


def test_a_cell_is_measured(table: ModuleType) -> None:
    (cell,) = [cell for cell in table.CELLS if cell.name == "text-classification bert"]
    row = table.row_of(cell)
    assert row["precisions"]["fp32"]["worst"] <= 1e-5
    assert 1e-5 < row["precisions"]["fp16"]["worst"] <= 1e-2
    assert row["precisions"]["int8"]["agreement"] > 0.5
