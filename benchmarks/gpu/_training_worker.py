"""What training.py runs in a process of its own: passes of contestants, each of which is a line of JSON."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _training_contestants import train_ours, train_theirs
from _training_plan import Variant
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WARMUP, GUESS = 5, 2
LEAST = 5.0  # seconds that must be left for what has not run yet
GIB = 2**30
BATCHES = 4


class Clock:
    """Seconds of a step in each segment; the device is waited for at the ends of segments alone.

    Building and warm-up have a peak of memory of their own, ``start_peak``.

    Args:
        device: cuda or cpu.
        segments: How many are timed.
        seconds: About how long one is.
        until: When there is no more time.
    """

    def __init__(self, device: str, segments: int, seconds: float, until: float) -> None:
        self.warmup = 0.0
        self.start_peak: float | None = None
        self.steps: list[float] = []
        self._device = device
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._segments, self._seconds, self._until = segments, seconds, until
        self._taken, self._size, self._ended, self._stamp = 0, WARMUP, 0, time.perf_counter()

    def __call__(self) -> bool:
        """Call after each optimiser step; says whether that was the last one."""
        self._taken += 1
        if self._taken < self._size:
            return False
        self._wait()
        now = time.perf_counter()
        took, step = now - self._stamp, (now - self._stamp) / self._taken
        self._taken, self._stamp, self._ended = 0, now, self._ended + 1
        if self._ended == 1:
            self.warmup, self._size, self.start_peak = took, GUESS, _peak(self._device)
        elif self._ended == 2:
            self._size = max(1, min(500, round(self._seconds / step)))
        else:
            self.steps.append(step)
        return len(self.steps) == self._segments or time.time() > self._until


def main(settings: dict[str, Any]) -> None:
    """Rounds of passes, as long as there is time."""
    _quieten()
    lost: set[int] = set()
    took: dict[int, float] = {}
    for _ in range(settings["rounds"]):
        for number, variant, is_theirs in settings["contestants"]:
            if number in lost or time.time() + took.get(number, LEAST) > settings["until"]:
                continue
            began = time.time()
            _tell({"begins": number})
            try:
                found = run(Variant(**variant), is_theirs, settings)
            except Exception as error:
                lost.add(number)
                _tell({"contestant": number, "error": _reason(error)})
                if "CUDA error" in str(error):
                    raise  # nothing more can be run in this process
            else:
                _tell({"contestant": number, **found})
            took[number] = time.time() - began


def run(variant: Variant, is_theirs: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """One pass."""
    device = settings["device"]
    held = _free(device)
    # Of the matrix products alone; the rival's own switch is left alone, and `torch.compile` in it turns another one.
    torch.set_float32_matmul_precision("high" if variant.precision == "tf32" else "highest")
    batches = _batches(settings["config"], settings["rows"], settings["length"], device)
    clock = Clock(device, settings["segments"], settings["seconds"], settings["until"])
    kernel: AbstractContextManager[Any] = nullcontext()
    if variant.attention == "flash":
        kernel = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    with kernel:
        if is_theirs:
            loss, trained = train_theirs(variant, settings, batches, clock, Path(settings["folder"]))
        else:
            loss, trained = train_ours(variant, settings, batches, clock)
    if not clock.steps:
        raise TimeoutError("left out: no time")
    if not math.isfinite(loss):
        raise ArithmeticError(f"its loss was {loss}")
    return {
        "steps": clock.steps,
        "warmup_s": clock.warmup,
        "peak_gib": _peak(device),
        "start_peak_gib": clock.start_peak,
        "held_before_gib": held,
        "loss": loss,
        "trained": trained,
    }


def _batches(config: dict[str, Any], rows: int, length: int, device: str) -> list[dict[str, Tensor]]:
    """Random tokens, none of them padding."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for _ in range(BATCHES):
        ids = torch.randint(2, config["vocab_size"], (rows, length), generator=generator, device=device)
        classes = torch.randint(2, (rows,), generator=generator, device=device)
        found.append({"input_ids": ids, "labels": ids if config["decoder"] else classes})
    return found


def _peak(device: str) -> float | None:
    """GiB at most since the last call."""
    if device != "cuda":
        return None
    found = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return found


def _free(device: str) -> float | None:
    """Nothing stays of the contestant before; GiB that are held all the same."""
    from accelerate.state import AcceleratorState

    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    if "bitsandbytes" in sys.modules:
        # The HF Trainer asks here for 32 bits for its embeddings; by their numbers, so that others would get them, too.
        sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()
    gc.collect()
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / GIB


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _quieten() -> None:
    import transformers

    warnings.filterwarnings("ignore")
    for noisy in ("lightning.pytorch", "lightning.fabric", "transformers", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
