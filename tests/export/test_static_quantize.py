"""Static int8: which products, by which scales, and judged as all graphs in fewer bits are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from datasets import Dataset
from onnx import TensorProto, helper, numpy_helper

from lightning_ft.data import ClassificationData
from lightning_ft.export import Gate, Logits, export_onnx, load_session
from lightning_ft.export.graphs import OneGraph
from lightning_ft.export.judge import calibration_batches, judge
from lightning_ft.export.quantize import quantizable, quantize
from lightning_ft.export.static_quantize import Calibration, calibrate, static_nodes
from lightning_ft.modules import SequenceClassification
from tests.export.test_gate import classifier, own_answers, sentences

HIDDEN, WIDE = 6, 12
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "up": RANDOM.normal(size=(HIDDEN, WIDE)),
    "gate": RANDOM.normal(size=(HIDDEN, WIDE)),
    "down": RANDOM.normal(size=(WIDE, HIDDEN)),
    "down.T": RANDOM.normal(size=(HIDDEN, WIDE)),
    "square": RANDOM.normal(size=(HIDDEN, HIDDEN)),
    "square.T": RANDOM.normal(size=(HIDDEN, HIDDEN)),
    "classes": RANDOM.normal(size=(HIDDEN, 3)),
    "bias": RANDOM.normal(size=HIDDEN),
}


def graph(folder: Path, *nodes: tuple[str, str, str], **attributes: dict[str, Any]) -> Path:
    """A file with a graph from ``x`` to ``y``: nodes by kind, inputs and output, which names them, too."""
    made = [helper.make_node(kind, i.split(), [o], o, **attributes.get(o, {})) for kind, i, o in nodes]
    used = {name for node in made for name in node.input}
    model = helper.make_model(
        helper.make_graph(
            made,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", HIDDEN])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "width"])],
            [numpy_helper.from_array(v.astype(np.float32), n) for n, v in WEIGHTS.items() if n in used],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return path


def run(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As written: without ONNX Runtime's own fusions."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(["y"], {"x": x})[0]
    return found


def batches(*rows: int, scale: float = 1.0) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(1)
    for count in rows:
        yield {"x": (scale * generator.normal(size=(count, HIDDEN))).astype(np.float32)}


LAYERS: dict[str, tuple[list[tuple[str, str, str]], dict[str, dict[str, Any]], list[str]]] = {
    "with ReLU": ([("MatMul", "x up", "a"), ("Relu", "a", "b"), ("MatMul", "b down", "y")], {}, ["a"]),
    "with GELU in parts": (
        [("MatMul", "x up", "a"), ("Erf", "a", "b"), ("Mul", "a b", "c"), ("MatMul", "c down", "y")],
        {},
        ["a"],
    ),
    "gated": (
        [
            ("MatMul", "x gate", "a"),
            ("Sigmoid", "a", "b"),
            ("Mul", "a b", "c"),
            ("MatMul", "x up", "d"),
            ("Mul", "c d", "e"),
            ("MatMul", "e down", "y"),
        ],
        {},
        ["a", "d"],
    ),
    "of transposed weights": (
        [("MatMul", "x up", "a"), ("Gelu", "a", "b"), ("Gemm", "b down.T bias", "y")],
        {"y": {"transB": 1}},
        ["a"],
    ),
    # What is no second projection of such a layer is quantised.
    "without nonlinearity": ([("MatMul", "x up", "a"), ("MatMul", "a down", "y")], {}, ["a", "y"]),
    "pooler and classes": (
        [("MatMul", "x square", "a"), ("Tanh", "a", "b"), ("MatMul", "b classes", "y")],
        {},
        ["a", "y"],
    ),
    "of activations": ([("MatMul", "x square", "a"), ("Softmax", "a", "b"), ("MatMul", "b a", "y")], {}, ["a"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_which_products(name: str, tmp_path: Path) -> None:
    nodes, attributes, wanted = LAYERS[name]
    path = graph(tmp_path, *nodes, **attributes)
    if name == "of activations":
        model = onnx.load(path)
        assert static_nodes(model) == quantizable(model, "int8-static") == wanted
        return
    assert static_nodes(onnx.load(path)) == wanted
    # Each one that is chosen is quantised, and no other.
    x = next(batches(5))["x"]
    ranges = calibrate(path, batches(4, 7))
    quantize(path, tmp_path / "small.onnx", "int8-static", ranges=ranges)
    onnx.checker.check_model(tmp_path / "small.onnx", full_check=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert kinds.count("DequantizeLinear") == 2 * len(wanted)
    assert 0 < np.abs(run(tmp_path / "small.onnx", x) - run(path, x)).max() < 0.1 * np.abs(run(path, x)).max()


def test_values_are_those_of_the_definition(tmp_path: Path) -> None:
    path = graph(tmp_path, ("MatMul", "x square", "a"), ("Gemm", "a square.T bias", "y"), y={"transB": 1})
    ranges = calibrate(path, batches(4, 9, 3))
    quantize(path, tmp_path / "small.onnx", "int8-static", ranges=ranges)

    def rounded(values: Any, scale: Any) -> Any:
        return np.clip(np.rint(values / scale), -127, 127) * scale

    square, turned = WEIGHTS["square"].astype(np.float32), WEIGHTS["square.T"].astype(np.float32).T
    seen = np.concatenate([feed["x"] for feed in batches(4, 9, 3)])
    tops = {"x": np.abs(seen).max(), "a": np.abs(seen @ square).max()}
    assert ranges == pytest.approx(tops, rel=1e-5)
    x = next(batches(8, scale=2.0))["x"]  # some are larger than what was seen, and are cut off
    assert (np.abs(x) > tops["x"]).any()
    a = rounded(x, tops["x"] / 127) @ rounded(square, np.abs(square).max(0) / 127)
    wanted = rounded(a, tops["a"] / 127) @ rounded(turned, np.abs(turned).max(0) / 127) + WEIGHTS["bias"]
    # Activations at the border of two steps may be rounded to the other one: two in a row, here.
    np.testing.assert_allclose(run(tmp_path / "small.onnx", x), wanted, atol=2 * tops["a"] / 127 * np.abs(turned).max())
    assert np.median(np.abs(run(tmp_path / "small.onnx", x) - wanted)) < 1e-5
    model = onnx.load(tmp_path / "small.onnx").graph
    whole = {t.name: numpy_helper.to_array(t) for t in model.initializer}
    assert not {"square", "square.T"} & set(whole)
    assert not any(value.any() for name, value in whole.items() if name.endswith(".zero"))
    assert {value.min() for value in whole.values() if value.dtype == np.int8 and value.ndim == 2} == {-127}
    scales = {name: value.shape for name, value in whole.items() if name.endswith(".scale")}
    assert scales == {"x.scale": (), "a.scale": (), "square.1.scale": (6,), "square.T.0.scale": (6,)}


def test_what_is_kept_and_what_is_shared(tmp_path: Path) -> None:
    path = graph(
        tmp_path, ("MatMul", "x square", "a"), ("MatMul", "x square", "b"), ("Add", "a b", "c"), ("MatMul", "c up", "y")
    )
    ranges = calibrate(path, batches(4))
    quantize(path, tmp_path / "small.onnx", "int8-static", ranges=ranges, keep=["y"])
    made = onnx.load(tmp_path / "small.onnx").graph
    kinds = [node.op_type for node in made.node]
    # One weight and one activation, read twice.
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 3)
    assert next(node for node in made.node if node.name == "y").input[1] == "up"


def test_ranges_by_other_methods(tmp_path: Path) -> None:
    path = graph(tmp_path, ("MatMul", "x square", "y"))
    feeds = list(batches(200, 333, 50))
    feeds[1]["x"][0, 0] = 100.0
    values = np.abs(np.concatenate([feed["x"] for feed in feeds]))
    assert calibrate(path, feeds)["x"] == 100.0
    share = calibrate(path, feeds, Calibration(method="percentile", percentile=99.0))["x"]
    assert share == pytest.approx(np.percentile(values, 99.0), rel=0.05)
    assert 2.0 < calibrate(path, feeds, Calibration(method="entropy"))["x"] < 99.0
    # No more batches than were asked for.
    assert calibrate(path, feeds, Calibration(batches=1))["x"] == np.abs(feeds[0]["x"]).max()
    assert [p.name for p in tmp_path.iterdir()] == ["graph.onnx"]


def test_refusals(tmp_path: Path) -> None:
    path = graph(tmp_path, ("MatMul", "x square", "y"))
    with pytest.raises(ValueError, match="feeds: expected one batch of inputs or more, got none"):
        calibrate(path, [])
    with pytest.raises(ValueError, match="the activation x is not finite in calibration"):
        calibrate(path, [{"x": np.full((1, HIDDEN), np.nan, np.float32)}])
    with pytest.raises(ValueError, match="ranges: x is not among them: calibrate the graph"):
        quantize(path, tmp_path / "small.onnx", "int8-static", ranges={})
    with pytest.raises(ValueError, match=r"ranges: int8-static needs those .*give what calibrate\(\) returns"):
        quantize(path, tmp_path / "small.onnx", "int8-static")
    quantize(path, path, "int8-static", ranges=calibrate(path, batches(3)))
    with pytest.raises(ValueError, match="no node multiplies by a constant fp32 matrix: give a graph in fp32"):
        calibrate(path, batches(3))
    with pytest.raises(ValueError, match="batches=0 must be 1 or more"):
        Calibration(batches=0)
    with pytest.raises(ValueError, match="method='max': expected one of minmax, percentile, entropy"):
        Calibration(method="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"percentile=0\.999 must be above 50"):
        Calibration(percentile=0.999)


def fragile(folder: Path) -> SequenceClassification:
    """One value of a block's attention is as much larger as the weight that reads it is smaller."""
    module = classifier(folder)
    with torch.no_grad():
        layer = module.model.bert.encoder.layer[1].attention
        layer.self.value.weight[3] *= 3000
        layer.output.dense.weight[:, 3] /= 3000
    return module


