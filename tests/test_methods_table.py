"""The committed table of methods: it has every cell, what it says is within tolerance, and the rest has a reason."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.method_rows import METHODS
from tests.methods import KINDS, PROPERTIES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CELLS = [(name, kind) for name in METHODS for kind in KINDS]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("methods_table", BENCHMARKS / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # the script adds its folders
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads((BENCHMARKS / "results" / "methods.json").read_text("utf-8"))
    found: list[dict[str, Any]] = content["rows"]
    return found


def test_every_cell_is_in_the_committed_table(rows: list[dict[str, Any]]) -> None:
    assert [(row["method"], row["kind"]) for row in rows] == CELLS
    assert all(list(row["found"]) == list(PROPERTIES) for row in rows)


def test_what_cannot_be_is_what_the_methods_say(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        method = METHODS[row["method"]]
        nothing = method.reason(row["kind"], "share")
        for what, found in row["found"].items():
            reason = nothing or method.reason(row["kind"], what)
            assert (found["impossible"] if isinstance(found, dict) else None) == reason


def test_what_is_there_is_within_tolerance(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        found = {what: value for what, value in row["found"].items() if not isinstance(value, dict)}
        assert all(found[what] is True for what in ("trains", "resumes", "reloads") if what in found)
        assert 0 < found.get("share", 1) <= 1
        assert found.get("saves", 1) > 0
        assert found.get("merges", 0) <= METHODS[row["method"]].tolerance
        assert found.get("exports", 0) <= 1e-4


def test_the_text_is_that_of_the_figures(table: ModuleType, rows: list[dict[str, Any]]) -> None:
    assert (BENCHMARKS / "results" / "methods.md").read_text("utf-8") == table.markdown(rows)
