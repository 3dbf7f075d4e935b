"""Stands in for Triton's ONNX Runtime backend, which the server of the tests lacks, as a backend in Python.

It does with a shipped model what the C++ backend does: it joins the requests that Triton has merged along their batch,
runs the graph once at the optimisation level of the configuration, and splits what comes. Like it, it cannot pad.
"""

import importlib
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / config["default_model_filename"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        level = config.get("optimization", {}).get("graph", {}).get("level", 0)
        options.graph_optimization_level = LEVELS[int(level)]
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.server = importlib.import_module("triton_python_backend_utils")

    def execute(self, requests):
        feed = {
            entry.name: [self.server.get_input_tensor_by_name(request, entry.name).as_numpy() for request in requests]
            for entry in self.session.get_inputs()
        }
        names = [entry.name for entry in self.session.get_outputs()]
        try:
            values = self.session.run(names, {name: np.concatenate(parts) for name, parts in feed.items()})
        except Exception as error:  # noqa: BLE001  ONNX Runtime's share no other base; Triton hands it on
            fault = self.server.TritonError(str(error))
            return [self.server.InferenceResponse(error=fault) for _ in requests]
        ends = np.cumsum([len(part) for part in next(iter(feed.values()))])[:-1]
        split = [np.split(value, ends) for value in values]
        return [
            self.server.InferenceResponse(
                [self.server.Tensor(name, parts[i]) for name, parts in zip(names, split, strict=True)]
            )
            for i in range(len(requests))
        ]
