"""Latency of a model, measured so that runtimes can be compared.

Never time PyTorch and ONNX Runtime in one process: the idle threads of one spin on the cores of the other, and
PyTorch was seen to need 540 ms for 6.7 ms of work.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Literal, get_args

Runtime = Literal["torch", "torch.compile", "torch bf16", "onnx"]
WARMUP = 5


class Stopwatch:
    """A model in a process of its own, which sleeps while another one is timed.

    Args:
        runtime: What runs the model.
        path: For ``"onnx"`` an exported folder or a file ``.onnx``; for the others a checkpoint of lightning_ft or a
            Hugging Face folder.
        task: Which head, of several.
        threads: Threads of the runtime.

    Raises:
        RuntimeError: The process failed; the message ends with what it printed.
    """

    def __init__(self, runtime: Runtime, path: str | os.PathLike[str], *, task: str = "", threads: int = 2) -> None:
        self.name = f"{path} with {runtime}"
        # A file, not a pipe: a pipe that no one reads fills up, and its writer waits for ever.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        command = [sys.executable, "-m", "lightning_ft.export.latency", runtime, os.fspath(path)]
        self._process = subprocess.Popen(
            [*command, "--task", task, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._read()
        self._pause(True)

    def measure(self, batch: int, length: int, repeats: int, *, warmup: int = WARMUP) -> list[float]:
        """Run a batch some times.

        Args:
            batch: Rows in it.
            length: Tokens in each row, without padding.
            repeats: Timed runs.
            warmup: Runs before them that are not timed.

        Returns:
            Milliseconds of each run.

        Raises:
            RuntimeError: The process failed.
        """
        asked = {"batch": batch, "length": length, "repeats": repeats, "warmup": warmup}
        self._pause(False)
        assert self._process.stdin is not None
        try:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()
        times: list[float] = self._read()
        self._pause(True)
        return times

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pause(self, stop: bool) -> None:
        if hasattr(signal, "SIGSTOP"):  # not on Windows, where idle threads may take something from the others
            self._process.send_signal(signal.SIGSTOP if stop else signal.SIGCONT)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-2000:]
        self.close()
        raise RuntimeError(f"timing {self.name} failed:\n{said}")


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
        folder: For ``"onnx"`` what :func:`lightning_ft.export.export_onnx` wrote, for the others a checkpoint of
            lightning_ft or a Hugging Face folder.
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
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime: expected one of {', '.join(get_args(Runtime))}, got {runtime!r}")
    settings = {"batch": batch, "length": length, "repeats": repeats, "threads": threads}
    check_positive(settings)
    with Stopwatch(runtime, folder, threads=threads) as watch:
        times = watch.measure(batch, length, repeats)
    return {
        "runtime": runtime,
        **settings,
        "median_ms": statistics.median(times),
        "p90_ms": sorted(times)[int(0.9 * len(times))],
        "min_ms": min(times),
    }


def check_positive(numbers: dict[str, int]) -> None:
    """Raise a ValueError that names the first number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
