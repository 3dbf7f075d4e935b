"""What a model repository is made from: a folder, its graph's inputs and outputs, and rows to warm it with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.export.extras import require
from lightning_ft.export.predictor import Predictor
from lightning_ft.export.triton_config import Backend, TensorSpec, Warmup

if TYPE_CHECKING:
    import numpy as np

COMPANIONS = ("head.json", "tokenizer.json", "predictor.py")
"""What the step from texts to answers is made of, beside its code."""

SOURCES: dict[Backend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.engine"}

KINDS = {
    "BOOL": "BOOL",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "FLOAT16": "FP16",
    "HALF": "FP16",
    "BFLOAT16": "BF16",
    "BF16": "BF16",
    "FLOAT": "FP32",
    "DOUBLE": "FP64",
}
"""Types by the names that ONNX and TensorRT give them, to Triton's."""

SENTENCE = "It is a moving film about two friends, and it is well worth the time. "


@dataclass(frozen=True)
class Engine:
    """What an engine of TensorRT was built for.

    Args:
        rows: At most.
        tokens: At most.
        profiles: Sets of kernels in it, each for a range of shapes.
        needs: The version of TensorRT and the GPU, in words.
    """

    rows: int
    tokens: int
    profiles: int
    needs: str


@dataclass(frozen=True)
class Source:
    """An exported folder.

    Args:
        folder: Where it lies.
        graph: The graph's file.
        head: What ``head.json`` says.
        precision: What the graph was written in; empty where nothing says it.
        inputs: Of the graph.
        outputs: Of the graph.
        engine: Limits of an engine; None for an ONNX graph.
    """

    folder: Path
    graph: Path
    head: Mapping[str, Any]
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engine: Engine | None = None

    @property
    def longest(self) -> int | None:
        """Tokens that the model takes at most; None where nothing says so."""
        limits = [self.head["max_length"], self.engine.tokens if self.engine else None]
        return min((limit for limit in limits if limit is not None), default=None)


def find_sources(folder: str | os.PathLike[str], backend: Backend) -> dict[str, Source]:
    """The graphs of an exported folder: by task where there are several, else one under ``""``.

    Raises:
        FileNotFoundError: It is not a folder that was exported for this backend.
        ValueError: Its graph cannot be served with texts.
    """
    place = Path(folder)
    if (place / SOURCES[backend]).is_file():
        return {"": _read(place, backend)}
    parts = sorted(place.glob(f"*/{SOURCES[backend]}")) if place.is_dir() else []
    if not parts:
        writer = "lightning-ft export" if backend == "onnxruntime" else "build_tensorrt"
        raise FileNotFoundError(f"folder: {place} has no {SOURCES[backend]}: give one that {writer} wrote")
    return {part.parent.name: _read(part.parent, backend) for part in parts}


def _read(place: Path, backend: Backend) -> Source:
    for name in COMPANIONS:
        if not (place / name).is_file():
            raise ValueError(
                f"folder: {place} has no {name}, which turns texts into the graph's inputs: export a task that "
                "Predictor reads, with a fast tokenizer"
            )
    head = _json(place / "head.json")
    if "graphs" in head["settings"]:
        raise ValueError(
            f"folder: {place} writes text, token by token, and this repository asks its graph once for each row: "
            "serve it with `lightning-ft serve`"
        )
    return (_read_onnx if backend == "onnxruntime" else _read_engine)(place, head)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_onnx(place: Path, head: Mapping[str, Any]) -> Source:
    onnx = require("onnx")
    path = place / SOURCES["onnxruntime"]
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}

    def spec(value: Any) -> TensorSpec:
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        return _spec(path, value.name, kind, [axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim])

    inputs = tuple(spec(value) for value in graph.input if value.name not in weights)
    report = place / "report.json"
    precision = _json(report)["facts"].get("precision", "") if report.is_file() else ""
    return Source(place, path, head, precision, inputs, tuple(spec(value) for value in graph.output))


