"""Graphs with int8 weights and activations whose scales are fixed beforehand: what TensorRT runs in int8."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_ft.export.extras import require
from lightning_ft.export.parity import open_graph

if TYPE_CHECKING:
    import numpy as np
    from onnx import GraphProto, ModelProto, NodeProto

    Array = np.ndarray[Any, Any]

Method = Literal["minmax", "percentile", "entropy"]
"""How the range of an activation follows from what was seen of it.

- ``minmax``: the largest magnitude. Nothing is cut off.
- ``percentile``: the magnitude below which that share of the values lies.
- ``entropy``: the range whose 8-bit histogram is the nearest to the histogram itself, by Kullback-Leibler divergence.
"""

LARGEST = 127  # of symmetric int8: TensorRT takes no zero point, and -128 would have no counterpart
BINS = 2048

_NONLINEAR: tuple[str, ...] = (
    "Celu",
    "Clip",
    "Elu",
    "Erf",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Mish",
    "PRelu",
    "Relu",
)
_NONLINEAR += ("Selu", "Sigmoid", "Softplus", "Swish", "Tanh", "ThresholdedRelu")
_ELEMENTWISE = ("Add", "Cast", "Div", "Identity", "Mul", "Neg", "Pow", "Reshape", "Sqrt", "Squeeze", "Sub", "Unsqueeze")
_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Calibration:
    """How the scales of activations are found.

    Args:
        batches: Batches of data that are run, at most.
        method: See :data:`Method`.
        percentile: Of ``method="percentile"``: the share of values that are not cut off, in percent.

    Raises:
        ValueError: An argument is out of range.
    """

    batches: int = 32
    method: Method = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches={self.batches} must be 1 or more: some data must be seen")
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(get_args(Method))}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile} must be above 50 and at most 100: 99.99 cuts 1 of 10000")

    def some(self, batches: Iterable[Any], progress: Callable[[str], None]) -> Iterator[Any]:
        """The first of some batches; each eighth is told."""
        for number, batch in zip(range(self.batches), batches, strict=False):
            if number % 8 == 0:
                progress(f"calibrating by {self.method}: batch {number + 1} of at most {self.batches}")
            yield batch


def static_nodes(model: ModelProto) -> list[str]:
    """Names of the nodes that ``int8-static`` quantises: products with a constant fp32 matrix.

    The second projection of a feed-forward layer is left out: its input, behind the nonlinearity, has few large values
    that stretch the scale of all others (MiniLM: 99.0 % agreement with fp32 with it, 99.8 % without). It is known by
    what it computes, never by its name: it leads from a wider layer back to the width that the first projection came
    from, with a nonlinearity between the two.
    """
    graph = model.graph
    matrices = _matrices(graph)
    makers = {name: node for node in graph.node for name in node.output}
    found = [node for node in graph.node if _is_product(node, matrices)]
    return [node.name for node in found if not _leads_back(node, matrices, makers)]


def calibrate(
    path: str | os.PathLike[str],
    feeds: Iterable[Mapping[str, Array]],
    calibration: Calibration | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Find the range of each activation that ``int8-static`` quantises.

    Batches may have any shapes, for each method.

    Args:
        path: A graph in fp32.
        feeds: Its inputs, by name, a mapping for each batch. No more are taken than ``calibration`` says.
        calibration: How; by default ``Calibration()``.
        threads: Of ONNX Runtime.
        progress: Is told each eighth batch.

    Returns:
        For each tensor's name the magnitude that becomes 127: ``ranges`` of :func:`lightning_ft.export.quantize`.

    Raises:
        ValueError: There is no batch, no node to quantise, or an activation is not finite.
    """
    how = calibration or Calibration()
    with watch(Path(path), how, threads=threads) as session:
        for feed in how.some(feeds, progress):
            session.run(None, feed)
    return session.ranges()


