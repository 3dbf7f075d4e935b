"""Latency of a model, measured so that runtimes can be compared.

Never time PyTorch and ONNX Runtime in one process: the idle threads of one spin on the cores of the other, and
PyTorch was seen to need 540 ms for 6.7 ms of work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Literal, get_args

Runtime = Literal["torch", "onnx"]
TokenRuntime = Literal["torch", "torch-bf16", "onnx", "genai"]


def measure_latency(
    folder: str | os.PathLike[str],
    runtime: Runtime,
    *,
    batch: int = 1,
    length: int = 32,
    repeats: int = 50,
    threads: int = 2,
) -> dict[str, Any]:
    """Time a model in a fresh process.

    Args:
        folder: For ``"onnx"`` what :func:`lightning_ft.export.export_onnx` wrote, for ``"torch"`` what a classifier's
            ``save_pretrained`` wrote.
        runtime: What runs the model.
        batch: Rows in the batch.
        length: Tokens in each row, without padding.
        repeats: Timed runs, after five that are not.
        threads: Threads of the runtime.

    Returns:
        The settings, and ``median_ms``, ``p90_ms`` and ``min_ms``.

    Raises:
        RuntimeError: The process failed; the message ends with what it printed.
        ValueError: An argument is not one of those allowed.
    """
    settings = {"batch": batch, "length": length, "repeats": repeats, "threads": threads}
    return _run("latency", folder, runtime, get_args(Runtime), settings)


def measure_tokens(
    folder: str | os.PathLike[str], runtime: TokenRuntime, *, prompt: int = 32, tokens: int = 64, threads: int = 2
) -> dict[str, Any]:
    """Time the greedy tokens that a decoder writes for one prompt, in a fresh process.

    Args:
        folder: For ``"onnx"`` what :func:`lightning_ft.export.export_onnx` wrote, for ``"genai"`` what
            :func:`lightning_ft.export.export_genai` wrote, for ``"torch"`` and ``"torch-bf16"`` what a decoder's
            ``save_pretrained`` wrote.
        runtime: What runs the model; ``"torch"`` is ``generate``.
        prompt: Tokens in the prompt.
        tokens: Tokens that are written, whatever they are.
        threads: Threads of the runtime.

    Returns:
        The settings; ``first_ms``, of the prompt and the first token; ``median_ms``, ``mean_ms`` and ``min_ms`` of each
        that follows.

    Raises:
        RuntimeError: The process failed; the message ends with what it printed.
        ValueError: An argument is not one of those allowed.
    """
    settings = {"prompt": prompt, "tokens": tokens, "threads": threads}
    return _run("token_latency", folder, runtime, get_args(TokenRuntime), settings)


def _run(
    module: str, folder: str | os.PathLike[str], runtime: str, known: tuple[str, ...], settings: dict[str, int]
) -> dict[str, Any]:
    if runtime not in known:
        raise ValueError(f"runtime: expected one of {', '.join(known)}, got {runtime!r}")
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", f"lightning_ft.export.{module}", os.fspath(folder), "--runtime", runtime, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"timing {folder} with {runtime} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
