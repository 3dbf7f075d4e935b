"""The benchmark of stability runs from end to end, at a size at which its figures mean nothing."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark_script import BENCHMARKS, run_script

SCRIPT = BENCHMARKS / "stability.py"


@pytest.mark.slow
def test_finished_runs_are_read_again(real_data: Path, tmp_path: Path) -> None:
    options = ("--tasks", "sst2", "--methods", "3 epochs", "long")
    tables, told = run_script("stability", real_data, tmp_path, *options)
    short, long = tables["Dev accuracy, sst2, 100 rows"]
    assert (short["method"], short["seeds"], short["steps"]) == ("3 epochs", 2, 4)
    assert (long["steps"], long["forward"], long["backward"]) == (8, 8, 8)
    assert "accuracy': " in told
    again, told = run_script("stability", real_data, tmp_path, *options)
    assert again == tables
    assert "accuracy': " not in told


@pytest.mark.slow
def test_all_methods(real_data: Path, tmp_path: Path) -> None:
    tables, _ = run_script("stability", real_data, tmp_path)
    rows = {row["method"]: row for row in tables["Dev accuracy, rte, 500 rows"]}
    passes = {method: (row["forward"] / row["steps"], row["backward"] / row["steps"]) for method, row in rows.items()}
    for plain in ("3 epochs", "3 epochs, uncorrected", "long", "re-init", "mixout"):
        assert passes[plain] == (1, 1)
    # LP-FT reads the rows once before it trains; R3F has two passes, FreeLB K.
    assert passes["LP-FT"][0] > 1 == passes["LP-FT"][1]
    assert passes["R3F"] == (2, 2)
    assert passes["FreeLB"] == (3, 3)
    assert passes["SMART"][0] == 4
    # Two full runs' worth: one run of two is finished, or both.
    assert 0 < rows["seeds"]["steps"] <= 8
    assert all(0 <= row["failed"] <= row["seeds"] == 2 for row in rows.values())


def test_a_run_no_better_than_the_commonest_label_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("stability_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def one(accuracy: float, **signs: int) -> dict[str, Any]:
        costs = {"steps": 8, "forward": 8, "backward": 8, "seconds": 1.0}
        return {"accuracy": accuracy, "commonest": 0.527, "signs": signs, **costs}

    (row,) = script.table({"long": [one(0.527, vanishing=21, chance=80), one(0.5), one(0.63)]})
    assert (row["failed"], row["alarms"], row["first alarm, step"]) == (2, 1, "21–21")
    assert math.isclose(row["mean"], (0.527 + 0.5 + 0.63) / 3)
