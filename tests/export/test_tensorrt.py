"""Engines that TensorRT for RTX really builds, without a GPU: of encoders, a decoder's step, an encoder-decoder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import torch
import transformers as hf
from onnx import TensorProto, helper

from lightning_ft.export import ParityError, export_onnx
from lightning_ft.export.graph_precision import graph_precision, half_precision, random_feed
from lightning_ft.export.parity import open_graph
from lightning_ft.export.profiles import Profile, graph_axes
from lightning_ft.export.quantize import quantize
from lightning_ft.export.static_quantize import calibrate, static_nodes
from lightning_ft.export.tensorrt import EngineError, build_tensorrt, find_runtime
from tests.pretrained import pretrained

PROFILE = Profile({"batch": (1, 2, 4), "sequence": (1, 8, 16)})
STEPS = Profile.of_decoder([8], (2,), longest=16)


def export(kind: Any, auto: Any, folder: Path, **options: Any) -> None:
    export_onnx(pretrained(folder.parent / "model", kind, auto, **options), folder, max_length=16)


def encoder(kind: Any, folder: Path) -> None:
    export(kind, hf.AutoModelForSequenceClassification, folder, initializer_range=0.2)


def decoder(folder: Path) -> None:
    export("gpt2", hf.AutoModelForCausalLM, folder, initializer_range=0.2)


def encoder_decoder(folder: Path) -> None:
    export("t5", hf.AutoModelForSeq2SeqLM, folder, num_layers=1, num_decoder_layers=1)


GRAPHS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "bert": (lambda folder: encoder("bert", folder), PROFILE),
    "roberta": (lambda folder: encoder("roberta", folder), PROFILE),
    "gpt2": (decoder, STEPS),
    "t5": (encoder_decoder, STEPS),
}


@pytest.fixture(scope="module", params=GRAPHS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder of graphs in fp32, and one of the same in static int8."""
    make, profile = GRAPHS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder / "fp32")
    (folder / "int8-static").mkdir()
    for path in (folder / "fp32").glob("*.onnx"):
        session = open_graph(path)
        profiles = [profile] if isinstance(profile, Profile) else profile
        shapes = [one.shapes(graph_axes(path)) for one in profiles]
        feeds = [random_feed(session, {name: sizes[1] for name, sizes in shape.items()}) for shape in shapes]
        quantize(path, folder / "int8-static" / path.name, "int8-static", ranges=calibrate(path, feeds))
    return SimpleNamespace(name=request.param, folder=folder, profile=profile)


def parsed(path: Path) -> Any:
    """The network that TensorRT reads: by its own parser, and not by ours."""
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    return network


