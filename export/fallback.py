"""The exporter of transformers, where torch's own fails on a model: it patches what cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_ft.export.extras import require
from lightning_ft.export.graph import quiet, strip, trace

if TYPE_CHECKING:
    from lightning_ft.export.wrappers import GraphWrapper

EXTERNAL = 1536 << 20
"""Bytes of weights from which on they lie in a file beside the graph, as torch's exporter has it."""


class ExportError(RuntimeError):
    """No exporter could make a graph of the model; the message holds what each said."""


def write_graph(
    wrapper: GraphWrapper,
    sample: Mapping[str, Tensor],
    path: Path,
    *,
    opset: int,
    progress: Callable[[str], None] = lambda line: None,
) -> str:
    """Export with dynamic, named axes into a file: by torch, or else by ``transformers.exporters``.

    Args:
        wrapper: In evaluation mode.
        sample: Inputs of the graph, with different sizes above 1 in all axes: both exporters freeze an axis of size 1.
        path: The file to write.
        opset: Version of the ONNX operators.
        progress: Is told when the second is tried.

    Returns:
        Which did it: ``"torch"`` or ``"transformers"``.

    Raises:
        ExportError: Neither could.
    """
    try:
        trace(wrapper, sample, opset=opset).save(path)
    except Exception as first:  # noqa: BLE001  what the exporter raises has no base of its own
        progress(f"torch.onnx.export failed ({_said(first)}): trying transformers.exporters")
        try:
            _by_transformers(wrapper, sample, path, opset)
        except Exception as second:  # noqa: BLE001
            raise ExportError(
                f"no exporter makes a graph of {type(wrapper.model).__name__}. torch.onnx.export said: {_said(first)}; "
                f"transformers.exporters said: {_said(second)}. Give a `head` with a GraphWrapper that avoids what "
                "cannot be traced"
            ) from first
        return "transformers"
    return "torch"


def _by_transformers(wrapper: GraphWrapper, sample: Mapping[str, Tensor], path: Path, opset: int) -> None:
    exporters: Any = require("transformers.exporters")
    axes = {name: dict(wrapper.axes(name)) for name in sample}
    with quiet():
        config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=axes, opset_version=opset)
        model, _ = exporters.OnnxExporter().export_program(wrapper, dict(sample), config)
    for value, name in zip(model.graph.outputs, wrapper.outputs, strict=True):
        value.name = name
    strip(model)
    ir: Any = require("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, str(path), external_data=f"{path.name}.data" if size > EXTERNAL else None)


def _said(error: Exception) -> str:
    """The first lines of a message that may be pages long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}{' …' if len(text) > 500 else ''}"
