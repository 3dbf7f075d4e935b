"""An exported folder as a model repository for NVIDIA Triton: texts in, answers out."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lightning_ft.core.files import atomic_folder, sha256
from lightning_ft.core.report import Report
from lightning_ft.export import triton_model, triton_serve
from lightning_ft.export.triton_config import FILES, Backend, Device, Service, TensorSpec, graph_config, text_config
from lightning_ft.export.triton_readme import dockerfile, readme
from lightning_ft.export.triton_sources import COMPANIONS, Source, find_sources, warm

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

WARMUP = (16, 64, 256)
"""Tokens of the requests that a graph answers before it is ready, by default, as far as the model takes them."""

BATCH = 64

TEXTS = {
    "text-classification": ("text", "text_pair"),
    "feature-extraction": ("text", "text_pair"),
    "fill-mask": ("text",),
    "token-classification": ("text",),
}
"""The inputs of a task whose rows are texts; of all others, a row is JSON."""


def write_triton_repository(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backend: Backend = "onnxruntime",
    name: str = "model",
    max_batch_size: int | None = None,
    instances: int = 1,
    device: Device | None = None,
    max_queue_delay_us: int = 1000,
    max_length: int | None = None,
    max_bytes: int = 1 << 18,
    warmup_lengths: Sequence[int] | None = None,
    engine_cache: str | None = None,
    progress: Callable[[str], None] = log.info,
) -> Report:
    """Write a complete Triton model repository from an exported folder.

    It holds two models. ``NAME`` takes texts and gives JSON, with the main fields as tensors of their own; it runs in
    Triton's Python backend, tokenises with what the export has, and asks ``NAME_graph``, which takes token ids and
    runs in ONNX Runtime or TensorRT. Requests for ``NAME`` are merged whatever the length of their texts; it sorts
    their rows by length and pads them, which the backends of the graph could not. A bad request is refused by itself.

    An export of several heads becomes a pair of models for each, ``NAME_TASK`` and ``NAME_TASK_graph``. Beside them lie
    a README.md (how to start, how to ask), ``serve.py``, which starts the server and stops it without losing a request,
    and a Dockerfile, since the server's image has no tokenizers.

    Args:
        folder: What :func:`~lightning_ft.export.export_onnx` wrote, or ``build_tensorrt``.
        out: The repository to create. It may exist if it is empty.
        backend: What runs the graph.
        name: Of the model that takes texts.
        max_batch_size: Rows that are merged at most; by default 64, or as many as an engine was built for.
        instances: Of the graph, on each device. On a CPU they share its cores.
        device: ``"cpu"`` or ``"gpu"``; by default the CPU for ``"onnxruntime"``, the GPU for ``"tensorrt"``.
        max_queue_delay_us: Microseconds that a request waits for others while the model is free.
        max_length: Tokens that are kept of a row; by default, and at most, as many as the model takes.
        max_bytes: Of a text, or of a row as JSON. More is refused: a text is cut only after it was tokenised.
        warmup_lengths: Tokens of the requests that the graph answers before it is ready; by default 16, 64 and 256 as
            far as the model takes them. Each is run with one row and with as many as go through the graph at once.
        engine_cache: Folder on the server where ONNX Runtime's TensorRT provider keeps the engines that it builds at
            the first start, for up to ``max_length`` tokens (512 where nothing says so); it must be writable. None:
            the CUDA provider alone. For ``"onnxruntime"`` on a GPU.
        progress: Is told each thing as it begins.

    Returns:
        A row for each model, and what it is served with.

    Raises:
        FileExistsError: ``out`` is a file or a folder that is not empty.
        FileNotFoundError: ``folder`` is none that was exported for this backend.
        ImportError: A package of the extra ``export`` is missing.
        ValueError: An argument, or its fit with the graph, is wrong.

    Example::

        export_onnx("runs/run_0/checkpoints/best.ckpt", "served", precision="int8", gate=Gate(data))
        print(write_triton_repository("served", "repository", name="sentiment"))

    Source: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
    """
    service = Service(
        name,
        backend,
        device or ("gpu" if backend == "tensorrt" else "cpu"),
        BATCH if max_batch_size is None else max_batch_size,
        instances,
        max_queue_delay_us,
        max_length,
        max_bytes,
        engine_cache,
    )
    _check(service)
    sources = find_sources(folder, backend)
    pairs = [
        (_fit(replace(service, name=f"{name}_{task}" if task else name), source, max_batch_size), source)
        for task, source in sources.items()
    ]
    rows: list[dict[str, Any]] = []
    with atomic_folder(out) as place:
        for fitted, source in pairs:
            progress(f"writing {fitted.name} and {fitted.graph}")
            rows += _write(place, fitted, source, warmup_lengths)
        (place / "README.md").write_text(readme(pairs, TEXTS), encoding="utf-8")
        (place / "Dockerfile").write_text(dockerfile(), encoding="utf-8")
        shutil.copyfile(triton_serve.__file__, place / "serve.py")
    facts = {
        "source": os.fspath(folder),
        "backend": backend,
        "device": service.device,
        "max_batch_size": pairs[0][0].max_batch_size,
        "instances": instances,
        "max_queue_delay_us": max_queue_delay_us,
    }
    report = Report("Wrote a Triton model repository", facts, rows)
    log.info("wrote %s\n%s", out, report)
    return report


def _check(service: Service) -> None:
    for name, allowed in {"backend": get_args(Backend), "device": get_args(Device)}.items():
        if (value := getattr(service, name)) not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    if not NAME.fullmatch(service.name):
        raise ValueError(f"name={service.name!r}: expected letters, digits, '_', '-' and '.', a letter or digit first")
    for name in ("max_batch_size", "instances", "max_bytes"):
        if (value := getattr(service, name)) < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if service.max_queue_delay_us < 0:
        raise ValueError(f"max_queue_delay_us={service.max_queue_delay_us} must be 0 or more")
    if service.backend == "tensorrt" and service.device == "cpu":
        raise ValueError(
            "device='cpu': an engine of TensorRT runs on a GPU: leave it out, or take backend='onnxruntime'"
        )
    if service.engine_cache is not None and (service.backend, service.device) != ("onnxruntime", "gpu"):
        raise ValueError(
            f"engine_cache={service.engine_cache!r}: ONNX Runtime builds engines on a GPU alone: "
            "give backend='onnxruntime' and device='gpu' with it"
        )


def _fit(service: Service, source: Source, max_batch_size: int | None) -> Service:
    """The service with the limits of an engine."""
    limit, engine = source.longest, source.engine
    if service.max_length is not None and not 1 <= service.max_length <= (limit or service.max_length):
        raise ValueError(f"max_length={service.max_length}: expected 1 to the {limit} tokens that the model takes")
    if source.precision == "int8" and service.device == "gpu":
        raise ValueError(
            f"device='gpu': the graph of {source.folder} is quantised for a CPU: export with precision='fp16' for a GPU"
        )
    if engine is None:
        return service
    if max_batch_size is not None and max_batch_size > engine.rows:
        raise ValueError(f"max_batch_size={max_batch_size}: the engine was built for up to {engine.rows} rows")
    return replace(
        service,
        max_batch_size=max_batch_size or engine.rows,
        # What head.json says of windows is left to the predictor, as long as an engine takes them.
        max_length=service.max_length or engine.tokens,
        profiles=engine.profiles,
    )


def _write(place: Path, service: Service, source: Source, lengths: Sequence[int] | None) -> list[dict[str, Any]]:
    """The two models of a graph."""
    graph, text = place / service.graph, place / service.name
    for folder in (graph, text):
        (folder / "1").mkdir(parents=True)
    target = graph / "1" / FILES[service.backend]
    shutil.copyfile(source.graph, target)
    for file in source.folder.glob(f"{source.graph.name}.data*"):  # weights that do not fit into the graph's file
        shutil.copyfile(file, graph / "1" / file.name)
    longest = service.max_length or source.longest
    warmups = warm(source, graph / "warmup", _lengths(longest, lengths), (1, service.rows))
    if lengths and not warmups:
        raise ValueError(f"warmup_lengths={list(lengths)}: no row is known of so few tokens for {source.head['task']}")
    config = graph_config(
        replace(service, max_length=longest), source.inputs, source.outputs, warmups, precision=source.precision
    )
    (graph / "config.pbtxt").write_text(config, encoding="utf-8")
    shutil.copyfile(triton_model.__file__, text / "1" / "model.py")
    for name in COMPANIONS:
        shutil.copyfile(source.folder / name, text / "1" / name)
    fields, outputs = fields_of(source.head), outputs_of(source)
    names = [spec.name for spec in source.inputs]
    (text / "config.pbtxt").write_text(text_config(service, fields, outputs, names), encoding="utf-8")
    task = source.head["task"]
    return [
        _row(service.name, task, fields, ("answer", *(spec.name for spec in outputs)), 0, ""),
        _row(service.graph, task, names, [spec.name for spec in source.outputs], len(warmups), sha256(target)),
    ]


def _row(
    model: str, task: str, takes: Sequence[str], gives: Sequence[str], warmups: int, digest: str
) -> dict[str, str | int]:
    return {
        "model": model,
        "task": task,
        "takes": ", ".join(takes),
        "gives": ", ".join(gives),
        "warmups": warmups,
        "sha256": digest[:16],
    }


def _lengths(limit: int | None, given: Sequence[int] | None) -> list[int]:
    if given is None:
        return sorted({min(length, limit or length) for length in WARMUP})
    for length in given:
        if not 1 <= length <= (limit or length):
            raise ValueError(f"warmup_lengths={list(given)}: expected 1 to {limit or 'any number of'} tokens each")
    return sorted(set(given))


def fields_of(head: Mapping[str, Any]) -> tuple[str, ...]:
    """Inputs of the model that takes texts, for a task; the first is required."""
    return TEXTS.get(head["task"], (triton_model.JSON_FIELD,))


def outputs_of(source: Source) -> list[TensorSpec]:
    """What an answer of the task always has, as tensors beside the JSON."""
    task, problem = source.head["task"], source.head["settings"].get("problem", "single_label")
    score = TensorSpec("score", "FP32", (1,))
    if task == "feature-extraction":
        sizes = {spec.name: spec.dims for spec in source.outputs}
        return [TensorSpec("embedding", "FP32", sizes["embedding"])]
    if task == "multiple-choice":
        return [TensorSpec("choice", "INT64", (1,)), score]
    if task != "text-classification":
        return []
    if problem == "regression":
        return [score]
    probabilities = TensorSpec("probabilities", "FP32", (len(source.head["labels"]),))
    if problem == "multi_label":  # its labels are as many as there are
        return [probabilities]
    return [TensorSpec("label", "STRING", (1,)), score, probabilities]
