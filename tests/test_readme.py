"""The README's Python blocks run as they are; its shell blocks name commands that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "python"])
def test_python_block_runs(block: str, tmp_path: Path) -> None:
    from lightning_ft.demo import prepare_data, prepare_model

    prepare_data(tmp_path / "runs" / "demo" / "data", held_out=32)
    prepare_model(tmp_path / "runs" / "demo" / "model")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_readme_names_the_two_commands() -> None:
    shell = "\n".join(text for language, text in BLOCKS if language == "bash")
    assert "make demo" in shell
    assert "make test" in shell
