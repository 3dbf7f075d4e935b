"""Training on a GPU: tokens a second, MFU and peak memory, beside the Hugging Face Trainer. Under 8 minutes.

    python benchmarks/gpu/training.py          # needs an NVIDIA GPU, accelerate, and bitsandbytes for the 8 and 4 bits
    python benchmarks/gpu/training.py --dry    # says what would be run; needs no GPU

It has not been run on a GPU by those who wrote it: the machines it was written on have none. What runs without one is
tested (`--dry`, and `--quick --device cpu`, whose figures mean nothing).

A classifier of BERT-base's size and a decoder of Llama 1B's, with random weights, on random tokens in rows of full
length that lie on the GPU: only training is timed. Ours is Lightning's Trainer with our modules, plugins and callbacks.
Theirs is `transformers.Trainer` on the same model, with the same batches, precision, fused AdamW (or bitsandbytes'
8-bit one), constant rate and clipping at 1.0; its check of every loss for NaN, which waits for the GPU, is off.
Quantised, ours is our plugin on fp32 weights, theirs what `BitsAndBytesConfig` loads from a folder; both have the same
LoRA on all linear layers, and recompute no activations.

All contestants of a model run in one process, one after the other, round after round until the time is used up; each is
built anew and freed before the next one. A pass is a few steps of warm-up, a guess of how many steps fill a segment,
and five segments; the GPU is waited for at the ends of segments alone. The figure is the median of the segments of all
rounds. The first contestant runs again in each round, after its rival: how much its two figures differ is the noise
(A/A), and a ratio within it is no difference. What does not fit into `--seconds` is left out, and said. A variant that
cannot run is a row with its reason.

MFU is the model's FLOPs (`_flops.py`: 6·N + 3·A a token; 4·N + 6·N_lora + 3·A where the base is frozen) over the dense
peak of the GPU in the data type of the products: of its data sheet, by its name, and left empty where `_flops.py` does
not know it. int8 and 4 bits are held against the peak of bf16, which their gradients are computed in. Peak memory is
`torch.cuda.max_memory_allocated` after the warm-up; that of building and warm-up is in the JSON file (ours is built in
fp32 on the GPU here, and quantised there).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from _training_plan import MODELS, QUICK, THEIRS, VARIANTS, Model, Variant, describe, order, title
from _training_table import Row, markdown, row

WORKER = Path(__file__).with_name("_training_worker.py")
RESULTS = Path(__file__).parents[1] / "results" / "gpu"
NO_TIME, NO_GPU = "left out: no time", "not run: it needs a GPU"
PACKAGES = ("torch", "lightning", "transformers", "accelerate", "peft", "bitsandbytes", "flash-attn", "triton")
GPU = """
import json, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps(gpu and {"GPU": gpu.name, "SM": f"{gpu.major}{gpu.minor}", "CUDA": torch.version.cuda}))
"""


def main() -> None:
    """Plan, or run and publish."""
    options = _arguments()
    models = {name: m for name, m in (QUICK if options.quick else MODELS).items() if name in (options.models or [name])}
    variants = [variant for variant in VARIANTS if variant.name in (options.variants or [variant.name])]
    if not (models and variants):
        sys.exit(f"nothing to run: --models of {[*MODELS]}, --variants of {[variant.name for variant in VARIANTS]}")
    print(describe(models, variants, options.rounds, options.seconds), flush=True)
    if options.dry:
        return
    deadline = time.time() + options.seconds
    machine = _machine(options.device)
    rows: list[Row] = []
    shares = sum(model.share for model in models.values())
    for name, model in models.items():
        # What a model leaves of its share goes to those after it.
        until = time.time() + (deadline - time.time()) * model.share / shares
        shares -= model.share
        rows += [{"model": name, **one} for one in _run(name, model, variants, options, until, machine.get("GPU", ""))]
        _publish(rows, machine, options)
    print((options.results / "training.md").read_text(encoding="utf-8"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training on a GPU, beside the Hugging Face Trainer.")
    parser.add_argument("--dry", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--seconds", type=int, default=450, help="time for everything (450)")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each contestant, at most (5)")
    parser.add_argument("--models", nargs="+", help="by default all")
    parser.add_argument("--variants", nargs="+", help="by default all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this file alone")
    parser.add_argument("--quick", action="store_true", help="tiny models, two short segments: figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of training.json and training.md")
    return parser.parse_args()


# ---- one model


def _run(
    name: str, model: Model, variants: list[Variant], options: argparse.Namespace, until: float, gpu: str
) -> list[Row]:
    """Rows of one model. A process that dies is begun anew, without the contestant that it died of."""
    contestants = order(variants)
    passes: list[list[Row]] = [[] for _ in contestants]
    reasons = {n: NO_GPU for n, (v, _) in enumerate(contestants) if options.device == "cpu" and v.needs_gpu}
    with tempfile.TemporaryDirectory() as folder:
        while todo := [number for number in range(len(contestants)) if number not in reasons]:
            running, ended = todo, ""
            for told in _lines(_settings(model, contestants, todo, options, until, folder), until):
                if "begins" in told:
                    running = [told["begins"]]
                    continue
                print(f"{name}, {'; '.join(title(contestants[number]) for number in running)}: {told}", flush=True)
                if "ended" in told:
                    ended = told["ended"]
                elif "error" in told:
                    reasons[told["contestant"]] = told["error"]
                else:
                    passes[told["contestant"]].append(told)
            if not ended:
                break
            reasons = {**dict.fromkeys(running, ended), **reasons}
    return [
        row(*contestant, model, found, reasons.get(number, NO_TIME), gpu)
        for number, (contestant, found) in enumerate(zip(contestants, passes, strict=True))
    ]


def _settings(
    model: Model,
    contestants: list[tuple[Variant, str]],
    todo: list[int],
    options: argparse.Namespace,
    until: float,
    folder: str,
) -> dict[str, Any]:
    return {
        "config": model.config,
        "rows": model.rows,
        "length": model.length,
        "contestants": [(n, contestants[n][0]._asdict(), contestants[n][1] == THEIRS) for n in todo],
        "device": options.device,
        "rounds": options.rounds,
        "segments": 2 if options.quick else 5,
        "seconds": 0.0 if options.quick else 0.25,
        "until": until - 2,
        "folder": folder,
    }


def _lines(settings: dict[str, Any], until: float) -> Iterator[dict[str, Any]]:
    """What a process of the worker says; at last ``{"ended": why}`` where it did not come to its end."""
    left = until - time.time()
    if left < 5:
        yield {"ended": NO_TIME}
        return
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(WORKER), json.dumps(settings)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        timer = threading.Timer(left, process.kill)
        timer.start()
        assert process.stdout is not None
        try:
            # Whatever else a library prints there is not ours.
            yield from (json.loads(line) for line in process.stdout if line.startswith('{"'))
        finally:
            timer.cancel()
            process.kill()
            status = process.wait()
        if time.time() >= until:
            yield {"ended": NO_TIME}
        elif status:
            errors.seek(0)
            yield {"ended": (errors.read().strip().splitlines() or [f"exit status {status}"])[-1][:300]}


# ---- what is written


def _machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {}
    if device == "cuda":
        done = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if not found:
            sys.exit("no GPU, or a PyTorch without CUDA; --dry says what would be run")
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _publish(rows: list[Row], machine: dict[str, Any], options: argparse.Namespace) -> None:
    content = {"date": date.today().isoformat(), "machine": machine, "device": options.device, "rows": rows}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "training.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = markdown(rows, f"Training: tokens a second, MFU and peak memory. {content['date']}, {where}.")
    (options.results / "training.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
