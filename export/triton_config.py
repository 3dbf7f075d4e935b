"""The two configurations of a Triton model repository: of the graph, and of the step from texts to answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["cpu", "gpu"]

FILES: dict[Backend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""What each backend looks for in a version's folder."""

CPU_ROWS = 16
"""Rows that go through the graph at once on a CPU. More gain nothing there (MiniLM, 8x128: 41 tokens a ms, 32x64: 43),
and the more rows, the more padding."""

CHOICES = (2, 4, 8)
"""Choices of a row in TensorRT's profile: least, usual, most. What lies outside makes it build another engine."""


@final
class Symbol(str):
    """A word of the text format that takes no quotes: an enum's value."""

    __slots__ = ()


@dataclass(frozen=True)
class TensorSpec:
    """An input or an output of a graph.

    Args:
        name: As the graph names it.
        kind: Triton's type without its prefix: ``"INT64"``.
        dims: Sizes after the batch axis; -1 where it is dynamic.
    """

    name: str
    kind: str
    dims: tuple[int, ...]

    def entry(self) -> dict[str, Any]:
        """As a configuration has it. Of a number for each row Triton makes an axis of one, and takes it away again."""
        entry = {"name": self.name, "data_type": Symbol(f"TYPE_{self.kind}"), "dims": list(self.dims) or [1]}
        return entry if self.dims else {**entry, "reshape": {"shape": []}}


@dataclass(frozen=True)
class Warmup:
    """A request that a model answers before it is ready; its tensors lie in files of the folder ``warmup``.

    Args:
        batch_size: How often Triton repeats the row of the files.
        shapes: Of each input, without the batch axis.
        files: Of each input: the name.
    """

    batch_size: int
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Service:
    """How a graph is served: the arguments of :func:`~lightning_ft.export.write_triton_repository`.

    ``profiles`` are those of an engine.
    """

    name: str
    backend: Backend
    device: Device
    max_batch_size: int
    instances: int
    max_queue_delay_us: int
    max_length: int | None
    max_bytes: int
    engine_cache: str | None
    profiles: int = 0

    @property
    def graph(self) -> str:
        """Name of the graph's own model."""
        return f"{self.name}_graph"

    @property
    def rows(self) -> int:
        """Rows that the text model gives the graph at once."""
        return self.max_batch_size if self.device == "gpu" else min(CPU_ROWS, self.max_batch_size)


def graph_config(
    service: Service,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    warmups: Sequence[Warmup],
    *,
    precision: str,
) -> str:
    """``config.pbtxt`` of the graph.

    Requests of token ids are merged where their shapes are equal. ``allow_ragged_batch`` stays out: the C++ backends
    would join rows of different length end to end in one flat tensor, which no graph of ours reads; they cannot pad.
    So does a queue policy with a time-out, which refused requests that had only waited for a batch to end.
    """
    kinds = {spec.name: spec.kind for spec in inputs}
    return text_format(
        {
            "name": service.graph,
            "backend": service.backend,
            "default_model_filename": FILES[service.backend],
            "max_batch_size": service.max_batch_size,
            "input": [spec.entry() for spec in inputs],
            "output": [spec.entry() for spec in outputs],
            **_common(service.instances, service.device, service.profiles),
            "dynamic_batching": {},
            **_optimization(service, inputs, precision),
            "model_warmup": [_warmup(warmup, kinds) for warmup in warmups],
        }
    )


def text_config(service: Service, fields: Sequence[str], outputs: Sequence[TensorSpec], inputs: Sequence[str]) -> str:
    """``config.pbtxt`` of the step from texts to answers.

    Its requests are merged whatever the length of their texts: a text is one element of a STRING tensor. One process
    more than the graph has instances, so that one reads texts while another waits for the graph.

    Args:
        service: How it is served.
        fields: Its own inputs, of which all after the first are optional.
        outputs: What it gives beside ``answer``, by the names that an answer has.
        inputs: Names of the graph's inputs.
    """
    parameters = {
        "graph": service.graph,
        "inputs": ",".join(inputs),
        "batch_size": service.rows,
        "max_bytes": service.max_bytes,
        **({} if service.max_length is None else {"max_length": service.max_length}),
    }
    text = [TensorSpec(name, "STRING", (1,)).entry() for name in fields]
    return text_format(
        {
            "name": service.name,
            "backend": "python",
            "max_batch_size": service.max_batch_size,
            "input": [text[0], *({**entry, "optional": True} for entry in text[1:])],
            "output": [spec.entry() for spec in (TensorSpec("answer", "STRING", (1,)), *outputs)],
            **_common(service.instances + 1, "cpu"),
            "dynamic_batching": {"max_queue_delay_microseconds": service.max_queue_delay_us},
            "parameters": [{"key": key, "value": {"string_value": str(value)}} for key, value in parameters.items()],
        }
    )


