"""The commands for what was exported: where a folder can go from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from lightning_ft import commands
from tests.pretrained import pretrained


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pretrained(tmp_path_factory.mktemp("source"), "bert", hf.AutoModelForSequenceClassification)


@pytest.fixture(scope="module")
def folder(source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("served") / "onnx")
    commands.COMMANDS["export"]([source, out, "--max_length", "16", "--deploy", "true"])
    return out


def test_a_folder_that_is_deployed_and_verified(source: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"model.onnx", "predictor.py", "Dockerfile", "lambda_handler.py"} <= {p.name for p in Path(folder).iterdir()}
    commands.COMMANDS["verify"]([folder, "--source", source])
    said = capsys.readouterr().out
    assert "as recorded" in said
    assert "parity" in said
    assert "Dockerfile" in said  # added later, and named


def test_where_it_goes_from_there(source: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # From the folder, and from its source by way of one that goes again.
    commands.COMMANDS["export"]([folder, str(tmp_path / "engines"), "--to", "tensorrt"])
    assert (tmp_path / "engines" / "model.engine").stat().st_size > 1000
    commands.COMMANDS["export"](
        [source, str(tmp_path / "repository"), "--to", "triton", "--name", "mood", "--max_length", "16"]
    )
    assert sorted(path.name for path in (tmp_path / "repository").iterdir() if path.is_dir()) == ["mood", "mood_graph"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines", "repository"]
    assert "Exported to TensorRT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, "--precision int8 is judged on validation data: .*--data"),
        ({"to": "hf", "deploy": True}, "--deploy writes what runs an ONNX folder, and --to is hf"),
        ({"to": "genai", "precision": "fp16"}, "--precision fp16 is judged on validation data"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        commands.export("somewhere", str(tmp_path / "out"), **arguments)


def test_serve_and_benchmark_read_their_own_arguments(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("lightning_ft.export.launch", lambda arguments: asked.append(arguments) or 0)
    with pytest.raises(SystemExit, match="0"):
        commands.COMMANDS["serve"]([folder, "--port", "0"])
    assert asked == [[folder, "--port", "0"]]
    plot, small = str(tmp_path / "latency.png"), ["--shapes", "[[1,4]]", "--rounds", "1", "--repeats", "1"]
    commands.COMMANDS["benchmark"](
        [folder, folder, "--runtimes", "[]", "--plot", plot, *small, "--report", str(tmp_path / "latency.json")]
    )
    assert "rows/s" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"latency.png", "latency.json"}
