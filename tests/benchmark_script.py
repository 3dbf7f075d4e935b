"""A benchmark over tasks x methods x seeds, run from end to end at a size at which its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_script(name: str, data: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Its tables and what it printed; the picture, the JSON and the Markdown are there."""
    where = ("--data", str(data), "--runs", str(folder / "runs"), "--results", str(folder))
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", *where, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert all(f"**{title}**" in (folder / f"{name}.md").read_text() for title in content["tables"])
    return content["tables"], done.stdout