def _common(count: int, device: Device, profiles: int = 0) -> dict[str, Any]:
    group = {"count": count, "kind": Symbol(f"KIND_{device.upper()}"), "profile": [str(i) for i in range(profiles)]}
    return {"version_policy": {"latest": {"num_versions": 1}}, "instance_group": [group]}


def _warmup(warmup: Warmup, kinds: Mapping[str, str]) -> dict[str, Any]:
    inputs = [
        {
            "key": name,
            "value": {
                "data_type": Symbol(f"TYPE_{kinds[name]}"),
                "dims": list(shape),
                "input_data_file": warmup.files[name],
            },
        }
        for name, shape in warmup.shapes.items()
    ]
    length = next(iter(warmup.shapes.values()))[-1]
    return {"name": f"{warmup.batch_size}x{length}", "batch_size": warmup.batch_size, "inputs": inputs}


def _optimization(service: Service, inputs: Sequence[TensorSpec], precision: str) -> dict[str, Any]:
    """What ONNX Runtime shall do with the graph.

    On a CPU the level BASIC (-1): a graph in int8 holds its optimisations already, and one in fp32 is 8 to 13 % slower
    at Triton's default (MiniLM, 1x32 and 8x128), with two fusions that no option of Triton's turns off.
    """
    if service.backend != "onnxruntime":
        return {}
    if service.device == "cpu":
        return {"optimization": {"graph": {"level": -1}}} if precision in ("fp32", "int8") else {}
    if service.engine_cache is None:
        return {}
    parameters = {
        "precision_mode": {"fp16": "FP16", "int8-static": "INT8"}.get(precision, "FP32"),
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": service.engine_cache,
        "trt_timing_cache_enable": "true",
        "trt_timing_cache_path": service.engine_cache,
        **{f"trt_profile_{end}_shapes": _shapes(service, inputs, i) for i, end in enumerate(("min", "opt", "max"))},
    }
    entries = [{"key": key, "value": value} for key, value in parameters.items()]
    accelerator = {"name": "tensorrt", "parameters": entries}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}}


def _shapes(service: Service, inputs: Sequence[TensorSpec], which: int) -> str:
    """The least, the usual or the most of each axis, for TensorRT."""
    longest = service.max_length or 512
    rows = (1, max(1, service.max_batch_size // 2), service.max_batch_size)[which]
    tokens = (1, min(128, longest), longest)[which]
    found = []
    for spec in inputs:
        sizes = [size if size > 0 else CHOICES[which] for size in spec.dims]
        if spec.dims and spec.dims[-1] < 0:
            sizes[-1] = tokens
        found.append(f"{spec.name}:{'x'.join(map(str, (rows, *sizes)))}")
    return ",".join(found)


def text_format(message: Mapping[str, Any], indent: str = "") -> str:
    """A protobuf message in its text format.

    Args:
        message: Fields by name: numbers, booleans, strings, :class:`Symbol`, messages, and lists of these.
        indent: Before each line.

    Example:
        >>> print(text_format({"name": "m", "input": [{"dims": [-1, 2], "data_type": Symbol("TYPE_INT64")}]}), end="")
        name: "m"
        input {
          dims: [-1, 2]
          data_type: TYPE_INT64
        }
    """
    lines = []
    for name, value in message.items():
        if isinstance(value, list) and not any(isinstance(part, Mapping) for part in value):
            if value:
                lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]\n")
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping):
                lines.append(f"{indent}{name} {{\n{text_format(part, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(part)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Symbol):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
