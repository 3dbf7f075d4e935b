"""Engines are loaded only where they run, and take the place of a session."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf

from lightning_ft.core.files import sha256
from lightning_ft.export import Predictor, export_onnx
from lightning_ft.export import engine as module
from lightning_ft.export.engine import EngineSession, Gpu, check_gpu, find_gpu, load_engine
from lightning_ft.export.generation import CausalDecoder, GenerationSettings, generate
from lightning_ft.export.graph_precision import random_feed
from lightning_ft.export.profiles import Profile, graph_axes, token_lengths
from lightning_ft.export.tensorrt import EngineError, build_tensorrt
from tests.export.fake_tensorrt import FakeTensorRT
from tests.export.test_gate import sentences
from tests.pretrained import pretrained

TYPES = {"tensor(int64)": "INT64", "tensor(float)": "FLOAT"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    path = pretrained(folder / "model", "bert", hf.AutoModelForSequenceClassification, initializer_range=0.4)
    export_onnx(path, folder / "out", max_length=24)
    return folder / "out"


def entry(path: Path, *profiles: Profile) -> dict[str, Any]:
    """What ``engine.json`` says of an engine of a graph, as build_tensorrt writes it and JSON gives it back."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def described(io: Any) -> dict[str, Any]:
        return {"name": io.name, "type": TYPES[io.type], "shape": [-1 if isinstance(s, str) else s for s in io.shape]}

    made = {
        "file": "model.engine",
        "inputs": [described(io) for io in session.get_inputs()],
        "outputs": [described(io) for io in session.get_outputs()],
        "profiles": [profile.shapes(graph_axes(path)) for profile in profiles],
    }
    loaded: dict[str, Any] = json.loads(json.dumps(made))
    return loaded


def opened(path: Path, *profiles: Profile, refuses: str = "") -> tuple[EngineSession, FakeTensorRT]:
    fake = FakeTensorRT(path, refuses)
    return EngineSession(fake, b"plan", entry(path, *profiles), device=CPU), fake


SHORT, LONG = (
    Profile({"batch": (1, 1, 4), "sequence": (1, 8, 8)}),
    Profile({"batch": (1, 8, 8), "sequence": (9, 24, 64)}),
)


def test_a_predictor_runs_on_it(exported: Path) -> None:
    session, fake = opened(exported / "model.onnx", SHORT, LONG)
    assert [e.name for e in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert (session.get_inputs()[0].type, session.get_inputs()[0].shape) == ("tensor(int64)", (-1, -1))
    assert [e.name for e in session.get_outputs()] == ["logits"]
    texts = [*sentences(20), "a", "the film"]
    found = Predictor(exported, session=session, batch_size=4)(texts)
    wanted = Predictor(exported, batch_size=4)(texts)
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in wanted], rtol=1e-5)
    # Short batches come first and last by length: profiles change only with the shapes.
    assert fake.profiles == [1]


def test_a_decoder_writes_on_it(tmp_path: Path) -> None:
    path = pretrained(tmp_path / "model", "gpt2", hf.AutoModelForCausalLM, initializer_range=0.2)
    export_onnx(path, tmp_path / "out", max_length=16)
    graph = tmp_path / "out" / "model.onnx"
    session, fake = opened(graph, *Profile.of_decoder([16], (4,), longest=32))
    ids = np.random.default_rng(0).integers(2, 50, (2, 6))
    settings = GenerationSettings(max_new_tokens=8, min_new_tokens=8)
    found = generate(CausalDecoder(session), ids, np.ones_like(ids), settings)
    plain = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert (found == generate(CausalDecoder(plain), ids, np.ones_like(ids), settings)).all()
    assert found.shape == (2, 8)
    assert fake.profiles == [1]  # the prompt's first, then the tokens'


def test_outputs_stay_where_they_were_written(exported: Path) -> None:
    session, fake = opened(exported / "model.onnx", SHORT)
    ids = torch.ones(2, 5, dtype=torch.long)
    feed = {"input_ids": ids, "attention_mask": ids.clone(), "token_type_ids": ids.clone()}
    found = session.run_tensors(feed)
    assert found["logits"].data_ptr() == fake.bound["logits"]
    # Inputs that are there already are read where they are.
    assert {name: value.data_ptr() for name, value in feed.items()}.items() <= fake.bound.items()
    np.testing.assert_array_equal(session.run(None, feed)[0], found["logits"].numpy())


def test_what_a_session_refuses(exported: Path) -> None:
    path = exported / "model.onnx"
    session, _ = opened(path, SHORT)
    feed = random_feed(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (2, 5)
    ))  # fmt: skip
    assert session.run(["logits"], feed)[0].shape[0] == 2
    with pytest.raises(ValueError, match="feed: expected the inputs input_ids, attention_mask, token_type_ids, got in"):
        session.run(None, {"input_ids": feed["input_ids"]})
    with pytest.raises(ValueError, match=r"input_ids: expected torch\.int64, got torch\.int32"):
        session.run(None, {**feed, "input_ids": feed["input_ids"].astype(np.int32)})
    with pytest.raises(ValueError, match="names: scores is no output; there are logits"):
        session.run(["scores"], feed)
    wide = {name: np.repeat(value, 4, 1) for name, value in feed.items()}
    with pytest.raises(ValueError, match=r"input_ids: no profile of the engine takes the shape \(2, 20\); they take"):
        session.run(None, wide)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"TensorRT refused the shape \(2, 9\):\nno shape of yours"),
        ("address", "TensorRT refused its memory:\nno address of yours"),
        ("run", "TensorRT failed to run the batch:\nno run of yours"),
        ("profile", "TensorRT refused the profile 1:\nno profile of yours"),
        ("size", "logits: its size depends on the data"),
    ],
)
def test_what_tensorrt_refuses_is_said(what: str, message: str, exported: Path) -> None:
    session, _ = opened(exported / "model.onnx", SHORT, LONG, refuses=what)
    ids = np.ones((2, 9), np.int64)
    with pytest.raises(EngineError, match=message):
        session.run(None, {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids})


