"""How long one batch takes, in a process of its own: ``python -m lightning_ft.export.latency FOLDER --runtime onnx``.

:func:`lightning_ft.export.measure_latency` runs this module and reads its line of JSON. It stays out of the package's
``__init__``, since running a module that its own package has imported draws a warning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch

from lightning_ft.export.parity import load_session
from lightning_ft.export.timing import Runtime

WARMUP = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Time one runtime in this process and print one line of JSON."""
    parser = argparse.ArgumentParser(description="Time one batch of a model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", choices=get_args(Runtime), required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    vocabulary = json.loads((chosen.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    ids = torch.randint(vocabulary, (chosen.batch, chosen.length), generator=torch.Generator().manual_seed(0))
    prepare = _torch_step if chosen.runtime == "torch" else _onnx_step
    times = _time(prepare(chosen.folder, ids, chosen.threads), chosen.repeats)
    print(
        json.dumps(
            {
                "runtime": chosen.runtime,
                "batch": chosen.batch,
                "length": chosen.length,
                "repeats": chosen.repeats,
                "threads": chosen.threads,
                "median_ms": statistics.median(times),
                "p90_ms": sorted(times)[int(0.9 * len(times))],
                "min_ms": min(times),
            }
        )
    )


def _torch_step(folder: Path, ids: torch.Tensor, threads: int) -> Callable[[], object]:
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    mask = torch.ones_like(ids)

    def step() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)

    return step


def _onnx_step(folder: Path, ids: torch.Tensor, threads: int) -> Callable[[], object]:
    session = load_session(folder, threads=threads)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    feed = {entry.name: values[entry.name].numpy() for entry in session.get_inputs()}
    return lambda: session.run(None, feed)


def _time(step: Callable[[], object], repeats: int) -> list[float]:
    for _ in range(WARMUP):
        step()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return times


if __name__ == "__main__":
    main()
