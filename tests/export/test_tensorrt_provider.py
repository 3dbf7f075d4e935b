"""Options of ONNX Runtime's TensorRT provider; and no figure, no answer of another provider in its place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from lightning_ft.export.profiles import Profile
from lightning_ft.export.quantize import quantize
from lightning_ft.export.static_quantize import calibrate
from lightning_ft.export.tensorrt_provider import open_tensorrt, tensorrt_options
from tests.export.test_static_quantize import batches, graph

PROFILES = Profile.of([3, 9, 17], (1, 8), count=2, longest=24, others={"rows": (1, 2, 64)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return graph(tmp_path, ("MatMul", "x square", "y"))


def test_options(path: Path, tmp_path: Path) -> None:
    found = tensorrt_options(path)
    assert found == {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path / "tensorrt_cache"),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(tmp_path / "tensorrt_cache"),
        "trt_fp16_enable": "0",
        "trt_int8_enable": "0",
    }
    profiles = [Profile({"rows": (1, 1, 4)}), Profile({"rows": (5, 32, 64)})]
    found = tensorrt_options(path, profiles, cache=tmp_path / "c", fp16=True, device=1, workspace=1 << 30)
    assert found["trt_profile_min_shapes"] == "x:1x6"
    assert found["trt_profile_opt_shapes"] == "x:32x6"
    assert found["trt_profile_max_shapes"] == "x:64x6"
    assert found["trt_engine_cache_path"] == str(tmp_path / "c")
    assert (found["trt_fp16_enable"], found["device_id"], found["trt_max_workspace_size"]) == ("1", "1", "1073741824")
    assert tensorrt_options(path, PROFILES)["trt_profile_max_shapes"] == "x:64x6"


def test_precisions(path: Path, tmp_path: Path) -> None:
    ranges = calibrate(path, batches(4))
    for precision in ("fp16", "int8-static", "int8"):
        quantize(path, tmp_path / f"{precision}.onnx", precision, ranges=ranges)  # type: ignore[arg-type]
    assert tensorrt_options(tmp_path / "fp16.onnx")["trt_fp16_enable"] == "1"
    assert tensorrt_options(tmp_path / "int8-static.onnx")["trt_int8_enable"] == "1"
    with pytest.raises(ValueError, match=r"is in int8 whose scales follow the input .*: export it in int8-static"):
        tensorrt_options(tmp_path / "int8.onnx")


def test_none_is_no_other(path: Path) -> None:
    with pytest.raises(RuntimeError, match="and no TensorrtExecutionProvider: uninstall it, and install"):
        open_tensorrt(path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An onnxruntime-gpu that starts the providers in ``starts``, and says nothing of the others: as the real one."""
    made = SimpleNamespace(starts=["TensorrtExecutionProvider", "CUDAExecutionProvider"], given=None, fallback=True)

    def session(path: str, settings: Any, providers: Any) -> Any:
        made.given = providers
        made.whole = settings.get_session_config_entry("session.disable_cpu_ep_fallback")
        return SimpleNamespace(
            get_providers=lambda: [*made.starts, "CPUExecutionProvider"],
            disable_fallback=lambda: setattr(made, "fallback", False),
        )

    fake = SimpleNamespace(
        get_available_providers=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=session,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return made


def test_it_is_the_one_that_runs(gpu: SimpleNamespace, path: Path, tmp_path: Path) -> None:
    open_tensorrt(path)
    (first, options), (second, _) = gpu.given
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options["trt_engine_cache_enable"] == "1"
    assert (tmp_path / "tensorrt_cache").is_dir()
    assert gpu.whole == "1"
    assert not gpu.fallback
    for starts in (["CUDAExecutionProvider"], []):
        gpu.starts = starts
        with pytest.raises(RuntimeError, match="TensorrtExecutionProvider did not start, and ONNX Runtime took C"):
            open_tensorrt(path)
