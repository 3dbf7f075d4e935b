"""What runs the graph: the provider that was asked for, bound to the CPU's memory, or a session of someone else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import transformers as hf

from lightning_ft.export import Predictor
from lightning_ft.export.reading.graph import SLOW_FUSIONS
from lightning_ft.modules import SequenceClassification
from tests.export.served import TorchSession, serve
from tests.pretrained import pretrained

TEXTS = ["the film", "is good . it was great", "a"]


@pytest.fixture
def served(tmp_path: Path) -> tuple[Path, TorchSession]:
    path = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification, initializer_range=0.4)
    session = serve(SequenceClassification(path, ["no", "yes"]), tmp_path / "out")
    (tmp_path / "out" / "model.onnx").touch()
    return tmp_path / "out", session


class Binding:
    """As `onnxruntime.IOBinding`."""

    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: list[str] = []
        self.values: list[np.ndarray] = []

    def bind_cpu_input(self, name: str, values: np.ndarray) -> None:
        assert values.flags.c_contiguous
        self.inputs[name] = values

    def bind_output(self, name: str, device: str) -> None:
        assert device == "cpu"
        self.outputs.append(name)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return self.values


class Fake:
    """An `onnxruntime.InferenceSession` that says where it runs."""

    def __init__(self, inner: TorchSession, providers: list[str]) -> None:
        self.inner, self.providers, self.bound = inner, providers, 0
        self.get_inputs = inner.get_inputs

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, names: Any, feed: Any) -> list[np.ndarray]:
        return self.inner.run(names, feed)

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        self.bound += 1
        binding.values = self.inner.run(binding.outputs, binding.inputs)


@pytest.fixture
def opened(served: tuple[Path, TorchSession], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What was asked of an onnxruntime that knows GPUs and, unless told otherwise, has them."""
    asked: dict[str, Any] = {"used": None}

    def open_session(path: str, options: Any, *, providers: list[str], disabled_optimizers: list[str]) -> Fake:
        threads = options.intra_op_num_threads
        asked.update(path=path, providers=providers, off=disabled_optimizers, threads=threads)
        asked["session"] = Fake(served[1], asked["used"] or [*providers, "CPUExecutionProvider"])
        return asked["session"]  # type: ignore[no-any-return]

    known = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return asked


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_used_is_an_error(provider: str, served: tuple[Path, TorchSession], opened: Any) -> None:
    """ONNX Runtime takes the CPU in silence where the GPU's libraries cannot be loaded."""
    opened["used"] = ["CPUExecutionProvider"]
    with pytest.raises(RuntimeError, match=f"provider='{provider}' cannot run here: ONNX Runtime took CPUExecution"):
        Predictor(served[0], provider=provider)


@pytest.mark.parametrize(("provider", "binds"), [("cpu", False), ("cuda", True), ("tensorrt", True)])
def test_arrays_are_bound_where_there_is_a_device(
    provider: str, binds: bool, served: tuple[Path, TorchSession], opened: Any
) -> None:
    predict = Predictor(served[0], provider=provider, threads=3, batch_size=2)
    assert opened["path"] == str(served[0] / "model.onnx")
    assert opened["threads"] == 3
    assert opened["off"] == (SLOW_FUSIONS if provider == "cpu" else [])
    assert predict(TEXTS) == Predictor(served[0], session=served[1], batch_size=2)(TEXTS)
    assert opened["session"].bound == (2 if binds else 0)


def test_a_session_of_someone_elses(served: tuple[Path, TorchSession], tmp_path: Path) -> None:
    """No file of a graph is needed, and several are told apart by their names."""
    (served[0] / "model.onnx").unlink()
    found = Predictor(served[0], session=served[1])(TEXTS)
    assert found == Predictor(served[0], session={"model.onnx": served[1], "other.onnx": None})(TEXTS)
    with pytest.raises(ValueError, match=r"session: it has other\.onnx, and text-classification needs model\.onnx"):
        Predictor(served[0], session={"other.onnx": served[1]})
