"""Contestants in processes of their own: a rival's with the interpreter of ``make rivals``, ours with this one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FTS = "finetuning-scheduler"
AVALANCHE = "avalanche-lib"
RIVALS = Path(__file__).parents[1] / ".venv-rivals" / "bin" / "python"
MARK = "contestant: "


def rival_option(parser: argparse.ArgumentParser, package: str = FTS) -> None:
    """The rival's interpreter, which these scripts ask for."""
    parser.add_argument("--rival", type=Path, default=RIVALS, metavar="PYTHON", help=f"Python that has {package}")


def find_rival(python: Path, package: str = FTS) -> str | None:
    """The rival's version, or None, and a word about it."""
    question = f"from importlib.metadata import version; print(version({package!r}))"
    if python.is_file():
        answer = subprocess.run([str(python), "-c", question], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    print(f"{package} is left out: {python} does not have it. Run `make rivals`, or pass --rival PYTHON.", flush=True)
    return None


def begin(python: Path | str, script: str, *options: str, **settings: Any) -> subprocess.Popen[str]:
    """Start a script of this folder as a contestant."""
    # Not -m: the folder of the script becomes the first of the path, as it is for the parent.
    command = [str(python), script, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def answers(process: subprocess.Popen[str]) -> list[Any]:
    """What a contestant has told, when it has ended."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, process.args))}\n{output}{errors}".strip())  # type: ignore[arg-type]
    return [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]


def tell(answer: Any) -> None:
    """As a contestant: hand a result to the parent."""
    print(MARK + json.dumps(answer), flush=True)
