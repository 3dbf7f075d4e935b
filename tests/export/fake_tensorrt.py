"""A stand-in for TensorRT's runtime on a CPU: it reads and writes the addresses that it is given, by ONNX Runtime."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime


class Logger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal", "warning"


class FakeTensorRT:
    """What a module of TensorRT has, as far as an engine is run.

    Args:
        graph: The ONNX file that every engine computes.
        refuses: What shall fail: "load", "shape", "address", "run" or "profile".
    """

    __version__ = "10.9.0"
    ILogger = Logger

    def __init__(self, graph: Path, refuses: str = "") -> None:
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.refuses = refuses
        self.profiles: list[int] = []
        self.bound: dict[str, int] = {}

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Any:
            if self.refuses == "load":
                logger.log("error", "the plan is no plan")
                return None
            return SimpleNamespace(create_execution_context=lambda: Context(self, logger))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class Context:
    def __init__(self, fake: FakeTensorRT, logger: Any) -> None:
        self.fake, self.logger = fake, logger
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types = {entry.name: entry.type for entry in fake.session.get_inputs()}
        self.outputs: dict[str, np.ndarray[Any, Any]] = {}

    def _done(self, what: str) -> bool:
        if self.fake.refuses == what:
            self.logger.log("error", f"no {what} of yours")
        return self.fake.refuses != what

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.fake.profiles.append(index)
        return self._done("profile")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        self.outputs = {}
        return self._done("shape")

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address > 0
        self.fake.bound[name] = address
        return self._done("address")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """As TensorRT infers it; here by computing it: the inputs lie at their addresses by then."""
        if not self.outputs:
            feed = {n: _read(self.fake.bound[n], self.shapes[n], kind) for n, kind in self.types.items()}
            names = [entry.name for entry in self.fake.session.get_outputs()]
            self.outputs = dict(zip(names, self.fake.session.run(names, feed), strict=True))
        return (-1,) if self.fake.refuses == "size" else self.outputs[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        for name, value in self.outputs.items():
            ctypes.memmove(self.fake.bound[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return self._done("run")


def _read(address: int, shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    made = np.empty(shape, {"tensor(int64)": np.int64, "tensor(float)": np.float32}[kind])
    ctypes.memmove(made.ctypes.data, address, made.nbytes)
    return made