@contextlib.contextmanager
def watch(path: Path, calibration: Calibration, *, threads: int | None = None) -> Iterator[Watched]:
    """A session of a graph in fp32 that notes the ranges of its activations in whatever it runs.

    Args:
        path: The graph.
        calibration: How ranges are found.
        threads: Of ONNX Runtime.

    Raises:
        ValueError: There is no node to quantise.
    """
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    chosen = set(static_nodes(model))
    names = list(dict.fromkeys(node.input[0] for node in model.graph.node if node.name in chosen))
    if not names:
        raise ValueError(f"{path}: no node multiplies by a constant fp32 matrix: give a graph in fp32")
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    outputs = [value.name for value in model.graph.output]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in known
    )
    # Beside the graph, since weights in a file of their own are named by their place.
    handle, file = tempfile.mkstemp(".onnx", ".calibrating-", path.parent)
    os.close(handle)
    try:
        onnx.save(model, file)
        yield Watched(open_graph(Path(file), threads=threads), names, outputs, calibration)
    finally:
        Path(file).unlink(missing_ok=True)


class Watched:
    """Runs a graph as a session does, and notes the ranges of activations.

    Args:
        session: Of the graph with them among its outputs.
        names: Theirs.
        outputs: Those that the graph had before.
        calibration: How ranges are found.
    """

    def __init__(self, session: Any, names: Sequence[str], outputs: Sequence[str], calibration: Calibration) -> None:
        self.session = session
        self.names = names
        self.outputs = outputs
        self._largest: dict[str, float] = {}
        self._histograms: Any = None
        if calibration.method != "minmax":
            from onnxruntime.quantization.calibrate import HistogramCollector

            bins = BINS if calibration.method == "percentile" else LARGEST + 1
            share = calibration.percentile
            self._histograms = HistogramCollector(calibration.method, True, bins, LARGEST + 1, share, "same")

    def get_inputs(self) -> Any:
        """As the graph's."""
        return self.session.get_inputs()

    def get_outputs(self) -> list[Any]:
        """As the graph's."""
        return [entry for entry in self.session.get_outputs() if entry.name in self.outputs]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        """Run a batch."""
        wanted = self.outputs if names is None else names
        every = [*wanted, *(name for name in self.names if name not in feed and name not in wanted)]
        found = {**feed, **dict(zip(every, self.session.run(every, dict(feed)), strict=True))}
        for name in self.names:
            self._see(name, found[name])
        return [found[name] for name in wanted]

    def ranges(self) -> dict[str, float]:
        """The magnitude of each activation that becomes 127.

        Raises:
            ValueError: Nothing was run.
        """
        if not self._largest:
            raise ValueError("feeds: expected one batch of inputs or more, got none: give data that the model will see")
        if self._histograms is None:
            return dict(self._largest)
        with contextlib.redirect_stdout(io.StringIO()):
            pairs = self._histograms.compute_collection_result()
        return {name: float(max(abs(edge) for edge in pairs[name][:2])) for name in self._largest}

    def _see(self, name: str, value: Array) -> None:
        import numpy as np

        top = float(np.abs(value).max(initial=0))
        if not np.isfinite(top):
            raise ValueError(f"the activation {name} is not finite in calibration: look at the model and the data")
        self._largest[name] = max(top, self._largest.get(name, 0.0))
        if self._histograms is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each batch
                self._histograms.collect({name: value})


def write_static(model: ModelProto, ranges: Mapping[str, float], *, keep: Collection[str] = ()) -> None:
    """Make a graph's matrix products int8, by QuantizeLinear and DequantizeLinear nodes.

    Weights have a scale for each output channel and activations one for all; both are symmetric, with no zero point.
    Only inputs of products are quantised: their outputs, biases and all other nodes stay in fp32. Other than in dynamic
    int8, the outputs of a row do not depend on the rows beside it.

    Args:
        model: Changed in place; in fp32, without transposed weights.
        ranges: What :func:`calibrate` found on the same graph.
        keep: Names of nodes that stay in fp32.

    Raises:
        ValueError: ``ranges`` lacks an activation: they are of another graph.
    """
    chosen = set(static_nodes(model)) - set(keep)
    writer = _Writer(model.graph, ranges)
    for node in list(model.graph.node):
        if node.name in chosen:
            writer.quantize(node)
        writer.nodes.append(node)
    writer.finish()


# ---- which nodes


def _matrices(graph: GraphProto) -> dict[str, tuple[int, int]]:
    """Shapes of the constant fp32 matrices, as they are or transposed."""
    from onnx import TensorProto

    found = {
        tensor.name: (tensor.dims[0], tensor.dims[1])
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in found]
    return found | {node.output[0]: found[node.input[0]][::-1] for node in turned}


