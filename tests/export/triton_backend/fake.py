"""Triton's Python backend without a server: enough to run the shipped `model.py` on the shipped graph."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest


def parse(text: str) -> dict[str, Any]:
    """A configuration: fields by name, each with the list of its values."""
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]:,]', text)

    def message() -> dict[str, Any]:
        fields: dict[str, list[Any]] = {}
        while words and words[0] != "}":
            name = words.pop(0)
            fields.setdefault(name, []).extend(values())
        return fields

    def values() -> list[Any]:
        if (word := words.pop(0)) == "{":
            inner = message()
            assert words.pop(0) == "}"
            return [inner]
        assert word == ":"
        if words[0] != "[":
            return [scalar(words.pop(0))]
        end = words.index("]")
        found = [scalar(word) for word in words[1:end] if word != ","]
        del words[: end + 1]
        return found

    def scalar(word: str) -> Any:
        return json.loads(word) if word[0] in '"-0123456789' or word in ("true", "false") else word

    result = message()
    assert not words
    return result


class Response:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self.tensors = {tensor.name: tensor.as_numpy() for tensor in output_tensors}
        self.fault = error

    def has_error(self) -> bool:
        return self.fault is not None

    def error(self) -> Any:
        return self.fault


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        assert isinstance(values, np.ndarray)
        self.name = name
        self.values = values

    def as_numpy(self) -> Any:
        return self.values


class Fault:
    INVALID_ARG, INTERNAL, UNAVAILABLE = "INVALID_ARG", "INTERNAL", "UNAVAILABLE"

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        self.text = message
        self.code = code

    def message(self) -> str:
        return self.text


class Request:
    """What a client sends: columns of texts by the input's name."""

    def __init__(self, names: list[str], columns: dict[str, list[str | bytes]]) -> None:
        self.names = names
        self.tensors = {
            name: np.array([[text.encode() if isinstance(text, str) else text] for text in texts], np.object_)
            for name, texts in columns.items()
        }

    def requested_output_names(self) -> list[str]:
        return self.names


class Fake:
    """A repository, "loaded".

    Args:
        repository: Its folder.
        monkeypatch: Puts the server's module in its place.
        name: Of the model that takes texts.
    """

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch, name: str = "model") -> None:
        self.runs: list[dict[str, tuple[int, ...]]] = []
        self.fail: Any = None
        self.logged: list[str] = []
        self.repository = repository
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self._module())
        config = parse((repository / name / "config.pbtxt").read_text("utf-8"))
        self.parameters = {row["key"][0]: row["value"][0]["string_value"][0] for row in config["parameters"]}
        as_json = {
            "parameters": {key: {"string_value": value} for key, value in self.parameters.items()},
            **{
                kind: [{"name": row["name"][0], "data_type": row["data_type"][0]} for row in config[kind]]
                for kind in ("input", "output")
            },
        }
        self.outputs = [row["name"] for row in as_json["output"]]
        spec = importlib.util.spec_from_file_location("shipped_model", repository / name / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        self.shipped: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.shipped)
        self.model = self.shipped.TritonPythonModel()
        place = str(repository / name)
        self.model.initialize(
            {"model_config": json.dumps(as_json), "model_repository": place, "model_version": "1", "model_name": name}
        )

    def execute(self, *columns: dict[str, Any], outputs: list[str] | None = None) -> list[Any]:
        """Requests that are merged; of each its outputs by name, or its fault."""
        requests = [Request(outputs or self.outputs, dict(column)) for column in columns]
        return [answer.error() or answer.tensors for answer in self.model.execute(requests)]

    def _module(self) -> ModuleType:
        module = ModuleType("triton_python_backend_utils")
        known = {
            "Tensor": Tensor,
            "InferenceResponse": Response,
            "TritonError": Fault,
            "InferenceRequest": self._request,
            "PreferredMemory": lambda *_: None,
            "TRITONSERVER_MEMORY_CPU": 0,
            "Logger": SimpleNamespace(log_error=self.logged.append),
            "triton_string_to_numpy": {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}.__getitem__,
            "get_input_tensor_by_name": lambda request, name: (
                Tensor(name, request.tensors[name]) if name in request.tensors else None
            ),
            "get_output_tensor_by_name": lambda response, name: Tensor(name, response.tensors[name]),
        }
        vars(module).update(known)
        return module

    def _request(self, *, model_name: str, requested_output_names: Any, inputs: Any, preferred_memory: Any) -> Any:
        def execute() -> Response:
            feed = {tensor.name: tensor.as_numpy() for tensor in inputs}
            self.runs.append({name: value.shape for name, value in feed.items()})
            if self.fail is not None and (message := self.fail(feed)):
                return Response(error=Fault(message))
            path = self.repository / model_name / "1" / "model.onnx"
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            values = session.run(requested_output_names, feed)
            return Response([Tensor(*pair) for pair in zip(requested_output_names, values, strict=True)])

        return SimpleNamespace(exec=execute)