def _read_engine(place: Path, head: Mapping[str, Any]) -> Source:
    path = place / SOURCES["tensorrt"]
    known = _json(place / "engine.json")
    if known["runtime"] != "tensorrt":
        raise ValueError(
            f"folder: {path} was built by {known['runtime']}, and Triton reads plans of the full TensorRT alone: build "
            "it with runtime='tensorrt', on the GPU that will serve it"
        )
    entry = known["engines"][path.stem]
    inputs, outputs = (
        tuple(_spec(path, tensor["name"], tensor["type"], tensor["shape"]) for tensor in entry[name])
        for name in ("inputs", "outputs")
    )
    # Of an input its least, its usual and its largest shape.
    largest = [profile["input_ids"][2] for profile in entry["profiles"]]
    engine = Engine(
        rows=max(shape[0] for shape in largest),
        tokens=max(shape[-1] for shape in largest),
        profiles=len(entry["profiles"]),
        needs=f"TensorRT {known['version']} and the GPU that it was built on ({known.get('gpu', 'not named')})",
    )
    return Source(place, path, head, entry["precision"], inputs, outputs, engine)


def _spec(path: Path, name: str, kind: str, axes: Sequence[int]) -> TensorSpec:
    """A tensor whose first axis is the batch."""
    if kind not in KINDS:
        raise ValueError(f"{path}: {name} is of the type {kind}, which Triton cannot be given")
    if not axes or axes[0] != -1:
        raise ValueError(f"{path}: {name} has the shape {list(axes)}, whose first axis is not a dynamic batch")
    return TensorSpec(name, KINDS[kind], tuple(axes[1:]))


# ---- warm-up


class _Fed(Exception):  # noqa: N818  it carries what was asked for, and is no fault
    """What a graph was given."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self.feed = feed


class _Recorder:
    """A session that keeps what it is given."""

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        self.inputs = inputs

    def get_inputs(self) -> Sequence[TensorSpec]:
        return self.inputs

    def run(self, names: Sequence[str], feed: dict[str, np.ndarray]) -> Any:
        raise _Fed(feed)


def warm(source: Source, folder: Path, lengths: Sequence[int], batch_sizes: Sequence[int]) -> list[Warmup]:
    """Requests as the step from texts to answers makes them, of these lengths; their tensors are written to files.

    Args:
        source: The graph.
        folder: Where the files go: ``warmup`` of the model.
        lengths: Tokens.
        batch_sizes: Each length comes in each of them.

    Returns:
        The requests; none of a length in which no row is known for the task.
    """
    found: list[Warmup] = []
    for length in lengths:
        if (sampled := sample(source, length)) is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        feed = sampled[1]
        files = {name: f"{name}.{length}" for name in feed}
        for name, values in feed.items():
            (folder / files[name]).write_bytes(values[:1].tobytes())
        shapes = {name: values.shape[1:] or (1,) for name, values in feed.items()}
        found += [Warmup(size, shapes, files) for size in sorted(set(batch_sizes))]
    return found


def sample(source: Source, length: int, text: str = "") -> tuple[Any, dict[str, np.ndarray]] | None:
    """A row that the model reads, and what its graph is given for it.

    Args:
        source: The graph.
        length: Tokens that are kept.
        text: What the row says; by default enough to fill them.

    Returns:
        The row and the feed; None where no row is known for the task.
    """
    predict = Predictor(source.folder, max_length=length, session=_Recorder(source.inputs))
    for row in _rows(source, text or SENTENCE * length):
        try:
            predict(row)
        except _Fed as fed:
            return row, fed.feed
        except Exception:  # noqa: BLE001  a row of another task; the tokenizer's errors have no other base
            continue
    return None


def _rows(source: Source, text: str) -> list[Any]:
    """A row of each task, of which a predictor takes that of its own."""
    patterns = source.head["settings"].get("patterns", ())
    columns = {name for pattern in patterns for name in re.findall(r"{(\w+)}", pattern)} - {"mask"}
    special = [token["content"] for token in _json(source.folder / "tokenizer.json")["added_tokens"]]
    masks = [token for token in special if "mask" in token.lower() and source.head["task"] == "fill-mask"]
    return [
        *([dict.fromkeys(sorted(columns), text)] if columns else []),
        *(f"{mask} {text}" for mask in masks),
        text,
        {"context": text, "choices": ["yes", "no"]},
        {"question": "Is it good?", "context": text},
    ]
