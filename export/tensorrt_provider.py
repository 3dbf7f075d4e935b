"""Exported graphs on the TensorRT of ONNX Runtime: no engine to ship, but the first call of each shape builds one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.export.extras import require
from lightning_ft.export.graph_precision import check_precision
from lightning_ft.export.profiles import Profile, graph_axes

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TENSORRT, CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"


def tensorrt_options(
    path: str | os.PathLike[str],
    profile: Profile | Sequence[Profile] = (),
    *,
    cache: str | os.PathLike[str] | None = None,
    fp16: bool = False,
    device: int = 0,
    workspace: int | None = None,
) -> dict[str, str]:
    """Options of ONNX Runtime's TensorRT provider for a graph.

    Its TensorRT is version 10, whose networks are not strongly typed here: ``fp16`` lets it choose fp16 where that is
    faster, with no comparison. A graph that was exported in fp16 keeps to what passed the gate.

    Args:
        path: The graph.
        profile: The shapes to build for; several become one, tuned for what the last is tuned for. Without one, each
            shape that exceeds those seen builds the engine anew.
        cache: Folder for engines and timings, by default ``tensorrt_cache`` beside the graph: the next start is fast.
        fp16: Let an fp32 graph run in fp16.
        device: Number of the GPU.
        workspace: Bytes that a kernel may use while it runs.

    Returns:
        Strings, by the provider's names.

    Raises:
        ValueError: The graph is in a precision that TensorRT does not run, or an axis has no range.
    """
    path = Path(path)
    found = check_precision(path, None)
    place = path.parent / "tensorrt_cache" if cache is None else Path(cache)
    options = {
        "device_id": str(device),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(place),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(place),
        "trt_fp16_enable": str(int(fp16 or found == "fp16")),
        # Of scales in the graph, too: without it they are passed over.
        "trt_int8_enable": str(int(found == "int8-static")),
    }
    if workspace is not None:
        options["trt_max_workspace_size"] = str(workspace)
    profiles = [profile] if isinstance(profile, Profile) else list(profile)
    if profiles:
        axes = graph_axes(path)
        shapes = [one.shapes(axes) for one in profiles]
        # Of several profiles the provider would take the first for all shapes.
        for name, which, choose in (("min", 0, min), ("opt", 1, _last), ("max", 2, max)):
            sizes = {n: [choose(of) for of in zip(*(s[n][which] for s in shapes), strict=True)] for n in axes}
            parts = [f"{n}:{'x'.join(map(str, found))}" for n, found in sizes.items()]
            options[f"trt_profile_{name}_shapes"] = ",".join(parts)
    return options


def open_tensorrt(
    path: str | os.PathLike[str], options: Mapping[str, str] | None = None, *, whole: bool = True
) -> InferenceSession:
    """Open a graph on ONNX Runtime's TensorRT provider, or fail.

    Args:
        path: The graph.
        options: What :func:`tensorrt_options` gives; by default those without a profile.
        whole: Fail where a node of the graph would run on the CPU. CUDA may take what TensorRT does not.

    Returns:
        The session, for :class:`~lightning_ft.export.Predictor` and others.

    Raises:
        ImportError: onnxruntime is missing.
        RuntimeError: This onnxruntime has no such provider, or the provider did not start.
    """
    ort: Any = require("onnxruntime", extra="export-gpu")
    if TENSORRT not in (known := ort.get_available_providers()):
        raise RuntimeError(
            f"this onnxruntime has {', '.join(known)} and no {TENSORRT}: uninstall it, and install onnxruntime-gpu "
            'alone: pip install "lightning-ft[export-gpu]"'
        )
    given = dict(tensorrt_options(path) if options is None else options)
    Path(given["trt_engine_cache_path"]).mkdir(parents=True, exist_ok=True)
    settings = ort.SessionOptions()
    if whole:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    cuda = {"device_id": given["device_id"]}
    session = ort.InferenceSession(str(path), settings, providers=[(TENSORRT, given), (CUDA, cuda)])
    # A provider that does not start is left out with a line on standard error.
    if (used := session.get_providers())[0] != TENSORRT:
        raise RuntimeError(
            f"{TENSORRT} did not start, and ONNX Runtime took {used[0]}: it needs an NVIDIA driver, CUDA and "
            "libnvinfer 10 on the library path"
        )
    session.disable_fallback()  # else an error in a call opens the graph anew, without TensorRT
    return session


def _last(sizes: Sequence[int]) -> int:
    return sizes[-1]
