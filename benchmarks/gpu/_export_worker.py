"""What export.py runs in processes of their own, each of which prints a line of JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

WARMUP = 10
CALIBRATION = 4


def prepare(folder: Path, config: dict[str, int], shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """The graphs."""
    from lightning_ft.export import export_onnx
    from lightning_ft.export.quantize import quantize
    from lightning_ft.export.static_quantize import calibrate

    torch.manual_seed(0)
    model, tokenizer = _model(config), _tokenizer()
    model.save_pretrained(folder / "hf")
    export_onnx(model, folder / "fp32", tokenizer=tokenizer, max_length=max(length for _, length in shapes))
    source = folder / "fp32" / "model.onnx"
    generator = np.random.default_rng(0)
    sizes = [shapes[i % len(shapes)] for i in range(CALIBRATION)]
    ranges = calibrate(source, [_feed(generator, size, config["vocab_size"]) for size in sizes])
    for precision in ("fp16", "int8-static"):
        (folder / precision).mkdir()
        quantize(source, folder / precision / "model.onnx", precision, ranges=ranges)  # type: ignore[arg-type]
    return {}


def build(folder: Path, precision: str, shapes: list[tuple[int, int]], runtime: str) -> dict[str, Any]:
    """An engine, for the GPU that is here."""
    from lightning_ft.export.engine import find_gpu
    from lightning_ft.export.tensorrt import build_tensorrt, find_runtime

    name, _ = find_runtime(runtime)  # type: ignore[arg-type]
    capabilities = (find_gpu().capability,) if name == "tensorrt_rtx" else ()
    build_tensorrt(
        folder / precision,
        folder / f"engine-{precision}",
        profile=_profile(shapes),
        runtime=name,  # type: ignore[arg-type]
        capabilities=capabilities,
    )
    return {}


def _profile(shapes: list[tuple[int, int]]) -> Any:
    """One for all shapes: ONNX Runtime's provider knows no other."""
    from lightning_ft.export.profiles import Profile

    batch, length = (max(sizes) for sizes in zip(*shapes, strict=True))
    return Profile({"batch": (1, min(8, batch), batch), "sequence": (1, length, length)})


def _model(config: dict[str, int]) -> Any:
    from transformers import AutoModelForSequenceClassification, BertConfig

    return AutoModelForSequenceClassification.from_config(BertConfig(**config, pad_token_id=1)).eval()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, 100)}}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
    )


def _feed(generator: np.random.Generator, shape: tuple[int, int], words: int) -> dict[str, np.ndarray[Any, Any]]:
    ids = generator.integers(2, words, tuple(shape))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


# ---- timing


def measure(
    folder: Path, name: str, runtime: str, precision: str, shapes: list[tuple[int, int]], repeats: int, device: str
) -> dict[str, float]:
    """The median of the calls in ms, by shape."""
    step = {"torch": _torch, "compile": _torch, "cuda": _cuda, "ort-tensorrt": _ort_tensorrt, "engine": _engine}[
        runtime
    ]
    call = step(folder, runtime, precision, device, shapes)
    words = json.loads((folder / "hf" / "config.json").read_text())["vocab_size"]
    generator, found = np.random.default_rng(0), {}
    for batch, length in shapes:
        feed = _feed(generator, (batch, length), words)
        for _ in range(WARMUP):
            logits = call(feed)
        assert logits.shape[0] == batch, f"{name}: {logits.shape}"
        assert np.isfinite(logits).all(), f"{name}: not finite"
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            call(feed)  # its result is on the host: nothing is left running
            times.append(1e3 * (time.perf_counter() - started))
        found[f"{batch}x{length}"] = median(times)
    return found


Call = Callable[[dict[str, Any]], "np.ndarray[Any, Any]"]


def _torch(folder: Path, runtime: str, precision: str, device: str, shapes: list[tuple[int, int]]) -> Call:
    from transformers import AutoModelForSequenceClassification

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("not run: no GPU, or a PyTorch without CUDA")
    kind = torch.float16 if precision == "fp16" else torch.float32
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "hf", dtype=kind).eval().to(device)
    if runtime == "compile":
        model = torch.compile(model)

    def call(feed: dict[str, Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            inputs = {n: torch.from_numpy(value).to(device, non_blocking=True) for n, value in feed.items()}
            found: np.ndarray[Any, Any] = model(**inputs).logits.float().cpu().numpy()
            return found

    return call


def _cuda(folder: Path, runtime: str, precision: str, device: str, shapes: list[tuple[int, int]]) -> Call:
    import onnxruntime as ort

    wanted = "CUDAExecutionProvider"
    session = ort.InferenceSession(str(folder / precision / "model.onnx"), providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise SystemExit(f"not run: ONNX Runtime took {session.get_providers()[0]}")
    return lambda feed: session.run(["logits"], feed)[0]


def _ort_tensorrt(folder: Path, runtime: str, precision: str, device: str, shapes: list[tuple[int, int]]) -> Call:
    from lightning_ft.export.tensorrt_provider import open_tensorrt, tensorrt_options

    path = folder / precision / "model.onnx"
    session = open_tensorrt(path, tensorrt_options(path, _profile(shapes)))
    return lambda feed: session.run(["logits"], feed)[0]


def _engine(folder: Path, runtime: str, precision: str, device: str, shapes: list[tuple[int, int]]) -> Call:
    from lightning_ft.export.engine import load_engine

    session = load_engine(folder / f"engine-{precision}", runtime_cache=folder / f"kernels-{precision}")
    return lambda feed: session.run(["logits"], feed)[0]


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"GPU": gpu.name, "SM": f"{gpu.major}{gpu.minor}", "CUDA": torch.version.cuda}
    for package in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    work = {"prepare": prepare, "build": build, "time": measure}
    what, place, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    print(json.dumps(machine() if what == "machine" else work[what](place, **settings)))  # type: ignore[operator]
