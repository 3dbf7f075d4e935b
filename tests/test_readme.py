"""The README's Python blocks run as they are, its YAML is planned, its two commands are make targets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ft.demo import prepare_data, prepare_model

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    found = [text for name, text in BLOCKS if name == language]
    assert found
    return found


def run(folder: Path, *command: str) -> str:
    """Run Python in a folder that holds the demo's data and model."""
    prepare_data(folder / "runs" / "demo" / "data", held_out=32)
    prepare_model(folder / "runs" / "demo" / "model")
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(block: str, tmp_path: Path) -> None:
    run(tmp_path, "-c", block)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_block_is_a_configuration(block: str, tmp_path: Path) -> None:
    (tmp_path / "readme.yaml").write_text(block)
    assert "Phases" in run(tmp_path, "-m", "lightning_ft", "plan", "--config", "readme.yaml")


def test_the_two_commands_are_make_targets() -> None:
    named = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert named == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in named)
