"""Texts in, answers out, in a Triton server: ``model.py`` of a model repository that lightning_ft wrote.

It runs in Triton's Python backend and needs numpy and tokenizers. Requests that Triton has merged are tokenised each
for itself, so that a bad one fails alone; then all are put together by length, padded, and run by the model beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

JSON_FIELD = "row"


class BadRequestError(ValueError):
    """A request that cannot be read."""


class UnavailableError(RuntimeError):
    """The graph is not loaded, or the server is about to stop."""


def server() -> Any:
    """What Triton gives its Python models."""
    return importlib.import_module("triton_python_backend_utils")


class Graph:
    """The graph that the same server holds, with the two methods of an InferenceSession that ``Predictor`` uses."""

    def __init__(self, name: str, inputs: Sequence[str]) -> None:
        self.name = name
        self.inputs = inputs

    def get_inputs(self) -> list[Any]:
        """The graph's inputs: objects with a ``name``."""
        return [SimpleNamespace(name=name) for name in self.inputs]

    def run(self, names: Sequence[str], feed: dict[str, Any]) -> list[Any]:
        """The outputs of these names."""
        pb_utils = server()
        request = pb_utils.InferenceRequest(
            model_name=self.name,
            requested_output_names=list(names),
            # Triton wants an axis after the batch, also where the graph has none.
            inputs=[pb_utils.Tensor(k, v if v.ndim > 1 else v.reshape(-1, 1)) for k, v in feed.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            message = f"{self.name}: {response.error().message()}"
            # Triton gives no code of its own to an inner request.
            gone = "not ready" in message or "no available versions" in message
            raise (UnavailableError if gone else RuntimeError)(message)
        return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names]


class TritonPythonModel:
    """What Triton's Python backend makes one of in each of its processes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration, and the tokenizer beside this file."""
        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self.fields = [entry["name"] for entry in config["input"]]
        self.outputs = {entry["name"]: entry["data_type"] for entry in config["output"]}
        self.max_bytes = int(parameters["max_bytes"])
        place = Path(args["model_repository"]) / args["model_version"]
        limit = parameters.get("max_length")
        self.predictor = load_predictor(place)(
            place,
            batch_size=int(parameters["batch_size"]),
            max_length=None if limit is None else int(limit),
            session=Graph(parameters["graph"], parameters["inputs"].split(",")),
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that Triton has merged, each of one row or more."""
        found = [self._encode(request) for request in requests]
        good = [i for i, items in enumerate(found) if isinstance(items, list)]
        for i, answers in zip(good, self._answer([found[i] for i in good]), strict=True):
            found[i] = answers
        return [self._respond(request, answers) for request, answers in zip(requests, found, strict=True)]

    def _encode(self, request: Any) -> Any:
        """The rows of a request as the predictor's items; the error where there is one."""
        try:
            texts, *others = (self._column(request, name) for name in self.fields)
            if texts is None:
                raise ValueError(f"the input {self.fields[0]} is missing")
            rows: list[Any] = texts
            if self.fields[0] == JSON_FIELD:
                rows = [parse(text, number) for number, text in enumerate(texts)]
            elif given := [(name, column) for name, column in zip(self.fields[1:], others, strict=True) if column]:
                names, columns = zip(*given, strict=True)
                keys = (self.fields[0], *names)
                rows = [dict(zip(keys, values, strict=True)) for values in zip(texts, *columns, strict=True)]
            return self.predictor.encode(rows)
        except (TypeError, ValueError, RecursionError) as error:
            return BadRequestError(str(error))
        except Exception as error:  # noqa: BLE001  whatever a client sends, the other requests are answered
            return error

    def _column(self, request: Any, name: str) -> list[str] | None:
        """The texts of an input; None where it is not given."""
        tensor = server().get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        return [self._text(value, name, number) for number, value in enumerate(tensor.as_numpy().reshape(-1))]

    def _text(self, value: bytes, name: str, number: int) -> str:
        if len(value) > self.max_bytes:
            raise ValueError(f"row {number}: {name} has {len(value):,} bytes, and at most {self.max_bytes:,} are taken")
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"row {number}: {name} is not UTF-8: {error.reason} at byte {error.start}") from None

    def _answer(self, parts: Sequence[list[Any]]) -> list[Any]:
        """For each request its answers, or the error. What fails together is run again one by one."""
        try:
            answers = self.predictor.answer([item for items in parts for item in items])
        except UnavailableError as error:
            return [error] * len(parts)
        except Exception as error:  # noqa: BLE001  the graph's, or a want of memory
            return [error] if len(parts) == 1 else [self._answer([items])[0] for items in parts]
        begins = [sum(map(len, parts[:i])) for i in range(len(parts))]
        return [answers[begin : begin + len(items)] for begin, items in zip(begins, parts, strict=True)]

    def _respond(self, request: Any, answers: Any) -> Any:
        pb_utils = server()
        try:
            if isinstance(answers, Exception):
                raise answers
            wanted = request.requested_output_names()
            tensors = [self._tensor(name, answers) for name in self.outputs if name in wanted]
            return pb_utils.InferenceResponse(output_tensors=tensors)
        except BadRequestError as error:
            fault = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        except UnavailableError as error:
            fault = pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:  # noqa: BLE001  the client is told, and the service goes on
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            fault = pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse(error=fault)

    def _tensor(self, name: str, answers: Sequence[dict[str, Any]]) -> Any:
        import numpy as np

        kind = self.outputs[name]
        if name == "answer":  # JSON knows no NaN: it would be the client that fails
            values: list[Any] = [json.dumps(answer, ensure_ascii=False, allow_nan=False) for answer in answers]
        else:
            values = [answer[name] for answer in answers]
        if kind == "TYPE_STRING":
            table = np.array([value.encode("utf-8") for value in values], np.object_)
        else:
            table = np.array(values, server().triton_string_to_numpy(kind))
        return server().Tensor(name, table.reshape(len(values), -1))


def parse(text: str, number: int) -> Any:
    """The value of a row of JSON.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"row {number}: expected a row as JSON: {error}") from None


def load_predictor(place: Path) -> Any:
    """``Predictor`` of the file beside this one, whatever else of that name can be imported."""
    spec = importlib.util.spec_from_file_location("lightning_ft_predictor", place / "predictor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Predictor
