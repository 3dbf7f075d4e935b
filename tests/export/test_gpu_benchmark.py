"""The benchmark for a GPU machine, as far as it runs without one. Nothing here is about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "export.py"


def _run(*options: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_plan(tmp_path: Path) -> None:
    assert "--dry" in _run("--help")
    plan = _run("--dry", "--results", str(tmp_path / "results"))
    assert "2 models, 10 variants, at most 3 rounds, 450 s in all" in plan
    for text in ("MiniLM-L6, 1x32, 1x128, 8x128, 32x128:", "BERT-base", "  TensorRT engine, int8", "(again)"):
        assert text in plan
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_what_cannot_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    _run("--quick", "--device", "cpu", "--rounds", "1", "--repeats", "2", "--results", str(tmp_path))
    content = json.loads((tmp_path / "export.json").read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert len(rows) == 11
    ran = [name for name, row in rows.items() if row["median_ms"] is not None]
    assert ran == ["PyTorch eager, fp32", "PyTorch eager, fp32 (again)"]
    assert {row["not run"] for name, row in rows.items() if name not in ran} == {"not run: it needs a GPU"}
    assert "torch" in content["machine"]
    assert "| TensorRT engine, int8 | not run: it needs a GPU |" in (tmp_path / "export.md").read_text()
