"""Latency of exports beside PyTorch, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf
from PIL import Image

from lightning_ft.export import benchmark, export_onnx
from lightning_ft.export.plot_latency import plot_latency
from lightning_ft.export.timing import Stopwatch
from tests.pretrained import pretrained


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pretrained(tmp_path_factory.mktemp("hf"), "bert", hf.AutoModelForMultipleChoice)


@pytest.fixture(scope="module")
def folder(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(source, out, max_length=16)
    return out


def test_beside_pytorch(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    told: list[str] = []
    report = benchmark(
        {"fp32": folder, "broken": broken},
        runtimes=("torch",),
        shapes=[(2, 5), (1, 9)],
        rounds=1,
        repeats=2,
        threads=1,
        plot=tmp_path / "latency.png",
        progress=told.append,
    )
    assert [(row["batch"], row["tokens"], row["runtime"]) for row in report.rows] == [
        *[(2, 5, "torch"), (2, 5, "fp32"), (1, 9, "torch"), (1, 9, "fp32")]
    ]
    for row in report.rows:
        assert 0 < row["from"] <= row["ms"] <= row["to"]
        assert row["rows/s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
    assert [row["times torch"] for row in report.rows[::2]] == [1, 1]
    assert report.facts["not timed"][0]["runtime"] == "broken"
    assert told[:3] == ["loading torch", "loading fp32", "loading broken"]
    # A B A' B' for each shape.
    assert [line.split(": ")[1] for line in told[3:]] == ["torch", "fp32"] * 4
    with Image.open(tmp_path / "latency.png") as picture:
        assert len(picture.getcolors(1 << 24) or []) > 10


def test_names_as_long_as_paths_leave_the_panels_their_room(tmp_path: Path) -> None:
    # Matplotlib warns of a panel without any room, and a warning fails here.
    rows = [
        {"runtime": name * 200, "batch": 1, "tokens": tokens, "ms": 2.0, "times a": 1.0}
        for name in "ab"
        for tokens in (4, 32)
    ]
    plot_latency(rows, tmp_path / "latency.png")


def _state(watch: Stopwatch) -> str:
    return Path(f"/proc/{watch._process.pid}/stat").read_text(encoding="utf-8").rsplit(") ", 1)[1][0]


def test_one_that_waits_is_stopped(folder: Path) -> None:
    """Its idle threads would take the cores of the one that is timed."""
    with Stopwatch("onnx", folder, threads=1) as watch:
        for _ in range(2):
            # A signal takes a moment to arrive; a process that runs on waits for its input, in state S.
            assert any(_state(watch) == "T" for _ in range(10_000))
            assert len(watch.measure(1, 4, 3, warmup=1)) == 3
    assert watch._process.poll() is not None


def test_without_its_source_only_the_graph_is_timed(source: str, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folder.iterdir():
        text = file.read_bytes()
        (moved / file.name).write_bytes(text.replace(source.encode(), b"/gone") if file.name == "report.json" else text)
    report = benchmark(moved, shapes=[(1, 4)], rounds=1, repeats=1, threads=1)
    assert [row["runtime"] for row in report.rows] == ["onnx fp32"]


def test_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rounds: expected 1 or more, got 0"):
        benchmark(folder, rounds=0)
    with pytest.raises(ValueError, match=r"shapes: expected pairs of rows and tokens, .* got \[\(1, 0\)\]"):
        benchmark(folder, shapes=[(1, 0)])
    with pytest.raises(ValueError, match=r"runtimes: expected some of torch, .*, got 'onnx'"):
        benchmark(folder, runtimes=["onnx"])
    with pytest.raises(ValueError, match="artefacts: 'torch' is the name of a runtime"):
        benchmark({"torch": folder})
    with pytest.raises(ValueError, match="artefacts: expected an exported folder, or several by name, got none"):
        benchmark({})
    with pytest.raises(RuntimeError, match=r"nothing could be timed:\nonnx fp32: .*"):
        benchmark({"onnx fp32": tmp_path / "nothing"}, shapes=[(1, 4)])