def test_a_graph_is_judged_and_mended(tmp_path: Path) -> None:
    module = fragile(tmp_path)
    told: list[str] = []
    data = own_answers(module)
    report = export_onnx(
        module,
        tmp_path / "out",
        precision="int8-static",
        gate=Gate(data, max_drop=0.012, calibration=Calibration(batches=5)),
        max_length=24,
        progress=told.append,
    )
    full, *failed, last = report.facts["gate"]
    assert (full["precision"], full["val_accuracy"]) == ("fp32", 1.0)
    assert failed
    assert failed[0]["drop"] > 0.012 >= last["drop"]
    assert failed[0]["distance"] > 2 * last["distance"] > 0
    assert last["nodes in fp32"] == 1
    assert last["MB"] < full["MB"]
    assert "calibrating on the validation data of ClassificationData" in told
    assert "calibrating by minmax: batch 1 of at most 5" in told
    # What was written is what passed.
    session = load_session(tmp_path / "out")
    replaced = OneGraph(Logits(module.model)).replacements(module, {"model.onnx": session})
    assert judge(module, data, replaced).metrics["val_accuracy"] == last["val_accuracy"]
    # Other than in dynamic int8, a row's outputs are its own affair.
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 60, (8, 6))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (whole,) = session.run(["logits"], feed)
    (alone,) = session.run(["logits"], {name: value[:1] for name, value in feed.items()})
    np.testing.assert_allclose(whole[:1], alone, rtol=1e-5, atol=1e-5)


def test_training_data_calibrate_where_there_are_any(tmp_path: Path) -> None:
    module = classifier(tmp_path)
    table = Dataset.from_dict({"text": sentences(20), "label": ["no"] * 20})
    place = str(module._source)
    both = ClassificationData(place, train=table, val=table.select(range(3)), labels=module.labels, batch_size=10)
    split, found = calibration_batches(both)
    assert split == "training"
    assert sum(len(batch["input_ids"]) for batch in found) == 20
    split, found = calibration_batches(ClassificationData(place, val=table.select(range(3)), labels=module.labels))
    assert split == "validation"
    assert sum(len(batch["input_ids"]) for batch in found) == 3
