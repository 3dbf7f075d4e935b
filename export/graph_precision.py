"""The precision that a graph was written in, and graphs in fp16 that were compared with those in fp32."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.core.report import format_table
from lightning_ft.export.extras import require
from lightning_ft.export.parity import ParityError, open_graph
from lightning_ft.export.profiles import Shapes
from lightning_ft.export.quantize import quantize

if TYPE_CHECKING:
    import numpy as np

HALF_TOLERANCE = 1e-2
_DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat")
_BLOCKS = ("MatMulNBits", "GatherBlockQuantized")


def graph_precision(path: str | os.PathLike[str]) -> str:
    """``"fp32"``, ``"fp16"``, ``"int8-static"``, ``"int8"``, ``"int4"`` or ``"onnxruntime"``, by a graph's nodes.

    The last stands for nodes of ONNX Runtime's own, such as an optimised file has: no other runtime reads them.
    """
    onnx = require("onnx")
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    if kinds.intersection(_BLOCKS):
        return "int4"
    if kinds.intersection(_DYNAMIC):
        return "int8"
    if any(node.domain not in ("", "ai.onnx") for node in graph.node):
        return "onnxruntime"
    if "QuantizeLinear" in kinds:
        return "int8-static"
    types = {tensor.data_type for tensor in graph.initializer}
    return "fp16" if onnx.TensorProto.FLOAT16 in types else "fp32"


def check_precision(path: Path, wanted: str | None) -> str:
    """The precision of a graph that an engine is to be built of.

    Args:
        path: The graph.
        wanted: The engine's; None for the graph's.

    Raises:
        ValueError: There is no such engine.
    """
    found = graph_precision(path)
    if found in ("int8", "int4", "onnxruntime"):
        why = {
            "int8": "is in int8 whose scales follow the input (dynamic), and TensorRT knows none but fixed ones",
            "int4": "has weights in blocks (int8-weights, int4), in nodes of ONNX Runtime's own",
            "onnxruntime": "has nodes of ONNX Runtime's own: it was optimised for it",
        }[found]
        take = "int8-static, fp16 or fp32" if found == "int8" else "fp16 or fp32"
        raise ValueError(f"{path} {why}: export it in {take}")
    if wanted is None or wanted == found or (wanted, found) == ("fp16", "fp32"):
        return found
    if wanted == "int8-static":
        raise ValueError(
            f"precision='int8-static': {path} is in {found}, and scales are found on data: export it with "
            "export_onnx(…, precision='int8-static', gate=Gate(data)) first"
        )
    raise ValueError(f"precision={wanted!r}: {path} is in {found}: leave it out, or export it in {wanted}")


def half_precision(
    source: Path, target: Path, profiles: Sequence[Shapes], *, progress: Callable[[str], None] = lambda line: None
) -> None:
    """Write a graph in fp16, and compare it with its source in ONNX Runtime at the profiles' shapes.

    Inputs and outputs stay as they are. The error is relative to the largest magnitude of an output, as
    :func:`~lightning_ft.export.parity.check_parity` takes it; at most 0.01 is allowed.

    Raises:
        ParityError: It errs by more, or is not finite.
    """
    import numpy as np

    quantize(source, target, "fp16")
    progress(f"comparing {source.name} in fp16 with fp32 in ONNX Runtime")
    exact, rough = open_graph(source), open_graph(target)
    seen: dict[str, list[tuple[str, float, float]]] = {entry.name: [] for entry in exact.get_outputs()}
    for shapes in profiles:
        for which in (0, 1):  # the smallest, and the one to tune for: the largest may be more than a CPU can do
            feed = random_feed(exact, {name: sizes[which] for name, sizes in shapes.items()})
            for name, one, other in zip(seen, exact.run(None, feed), rough.run(None, feed), strict=True):
                error = float(np.abs(one - other).max(initial=0))
                seen[name].append((str(one.shape), error, float(np.abs(one).max(initial=0))))
    rows: list[dict[str, Any]] = [
        {"output": name, "shape": shape, "relative": error / (max(top for _, _, top in found) or 1.0)}
        for name, found in seen.items()
        for shape, error, _ in found
    ]
    if not all(row["relative"] <= HALF_TOLERANCE for row in rows):  # written so that NaN fails
        table = "\n".join(format_table(sorted(rows, key=lambda row: -row["relative"])[:10]))
        raise ParityError(
            f"{source}: in fp16 an output differs by more than {HALF_TOLERANCE:g} of its largest value; nothing was "
            f"written. Take fp32, or export with precision='fp16' and a gate, which finds the layers at fault.\n{table}"
        )


def random_feed(session: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of a graph: random ids and values, masks of ones, positions from 0 on."""
    import numpy as np

    generator = np.random.default_rng(0)
    kinds = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
    feed: dict[str, np.ndarray[Any, Any]] = {}
    for entry in session.get_inputs():
        shape, kind = tuple(shapes[entry.name]), kinds[entry.type.removeprefix("tensor(").removesuffix(")")]
        if issubclass(kind, np.floating):
            made: Any = generator.standard_normal(shape)
        elif "mask" in entry.name:
            made = np.ones(shape)
        elif "position" in entry.name:
            made = np.broadcast_to(np.arange(shape[-1]), shape)
        elif "ids" in entry.name and "type" not in entry.name:
            made = generator.integers(2, 50, shape)
        else:
            made = np.zeros(shape)
        feed[entry.name] = np.ascontiguousarray(made, kind)
    return feed
