"""`predictor.py` where there is nothing but onnxruntime, tokenizers and numpy; its command line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from lightning_ft.export import Predictor, export_onnx
from lightning_ft.modules import SequenceClassification, TokenClassification
from tests.export.test_predictor_tasks import LABELS, decide
from tests.pretrained import CORPUS, pretrained

NEEDED = ("onnxruntime", "tokenizers", "numpy")
ROWS: dict[str, list[Any]] = {
    "text-classification": [
        "a moving film .",
        {"text": "it was great ?"},
        ["the film", "is good"],
        '"quoted" 東京',
        "[x",
    ],
    "token-classification": [
        " ".join(CORPUS),
        CORPUS[1].split(),
        {"text": "Anna\nSmith"},
        "",
        {"tokens": ["café", "!"]},
    ],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("alone")
    autos = {
        "text-classification": hf.AutoModelForSequenceClassification,
        "token-classification": hf.AutoModelForTokenClassification,
    }
    paths = {task: pretrained(place / task, "bert", auto, initializer_range=0.4) for task, auto in autos.items()}
    tagger = TokenClassification(paths["token-classification"], LABELS)
    decide(tagger)
    modules = {"text-classification": SequenceClassification(paths["text-classification"], ["no", "yes"])}
    for task, module in {**modules, "token-classification": tagger}.items():
        export_onnx(module, place / f"{task}-out", max_length=16)
    return {task: place / f"{task}-out" for task in autos}


def write(rows: Sequence[Any], path: Path) -> Path:
    """Plain texts as they are, where they can be told from JSON."""
    lines = [row if isinstance(row, str) and row else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def run(python: Sequence[str], *arguments: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*python, *map(str, arguments)], capture_output=True, check=False, cwd="/")


def answers(done: subprocess.CompletedProcess[bytes]) -> list[Any]:
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]


@pytest.mark.parametrize("task", ROWS)
def test_alone_in_its_folder(task: str, exported: dict[str, Path], tmp_path: Path) -> None:
    """With a Python in which every other import fails."""
    here = Path(next(iter(importlib.util.find_spec("onnxruntime").submodule_search_locations))).parent
    for name in (*NEEDED, "numpy.libs", "flatbuffers", "google"):
        if (here / name).exists():
            (tmp_path / name).symlink_to(here / name)
    code = (
        "import sys, runpy; sys.path[:0] = [sys.argv.pop(1)]; sys.argv.pop(0); "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'lightning_ft', 'transformers'} & {*sys.modules}"
    )
    rows = write(ROWS[task], tmp_path / "rows.jsonl")
    done = run([sys.executable, "-I", "-S", "-c", code], tmp_path, exported[task] / "predictor.py", rows)
    wanted = [{"row": i, **row} for i, row in enumerate(Predictor(exported[task])(ROWS[task]))]
    assert answers(done) == wanted


def test_command_line(exported: dict[str, Path], tmp_path: Path) -> None:
    python, folder = [sys.executable], exported["token-classification"]
    script = folder / "predictor.py"
    rows = write(ROWS["token-classification"], tmp_path / "rows.jsonl")
    options = ["--max-length", 16, "--settings", '{"stride": 3}', "--batch-size", 2, "--threads", 1, "--folder", folder]
    found = answers(run(python, script, rows, *options))
    predict = Predictor(folder, max_length=16, settings={"stride": 3}, batch_size=2, threads=1)
    assert found == [{"row": i, **row} for i, row in enumerate(predict(ROWS["token-classification"]))]
    for text, message in (
        ("fine\n\n{'text': 1}\n", "row 1: no JSON, Expecting property name"),
        ('fine\n{"text": 1}\n', "row 1: expected a text, a list of words, or a mapping with text or tokens, got"),
        ("3\n[3, 4]\n", "row 1: expected a text, a list of words"),
        (b"\xff\n", "can't decode byte 0xff"),
    ):
        (tmp_path / "bad").write_bytes(text if isinstance(text, bytes) else text.encode())
        done = run(python, script, tmp_path / "bad")
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.decode().startswith("predictor.py: ")
        assert message in done.stderr.decode()
        assert "Traceback" not in done.stderr.decode()
    long = exported["text-classification"] / "predictor.py"
    write(["the film " * 20], tmp_path / "long")
    done = run(python, long, tmp_path / "long", "--max-length", 8, "--no-truncate")
    assert b"row 0: it has 42 tokens, and max_length=8" in done.stderr


@pytest.mark.slow
def test_in_an_environment_of_three_packages(exported: dict[str, Path], tmp_path: Path) -> None:
    """A new environment, made by pip; tokenizers brings huggingface_hub along, which nothing here uses."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    constraints = Path(__file__).parents[2] / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", str(constraints), *NEEDED], check=True)
    for package in ("torch", "lightning_ft", "transformers"):
        assert run([python, "-I"], "-c", f"import {package}").returncode == 1
    for task, folder in exported.items():
        rows = write(ROWS[task], tmp_path / task)
        found = answers(run([python, "-I"], folder / "predictor.py", rows))
        assert found == [{"row": i, **row} for i, row in enumerate(Predictor(folder)(ROWS[task]))]
