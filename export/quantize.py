"""Exported graphs in fewer bits."""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_ft.export.extras import require
from lightning_ft.export.parity import PROVIDER
from lightning_ft.export.reading.graph import SLOW_FUSIONS
from lightning_ft.export.static_quantize import static_nodes, write_static

if TYPE_CHECKING:
    from onnx import ModelProto

Precision = Literal["fp32", "fp16", "int8", "int8-static", "int8-weights", "int4"]
"""What weights and activations are kept in.

- ``fp16``: both; inputs and outputs stay fp32. For GPUs: a CPU converts back and forth.
- ``int8``: weights with a scale for each channel, activations as they come (dynamic). The fastest on a CPU.
- ``int8-static``: the same products, but for some, with scales of activations fixed by data (calibration): the int8 of
  TensorRT. See :mod:`lightning_ft.export.static_quantize`.
- ``int8-weights``, ``int4``: weights in blocks of 32; activations stay fp32. For decoders, whose time goes into reading
  weights; slower than ``int8`` for encoders.
"""

QUANTISED = ("MatMul", "Gemm", "Gather")
BLOCK = 32
LARGE = 3 << 29
"""Bytes from which on weights are written beside a graph: 1.5 GiB, as torch's exporter does."""


def quantizable(model: ModelProto, precision: Precision = "int8") -> list[str]:
    """Names of the nodes that a precision quantises: those with a constant weight matrix, as it is or transposed.

    Of ``int8-static`` they are fewer: :func:`~lightning_ft.export.static_quantize.static_nodes`.
    """
    if precision == "int8-static":
        return static_nodes(model)
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    matrices |= {
        node.output[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in matrices
    }
    return [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTISED and any(name in matrices for name in node.input[: 1 if _looks_up(node) else 2])
    ]


def _looks_up(node: Any) -> bool:
    return bool(node.op_type == "Gather")


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    precision: Precision,
    *,
    keep: Collection[str] = (),
    ranges: Mapping[str, float] | None = None,
) -> None:
    """Write a graph in fewer bits. Nothing is checked here: :func:`lightning_ft.export.export_onnx` does that.

    ``int8`` is also optimised, as ONNX Runtime would when it loads it, but for two fusions that make encoders slower
    on a CPU (MiniLM, 32x64: 62 ms with them, 48 ms without): load it at the level BASIC, or with
    :func:`~lightning_ft.export.load_session`.

    Args:
        source: A ``model.onnx`` in fp32.
        target: The file to write.
        precision: What to write it in.
        keep: Names of nodes that stay in fp32.
        ranges: Of ``int8-static``: what :func:`~lightning_ft.export.static_quantize.calibrate` found on ``source``.

    Raises:
        ImportError: A package of the extra ``export`` is missing.
        ValueError: ``precision`` is none of those known, or ``ranges`` are missing.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(get_args(Precision))}")
    if precision == "int8-static" and ranges is None:
        raise ValueError("ranges: int8-static needs those of the activations: give what calibrate() returns")
    onnx = require("onnx")
    model = onnx.load(source)
    large = model.ByteSize() > LARGE
    if precision not in ("fp32", "fp16"):
        untie(model)
    with _quiet():
        if precision == "fp16":
            from onnxruntime.transformers.float16 import convert_float_to_float16

            # Shapes are inferred on bytes, of which there can be 2 GiB only.
            model = convert_float_to_float16(
                model, keep_io_types=True, node_block_list=list(keep), disable_shape_infer=large
            )
        elif precision == "int8":
            _int8(model, Path(target), keep, large=large)
            return
        elif precision == "int8-static":
            write_static(model, ranges or {}, keep=keep)
        elif precision != "fp32":
            model = _weights(model, 4 if precision == "int4" else 8, keep)
    save(model, Path(target))


def save(model: ModelProto, target: Path) -> None:
    """Write a graph; from 1.5 GiB on with its weights in a file beside it: no larger one can be read in one piece."""
    onnx = require("onnx")
    large = model.ByteSize() > LARGE
    onnx.save(model, target, save_as_external_data=large, location=f"{target.name}.data" if large else None)


def untie(model: ModelProto) -> None:
    """Give each product with a transposed weight a weight of its own, which can then be in fewer bits.

    A decoder's output layer is often its embedding table, transposed when it runs: in fp32 it would take most of the
    time of a step, and to quantise the table would quantise the look-up, too.

    Args:
        model: Changed in place. The table stays where it is looked up in.
    """
    onnx = require("onnx")
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        values = onnx.numpy_helper.to_array(weights[node.input[0]]).T
        graph.initializer.append(onnx.numpy_helper.from_array(values.copy(), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name in weights and t.name not in used]:
        graph.initializer.remove(tensor)


def _int8(model: ModelProto, target: Path, keep: Collection[str], *, large: bool) -> None:
    ort = require("onnxruntime")
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        raw = Path(folder) / "model.onnx"
        quantize_dynamic(
            model,
            raw,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # A Gemm is made a MatMul of another name first.
            nodes_to_exclude=[*keep, *(f"{name}_MatMul" for name in keep)],
            use_external_data_format=large,
            # Some shapes are not inferred in graphs of torch's exporter.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        if large:
            name = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(name, f"{target.name}.data")
        ort.InferenceSession(str(raw), options, providers=[PROVIDER], disabled_optimizers=SLOW_FUSIONS)


def _weights(model: ModelProto, bits: int, keep: Collection[str]) -> ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    # It knows no Gemm, which GPT-2's layers are.
    whole = ONNXModel(model)
    whole.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(
        whole.model,
        bits=bits,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=4,
        nodes_to_exclude=[*keep, *(f"{name}_MatMul" for name in keep)],
    )
    quantizer.process()
    result: ModelProto = quantizer.model.model
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's advice, which is about its command line, and what it says of each node."""
    root, level = logging.getLogger(), logging.getLogger().level
    # It sets the level of all logging when it is first imported.
    importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    try:
        root.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