def _is_product(node: NodeProto, matrices: Collection[str]) -> bool:
    return node.op_type in _PRODUCTS and node.input[1] in matrices and not _attribute(node, "transA")


def _attribute(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _widths(node: NodeProto, matrices: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Features that a product reads, and that it gives."""
    shape = matrices[node.input[1]]
    return (shape[1], shape[0]) if _attribute(node, "transB") else shape


def _leads_back(node: NodeProto, matrices: Mapping[str, tuple[int, int]], makers: Mapping[str, NodeProto]) -> bool:
    """Whether a product is the second one of a feed-forward layer."""
    wide, narrow = _widths(node, matrices)
    if wide <= narrow:
        return False
    bent, rose = False, False
    open_names, seen = [node.input[0]], set()
    while open_names:
        name = open_names.pop()
        maker = makers.get(name)
        if name in seen or maker is None:
            continue
        seen.add(name)
        if _is_product(maker, matrices):
            rose = rose or _widths(maker, matrices) == (narrow, wide)
        elif maker.op_type in _NONLINEAR + _ELEMENTWISE:
            bent = bent or maker.op_type in _NONLINEAR
            open_names.extend(maker.input)
    return bent and rose


# ---- nodes


class _Writer:
    """Writes the nodes around each product, once for each tensor."""

    def __init__(self, graph: GraphProto, ranges: Mapping[str, float]) -> None:
        self.graph = graph
        self.ranges = ranges
        self.nodes: list[NodeProto] = []
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.read: dict[str, str] = {}

    def quantize(self, node: NodeProto) -> None:
        """Have a product read int8."""
        node.input[0] = self._activation(node.input[0], node.name)
        axis = 0 if _attribute(node, "transB") else 1
        # Both orientations of one matrix may be read: of an embedding that is the output layer, too.
        node.input[1] = self._once(f"{node.input[1]}.{axis}", partial(self._weight, node.input[1], axis))

    def finish(self) -> None:
        """Put the nodes into the graph and take the weights out that none reads."""
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input} | {value.name for value in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _once(self, stem: str, write: Callable[[str], str]) -> str:
        if stem not in self.read:
            self.read[stem] = write(stem)
        return self.read[stem]

    def _activation(self, name: str, reader: str) -> str:
        """Quantised once, and dequantised for each reader: ONNX Runtime fuses no node with several."""
        quantised = self._once(name, partial(self._quantised, name))
        inputs = [quantised, f"{name}.scale", f"{name}.zero"]
        return self._node("DequantizeLinear", inputs, f"{name}.{reader}.dequantized")

    def _quantised(self, name: str, stem: str) -> str:
        import numpy as np

        if name not in self.ranges:
            raise ValueError(f"ranges: {name} is not among them: calibrate the graph that is to be quantised")
        scale = self._constant(f"{stem}.scale", np.float32(self.ranges[name] / LARGEST or 1.0))
        zero = self._constant(f"{stem}.zero", np.int8(0))
        return self._node("QuantizeLinear", [name, scale, zero], f"{stem}.int8")

    def _weight(self, name: str, axis: int, stem: str) -> str:
        import numpy as np
        from onnx import numpy_helper

        values = numpy_helper.to_array(self.weights[name])
        scales = np.abs(values).max(1 - axis, keepdims=True) / LARGEST
        scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
        whole = self._constant(f"{stem}.int8", np.rint(values / scales).clip(-LARGEST, LARGEST).astype(np.int8))
        scale = self._constant(f"{stem}.scale", scales.ravel())
        zero = self._constant(f"{stem}.zero", np.zeros(scales.size, np.int8))
        return self._node("DequantizeLinear", [whole, scale, zero], f"{stem}.dequantized", axis=axis)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: int) -> str:
        self.nodes.append(require("onnx").helper.make_node(kind, inputs, [output], f"{output}.{kind}", **attributes))
        return output

    def _constant(self, name: str, value: Any) -> str:
        import numpy as np

        self.graph.initializer.append(require("onnx").numpy_helper.from_array(np.asarray(value), name))
        return name