def products(path: Path) -> Counter[str]:
    """Types of the matrix products' inputs, where a quantised one counts as what it was quantised to."""
    network = parsed(path)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.type == trt.LayerType.MATRIX_MULTIPLY:
            maker = makers.get(layer.get_input(0).name)
            while maker is not None and maker.type == trt.LayerType.SHUFFLE:
                maker = makers.get(maker.get_input(0).name)
            quantised = maker is not None and maker.type == trt.LayerType.DEQUANTIZE
            found[(maker if quantised else layer).get_input(0).dtype.name] += 1
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-static"])
def test_engines_are_built(model: SimpleNamespace, precision: Any, tmp_path: Path) -> None:
    source = model.folder / ("int8-static" if precision == "int8-static" else "fp32")
    told: list[str] = []
    report = build_tensorrt(
        source,
        tmp_path / "out",
        precision=precision,
        profile=model.profile,
        capabilities=("SM89",),
        runtime="tensorrt_rtx",
        progress=told.append,
    )
    graphs = sorted(source.glob("*.onnx"))
    known = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert [row["engine"] for row in report.rows] == list(known["engines"]) == [path.stem for path in graphs]
    assert (known["runtime"], known["version"], known["capabilities"]) == ("tensorrt_rtx", trt.__version__, ["SM89"])
    assert known["precision"] == precision
    for path in graphs:
        entry = known["engines"][path.stem]
        plan = (tmp_path / "out" / entry["file"]).read_bytes()
        assert hashlib.sha256(plan).hexdigest() == entry["sha256"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["onnx_sha256"]
        assert plan.startswith(b"vtrt")
        graph = onnx.load(path).graph
        assert [io["name"] for io in entry["inputs"]] == [value.name for value in graph.input]
        assert [io["name"] for io in entry["outputs"]] == [value.name for value in graph.output]
        assert {io["type"] for io in entry["outputs"]} == {"FLOAT"}
        assert all(io["name"].encode() in plan for io in (*entry["inputs"], *entry["outputs"]))
        tensors = entry["tensors"]
        if precision == "fp16":
            assert tensors["HALF"] > 10 * tensors["FLOAT"]
        else:
            assert "HALF" not in tensors
        assert ("INT8" in tensors) == (precision == "int8-static")
    assert any(line.startswith(f"building {graphs[0].name} with tensorrt_rtx") for line in told)
    assert any("TensorRT: Building engine" in line for line in told)


def test_which_products_are_int8(model: SimpleNamespace) -> None:
    for path in (model.folder / "fp32").glob("*.onnx"):
        chosen, other = len(static_nodes(onnx.load(path))), sum(products(path).values())
        assert 0 < chosen < other
        found = products(model.folder / "int8-static" / path.name)
        assert found == {"INT8": chosen, "FLOAT": other - chosen}


def test_the_folder_has_all_that_runs_it(tmp_path: Path) -> None:
    encoder("bert", tmp_path / "out")
    build_tensorrt(tmp_path / "out", tmp_path / "engines", profile=[PROFILE, PROFILE], capabilities=("SM120", "SM89"))
    names = {path.name for path in (tmp_path / "engines").iterdir()}
    assert names == {p.name for p in (tmp_path / "out").iterdir()} - {"model.onnx"} | {"model.engine", "engine.json"}
    for name in ("head.json", "tokenizer.json", "predictor.py", "config.json"):
        assert (tmp_path / "engines" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    report = json.loads((tmp_path / "engines" / "report.json").read_text())
    known = json.loads((tmp_path / "engines" / "engine.json").read_text())
    assert report["title"] == "Exported to TensorRT"
    assert report["facts"]["files"]["model.engine"]["sha256"] == known["engines"]["model"]["sha256"]
    # An earlier export is replaced, and kept beside.
    again = build_tensorrt(tmp_path / "out", tmp_path / "engines", profile=PROFILE, capabilities=("SM120", "SM89"))
    assert again.facts["version"] == 2
    assert (tmp_path / "engines.previous" / "engine.json").is_file()
    assert known["capabilities"] == ["SM120", "SM89"]
    assert len(known["engines"]["model"]["profiles"]) == report["rows"][0]["profiles"] == 1  # two alike are one
    # By default: for every GPU from Ampere on, and up to what the model takes.
    build_tensorrt(tmp_path / "out", tmp_path / "default", timing_cache=tmp_path / "timings")
    known = json.loads((tmp_path / "default" / "engine.json").read_text())
    assert known["capabilities"] == ["SM80", "SM86", "SM89", "SM120", "SM121"]
    assert known["engines"]["model"]["profiles"] == [
        {name: [[1, 1], [8, 32], [32, 130]] for name in ("input_ids", "attention_mask", "token_type_ids")}
    ]
    report = json.loads((tmp_path / "default" / "report.json").read_text())
    assert report["facts"]["timing cache"] == "left alone: TensorRT for RTX times nothing when it builds"
    assert not (tmp_path / "timings").exists()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with one product of a constant matrix."""
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "model.onnx")
    return tmp_path / "folder"


def write(path: Path, *, factor: float = 1.0, kind: str = "Relu") -> None:
    weight = (factor * np.random.default_rng(0).normal(size=(64, 64))).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], "a"), helper.make_node(kind, ["a"], ["y"], "y")]
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in ("x", "y")]
    made = helper.make_graph(nodes, "g", sides[:1], sides[1:], [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


ROWS = Profile({"batch": (1, 4, 8)})


@pytest.mark.parametrize(
    ("precision", "found", "message"),
    [
        ("int8", "int8", "is in int8 whose scales follow the input .*: export it in int8-static, fp16 or fp32"),
        ("int8-weights", "int4", "has weights in blocks .*: export it in fp16 or fp32"),
        ("int4", "int4", "has weights in blocks .*: export it in fp16 or fp32"),
    ],
)
def test_precisions_that_no_engine_has(precision: Any, found: str, message: str, small: Path, tmp_path: Path) -> None:
    path = small / "model.onnx"
    quantize(path, path, precision)
    assert graph_precision(path) == found
    with pytest.raises(ValueError, match=message):
        build_tensorrt(small, tmp_path / "out", profile=ROWS)
    assert not (tmp_path / "out").exists()


def test_precisions_that_are_not_there(small: Path, tmp_path: Path) -> None:
    path = small / "model.onnx"
    with pytest.raises(ValueError, match=r"int8-static': .* is in fp32, .*export_onnx\(…, precision='int8-static'"):
        build_tensorrt(small, tmp_path / "out", precision="int8-static")
    quantize(path, path, "fp16")
    with pytest.raises(ValueError, match=r"precision='fp32': .* is in fp16: leave it out, or export it in fp32"):
        build_tensorrt(small, tmp_path / "out", precision="fp32")
    assert build_tensorrt(small, tmp_path / "out", profile=ROWS).rows[0]["precision"] == "fp16"
    model = onnx.load(path)
    model.graph.node[-1].domain = "com.microsoft"
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"has nodes of ONNX Runtime's own: it was optimised for it: export it in"):
        build_tensorrt(small, tmp_path / "more", profile=ROWS)


def test_fp16_is_compared(small: Path, tmp_path: Path) -> None:
    write(small / "model.onnx", factor=3e4)  # products beyond 65504
    with pytest.raises(ParityError, match=r"in fp16 an output differs by more than 0\.01 of its largest(?s:.)*y  "):
        build_tensorrt(small, tmp_path / "out", precision="fp16", profile=ROWS)
    assert not (tmp_path / "out").exists()
    write(small / "model.onnx")
    half_precision(small / "model.onnx", tmp_path / "half.onnx", [ROWS.shapes({"x": ["batch", 64]})])
    assert graph_precision(tmp_path / "half.onnx") == "fp16"


def test_arguments(small: Path, tmp_path: Path) -> None:
    def refuses(error: type[Exception], message: str, folder: Path = small, **options: Any) -> None:
        with pytest.raises(error, match=message):
            build_tensorrt(folder, tmp_path / "out", **{"profile": ROWS, "runtime": "tensorrt_rtx", **options})
        assert not (tmp_path / "out").exists()

    refuses(ValueError, "precision='int8': expected one of fp32, fp16, int8-static, or None", precision="int8")
    refuses(ValueError, "runtime='trt': expected one of auto, tensorrt, tensorrt_rtx", runtime="trt")
    refuses(ValueError, "workspace=4 is in bytes, and less than a MiB", workspace=4)
    refuses(ValueError, "profile: expected one or more, got none", profile=[])
    refuses(ValueError, "axes: batch of the input x has no range", profile=Profile({"rows": (1, 2, 3)}))
    refuses(ValueError, "builds for SM75, SM80, SM86, SM89, SM120, SM121, got SM90: the full", capabilities=("SM90",))
    refuses(FileNotFoundError, r"has no \.onnx file: give a folder that lightning-ft export wrote", tmp_path)
    refuses(EngineError, "does not build this graph:(?s:.)*FP32 GEMM is not supported", capabilities=("SM75",))
    (small / "more.onnx").write_bytes((small / "model.onnx").read_bytes())
    model = onnx.load(small / "more.onnx")
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, small / "more.onnx")
    refuses(EngineError, r"more\.onnx: tensorrt_rtx does not take this graph:\nNoSuchOperator y: ")


# ---- the full TensorRT, which cannot be had here: what is ours of it, on the builder of the other


class Full(ModuleType):
    """TensorRT for RTX in the place of the full one, with what the former lacks: timings, a driver."""

    __version__ = "10.9.0"

    def __init__(self, *, driver: bool = True) -> None:
        super().__init__("tensorrt")
        self.driver = driver
        self.taken: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(trt, name)

    def Builder(self, logger: Any) -> Any:
        if not self.driver:
            logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return FullBuilder(self, trt.Builder(logger))


class FullBuilder:
    def __init__(self, full: Full, builder: Any) -> None:
        self.full, self.builder = full, builder
        self.config: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    def create_builder_config(self) -> Any:
        self.config = FullConfig(self.full, self.builder.create_builder_config())
        return self.config

    def build_serialized_network(self, network: Any, config: FullConfig) -> Any:
        return self.builder.build_serialized_network(network, config._config)


class FullConfig:
    """Takes timings that begin with "mine"."""

    def __init__(self, full: Full, config: Any) -> None:
        object.__setattr__(self, "_full", full)
        object.__setattr__(self, "_config", config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def create_timing_cache(self, known: bytes) -> bytes:
        return known

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        fits = not cache or cache.startswith(b"mine")
        if fits:
            self._full.taken.append(cache)
        return fits

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"mine, longer" if self._full.taken[-1] else b"mine")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Full:
    made = Full()
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return made


def test_the_full_tensorrt_comes_first(full: Full, small: Path, tmp_path: Path) -> None:
    assert find_runtime() == ("tensorrt", full)
    assert find_runtime("tensorrt_rtx")[1] is trt
    timings = tmp_path / "timings"
    for number, (read, taken, after) in enumerate(
        [("begun anew", b"", b"mine"), ("read", b"mine", b"mine, longer"), ("begun anew", b"", b"mine")]
    ):
        report = build_tensorrt(small, tmp_path / str(number), profile=ROWS, timing_cache=timings, workspace=1 << 28)
        assert report.facts["timing cache"] == f"{timings}: {read}, written"
        assert full.taken[-1] == taken
        assert timings.read_bytes() == after
        known = json.loads((tmp_path / str(number) / "engine.json").read_text())
        assert (known["runtime"], known["version"], known["gpu"]) == ("tensorrt", "10.9.0", "NVIDIA L4")
        assert known["capabilities"] == ["SM89"]
        if number == 1:
            timings.write_bytes(b"another GPU's")
    assert "none" in str(build_tensorrt(small, tmp_path / "without", profile=ROWS).facts["timing cache"])
    with pytest.raises(ValueError, match=r"capabilities=\('SM89',\): the full TensorRT builds for the GPU that"):
        build_tensorrt(small, tmp_path / "out", profile=ROWS, capabilities=("SM89",))


def test_the_full_tensorrt_wants_a_gpu(full: Full, small: Path, tmp_path: Path) -> None:
    full.driver = False
    with pytest.raises(EngineError, match=r"tensorrt does not start: CUDA initialization failure.*='tensorrt_rtx'"):
        build_tensorrt(small, tmp_path / "out", profile=ROWS)


def test_no_tensorrt_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert find_runtime() == ("tensorrt_rtx", trt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ImportError, match=r'tensorrt_rtx is needed here .*pip install "lightning-ft\[tensorrt\]"'):
        find_runtime()
    with pytest.raises(ImportError, match="tensorrt is needed here"):
        find_runtime("tensorrt")
