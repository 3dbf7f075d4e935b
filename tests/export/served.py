"""Exported folders for tests of what reads them: for some the real graph, for others the model itself in its place."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lightning_ft.export.heads import Exportable, open_source
from lightning_ft.export.reading_settings import with_reading_settings
from lightning_ft.export.wrappers import graph_inputs

# The function of the same name hides the module in the package.
MODULE = importlib.import_module("lightning_ft.export.onnx_folder")


class TorchSession:
    """A model in the place of its graph: tracing takes seconds, and that it is right is tested elsewhere."""

    def __init__(self, part: Exportable) -> None:
        self.graph = part.head.wrap(part.model.eval())
        known = inspect.signature(self.graph.forward).parameters
        tokens = graph_inputs(part.model, part.tokenizer)
        self.names = [name for name in known if name in tokens or name in ("gap", "pattern")]
        self.shapes: list[tuple[int, ...]] = []

    def get_inputs(self) -> Sequence[Any]:
        return [SimpleNamespace(name=name) for name in self.names]

    def run(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        assert set(feed) == set(self.names)
        assert all(values.dtype == np.int64 for values in feed.values())
        self.shapes.append(feed["input_ids"].shape)
        with torch.inference_mode():
            found = self.graph(**{name: torch.from_numpy(values) for name, values in feed.items()})
        values = dict(zip(self.graph.outputs, found, strict=True))
        return [values[name].numpy() for name in names]


def serve(module: Any, folder: Path, settings: Mapping[str, Any] | None = None) -> TorchSession:
    """All of an export but its graph, and what runs in its place."""
    [part] = open_source(module).values()
    part = replace(part, head=with_reading_settings(part.head, part.tokenizer, settings))
    folder.mkdir(parents=True)
    MODULE.save_companions(folder, part)
    return TorchSession(part)