def test_an_engine_that_is_none(exported: Path) -> None:
    with pytest.raises(EngineError, match="TensorRT does not load the engine:\nthe plan is no plan"):
        opened(exported / "model.onnx", SHORT, refuses="load")


# ---- where it runs


@pytest.fixture
def engines(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an engine of the stand-in, which is taken for the full TensorRT; and its GPU."""
    (tmp_path / "model.engine").write_bytes(b"plan")
    known = {
        "format": 1,
        "runtime": "tensorrt",
        "version": "10.9.0",
        "gpu": "NVIDIA L4",
        "capabilities": ["SM89"],
        "engines": {"model": {**entry(exported / "model.onnx", SHORT), "sha256": sha256(tmp_path / "model.engine")}},
    }
    (tmp_path / "engine.json").write_text(json.dumps(known))
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(exported / "model.onnx"))
    monkeypatch.setattr(module, "find_gpu", lambda device: Gpu("NVIDIA L4", "SM89"))

    def on_cpu(*args: Any, device: torch.device, **options: Any) -> EngineSession:
        assert device == torch.device("cuda", 0)
        return EngineSession(*args, device=CPU, **options)

    monkeypatch.setattr(module, "EngineSession", on_cpu)
    return tmp_path


def change(folder: Path, **known: Any) -> None:
    path = folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **known}))


def test_it_is_loaded_where_it_runs(engines: Path) -> None:
    ids = np.ones((2, 5), np.int64)
    feed = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    assert load_engine(engines).run(None, feed)[0].shape == (2, 2)
    assert load_engine(engines, "model").run(["logits"], feed)[0].dtype == np.float32


def test_it_is_loaded_nowhere_else(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"engine\.json does not exist: give a folder that build"):
        load_engine(engines / "none")
    with pytest.raises(ValueError, match=r"graph='encoder': .* holds model: name one of them"):
        load_engine(engines, "encoder")
    change(engines, version="10.8.1")
    with pytest.raises(EngineError, match=r"was built by tensorrt 10\.8\.1, and 10\.9\.0 is installed: engines run on"):
        load_engine(engines)
    change(engines, version="10.9.0", capabilities=["SM90"])
    with pytest.raises(EngineError, match="was built for SM90, and the NVIDIA L4 here is SM89: build it on this GPU"):
        load_engine(engines)
    change(engines, capabilities=["SM89"], gpu="NVIDIA L40S")
    with pytest.raises(EngineError, match="was built on a NVIDIA L40S, and a NVIDIA L4 is here: build it on this GPU"):
        load_engine(engines)
    change(engines, gpu="NVIDIA L4", format=2)
    with pytest.raises(EngineError, match="has the format 2, and 1 is read here: build it anew"):
        load_engine(engines)
    change(engines, format=1)
    load_engine(engines)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError, match=r"tensorrt is needed here .*lightning-ft\[tensorrt\]"):
        load_engine(engines)
    (engines / "model.engine").write_bytes(b"another")
    with pytest.raises(EngineError, match=r"model\.engine was changed since it was built: its SHA-256 is"):
        load_engine(engines)
    (engines / "model.engine").unlink()
    with pytest.raises(EngineError, match=r"model\.engine does not exist, and engine\.json names it"):
        load_engine(engines)


def test_rtx_runs_on_a_list_of_gpus() -> None:
    known = {"runtime": "tensorrt_rtx", "capabilities": ["SM86", "SM89"]}
    check_gpu(known, Gpu("GeForce RTX 4090", "SM89"))
    check_gpu(known, Gpu("GeForce RTX 3060", "SM86"))
    with pytest.raises(EngineError, match="for SM86, SM89, and the H100 here is SM90: build it with this one"):
        check_gpu(known, Gpu("H100", "SM90"))


def test_which_gpu_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no GPU with a driver is here, or this PyTorch was built without CUDA"):
        find_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert find_gpu() == Gpu("NVIDIA L4", "SM89")
    with pytest.raises(EngineError, match="device=1: there are 1 GPUs here, from 0 on"):
        find_gpu(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_driver(exported: Path, tmp_path: Path) -> None:
    """A real engine, of TensorRT for RTX."""
    build_tensorrt(exported, tmp_path / "out", profile=SHORT, runtime="tensorrt_rtx", capabilities=("SM89",))
    with pytest.raises(EngineError, match="no GPU with a driver is here"):
        load_engine(tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_engine_computes_what_its_graph_does(precision: Any, exported: Path, tmp_path: Path) -> None:
    texts = sentences(40)
    profiles = Profile.of(token_lengths(texts, exported), (1, 8), count=2, longest=64)
    build_tensorrt(exported, tmp_path / "out", precision=precision, profile=profiles)
    session = load_engine(tmp_path / "out", runtime_cache=tmp_path / "kernels")
    found = Predictor(tmp_path / "out", session=session, batch_size=8)(texts)
    wanted = Predictor(exported, batch_size=8)(texts)
    loose = {"fp32": 1e-3, "fp16": 2e-2}[precision]  # products of fp32 are TF32 where TensorRT finds that faster
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in wanted], atol=loose)
