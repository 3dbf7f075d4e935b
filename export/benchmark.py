"""How fast exported models are, beside the same model in PyTorch."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from lightning_ft.core.report import Report
from lightning_ft.export.extras import require
from lightning_ft.export.plot_latency import plot_latency
from lightning_ft.export.timing import Runtime, Stopwatch, check_positive

log = logging.getLogger(__name__)

SHAPES = ((1, 32), (1, 128), (8, 128), (32, 64))
PYTORCH: tuple[Runtime, ...] = ("torch", "torch.compile", "torch bf16")
Passes = dict[tuple[int, int], dict[str, list[float]]]


def benchmark(
    artefacts: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    source: str | os.PathLike[str] | None = None,
    *,
    task: str = "",
    runtimes: Sequence[Runtime] = PYTORCH,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 3,
    repeats: int = 10,
    threads: int | None = None,
    plot: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = log.info,
) -> Report:
    """Time exported models and PyTorch on the same batches.

    Each contestant runs in a process of its own, which is stopped while another one is timed. In each round all of
    them run twice, A B A' B', so that a machine that becomes busy slows down all of them alike. The ratio is the
    median over neighbouring passes; the ratios of a contestant to itself, A' over A, say what of it is noise.

    Args:
        artefacts: An exported folder, or several by name. A file ``.onnx`` is one of any origin: it is opened as ONNX
            Runtime does by default, not as :func:`~lightning_ft.export.load_session` does.
        source: The checkpoint or Hugging Face folder that they were exported from, for PyTorch. By default the one
            that the first folder's ``report.json`` names; PyTorch is left out where it is gone.
        task: Which of the source's heads, of several.
        runtimes: What runs the source: ``"torch"`` (eager), ``"torch.compile"``, ``"torch bf16"``.
        shapes: Rows and tokens of the batches, without padding.
        rounds: Of A B A' B'.
        repeats: Runs in a pass, of which the median counts.
        threads: Of each runtime; by default as many as there are cores.
        plot: A picture to write, ``.png``, ``.svg`` or ``.pdf``.
        progress: Is told each thing as it begins.

    Returns:
        A row for each shape and contestant: milliseconds (median and quartiles of passes), rows a second, and how many
        times as fast as the first contestant. A contestant that cannot run is named with the reason among the facts.

    Raises:
        ImportError: A picture is wanted and matplotlib is missing.
        RuntimeError: No contestant runs.
        ValueError: A number is out of range, or a shape, a runtime or a name is none.

    Example::

        print(benchmark({"fp32": "served", "int8": "served-int8"}, plot="latency.png"))
    """
    threads = threads or os.cpu_count() or 1
    check_positive({"rounds": rounds, "repeats": repeats, "threads": threads})
    contestants = _contestants(artefacts, source, runtimes)
    _check_shapes(shapes)
    passes: Passes = {shape: {} for shape in shapes}
    failed = {}
    with ExitStack() as stack:
        running = {}
        for name, (runtime, path) in contestants.items():
            progress(f"loading {name}")
            try:
                running[name] = stack.enter_context(Stopwatch(runtime, path, task=task, threads=threads))
            except RuntimeError as error:
                failed[name] = _reason(error)
        for shape, name, number in _order(shapes, running, rounds):
            if name in failed:
                continue
            progress(f"{shape[0]}x{shape[1]}, pass {number + 1} of {2 * rounds}: {name}")
            try:
                times = running[name].measure(*shape, repeats)
            except RuntimeError as error:
                failed[name] = _reason(error)
                continue
            passes[shape].setdefault(name, []).append(median(times))
    rows = [row for shape in shapes for row in _rows(shape, passes[shape], failed)]
    if not rows:
        raise RuntimeError("nothing could be timed:\n" + "\n".join(f"{name}: {why}" for name, why in failed.items()))
    facts = {
        "threads": threads,
        "passes": f"{2 * rounds} of {repeats} runs each",
        "A/A": _noise(passes, failed),
        **({"not timed": [{"runtime": name, "reason": why} for name, why in failed.items()]} if failed else {}),
        **_machine(),
    }
    report = Report("Latency", facts, rows)
    if plot is not None:
        plot_latency(rows, plot)
    return report


def _contestants(
    artefacts: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    source: str | os.PathLike[str] | None,
    runtimes: Sequence[Runtime],
) -> dict[str, tuple[Runtime, str]]:
    """PyTorch first: its first runtime is what the others are compared with."""
    named = artefacts if isinstance(artefacts, Mapping) else {"": artefacts}
    if not named:
        raise ValueError("artefacts: expected an exported folder, or several by name, got none")
    if unknown := [runtime for runtime in runtimes if runtime not in PYTORCH]:
        raise ValueError(f"runtimes: expected some of {', '.join(PYTORCH)}, got {unknown[0]!r}")
    origin = source or _source_of(Path(next(iter(named.values()))))
    result: dict[str, tuple[Runtime, str]] = {}
    if origin is not None:
        result.update({runtime: (runtime, os.fspath(origin)) for runtime in runtimes})
    for name, path in named.items():
        title = name or f"onnx {_precision_of(Path(path))}".strip()
        if title in PYTORCH:
            raise ValueError(f"artefacts: {title!r} is the name of a runtime: name the folder otherwise")
        result[title] = ("onnx", os.fspath(path))
    return result


def _facts_of(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    return json.loads(path.read_text(encoding="utf-8"))["facts"] if path.is_file() else {}


def _source_of(folder: Path) -> Path | None:
    named = _facts_of(folder).get("source", {}).get("path")
    return Path(named) if named is not None and Path(named).exists() else None


def _precision_of(folder: Path) -> str:
    return str(_facts_of(folder).get("precision", ""))


def _check_shapes(shapes: Sequence[tuple[int, int]]) -> None:
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes: expected pairs of rows and tokens, such as (8, 128), got {shapes!r}")


def _order(
    shapes: Sequence[tuple[int, int]], names: Mapping[str, Any], rounds: int
) -> Iterator[tuple[tuple[int, int], str, int]]:
    for shape in shapes:
        for number in range(2 * rounds):
            for name in names:
                yield shape, name, number


def _rows(shape: tuple[int, int], passes: Mapping[str, list[float]], failed: Mapping[str, str]) -> list[dict[str, Any]]:
    whole = {name: times for name, times in passes.items() if name not in failed}
    if not whole:
        return []
    first = next(iter(whole))
    rows = []
    for name, times in whole.items():
        low, middle, high = quantiles(times, n=4, method="inclusive")
        faster = median(base / mine for base, mine in zip(whole[first], times, strict=True))
        rows.append(
            {
                "batch": shape[0],
                "tokens": shape[1],
                "runtime": name,
                "ms": middle,
                "from": low,
                "to": high,
                "rows/s": 1e3 * shape[0] / middle,
                f"times {first}": faster,
            }
        )
    return rows


def _noise(passes: Passes, failed: Mapping[str, str]) -> str:
    """Quartiles of each pass over the one before it, by the same contestant: the widest of them."""
    bounds = []
    for times in (times for of_shape in passes.values() for name, times in of_shape.items() if name not in failed):
        ratios = [after / before for before, after in zip(times[::2], times[1::2], strict=True)]
        bounds += quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios
    return f"{min(bounds):.2f}-{max(bounds):.2f}" if bounds else "-"


def _reason(error: RuntimeError) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200]


def _machine() -> dict[str, Any]:
    names = ("torch", "onnxruntime")
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {require(name).__version__}" for name in names),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
