"""The benchmark of parameter-efficient methods runs from end to end, at a size at which its figures mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmark_script import run_script


@pytest.mark.slow
def test_finished_runs_are_read_again(real_data: Path, tmp_path: Path) -> None:
    options = ("--tasks", "rte", "--methods", "full")
    tables, told = run_script("parameter_efficient", real_data, tmp_path, *options)
    (row,) = tables["Dev accuracy, rte"]
    assert (row["method"], row["own, %"], row["trained, %"], row["seeds"]) == ("full", 100, 100, 1)
    assert "accuracy': " in told
    again, told = run_script("parameter_efficient", real_data, tmp_path, *options)
    assert again == tables
    assert "accuracy': " not in told


@pytest.mark.slow
def test_all_methods(real_data: Path, tmp_path: Path) -> None:
    tables, _ = run_script("parameter_efficient", real_data, tmp_path)
    assert set(tables) == {"Dev accuracy, trec6", "Dev accuracy, rte"}
    first, second = ({row["method"]: row for row in rows} for rows in tables.values())
    assert set(first) - set(second) == {"movement pruning, longer"}
    own = {method: row["own, %"] for method, row in first.items() if method in second}
    assert own == pytest.approx({method: row["own, %"] for method, row in second.items()})
    weights = 100 / own["SAID, d = 200"] * 200
    assert own["SAID, d = 10000"] == pytest.approx(100 * 10000 / weights)
    assert own["diff pruning"] == pytest.approx(0.5, rel=1e-3)
    # Two blocks of width 48: 4·48² + 2·48·96 weights each, of which 15 % stay; biases, norms and the pooler train.
    matrices, small = 2 * (4 * 48**2 + 2 * 48 * 96), 2 * (4 * 48 + 96 + 48 + 4 * 48) + 48 * 49
    assert own["movement pruning"] / 100 * weights == pytest.approx(0.15 * matrices + small, abs=12)
    biases = 2 * (4 * 48 + 96 + 48 + 2 * 48) + 48 + 48
    assert own["BitFit"] / 100 * weights == pytest.approx(biases)
    assert own["LoRA"] / 100 * weights == pytest.approx(2 * 2 * 2 * 8 * 48)
    assert own["Pfeiffer"] / 100 * weights == pytest.approx(2 * (48 * 3 + 3 + 3 * 48 + 48))
