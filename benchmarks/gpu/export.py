"""Latency of exported encoders on a GPU: PyTorch, ONNX Runtime (CUDA, TensorRT) and TensorRT engines. Under 8 minutes.

    python benchmarks/gpu/export.py            # needs an NVIDIA GPU, onnxruntime-gpu, and tensorrt or tensorrt-rtx-cu13
    python benchmarks/gpu/export.py --dry      # says what would be run; needs no GPU

It has not been run on a GPU by those who wrote it: the machines it was written on have none. What runs without one is
tested (`--dry`, and `--quick --device cpu`, whose figures mean nothing).

Two classifiers with random weights, of the sizes of MiniLM-L6 and of BERT-base. A call is timed from arrays of tokens
on the host to an array of logits on the host, as a server makes it. Each variant runs in a process of its own (PyTorch
and ONNX Runtime disturb each other in one), all variants in turn, round after round, so that a clock that falls falls
for all; the first one runs twice in each round, and how much its two figures differ is the noise (A/A). What does not
fit into `--seconds` is left out, and said. A variant that cannot run is a row with its reason, never a figure of
another provider: `session.get_providers()` is asserted. All of TensorRT have one profile, to the largest shape, tuned
for 8x128.

Weights are random, so nothing here is about accuracy: that is the gate's affair, on real data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

WORKER = Path(__file__).with_name("_export_worker.py")
RESULTS = Path(__file__).parents[1] / "results" / "gpu"
AGAIN = " (again)"
LIMITS = {"build": 60, "time": 150}


class Variant(NamedTuple):
    """What is timed: a runtime, and the precision of its graph."""

    name: str
    runtime: str
    precision: str


VARIANTS = (
    Variant("PyTorch eager, fp32", "torch", "fp32"),
    Variant("PyTorch eager, fp16", "torch", "fp16"),
    Variant("torch.compile, fp16", "compile", "fp16"),
    Variant("ONNX Runtime CUDA, fp32", "cuda", "fp32"),
    Variant("ONNX Runtime CUDA, fp16", "cuda", "fp16"),
    Variant("ONNX Runtime TensorRT, fp16", "ort-tensorrt", "fp16"),
    Variant("ONNX Runtime TensorRT, int8", "ort-tensorrt", "int8-static"),
    Variant("TensorRT engine, fp32", "engine", "fp32"),
    Variant("TensorRT engine, fp16", "engine", "fp16"),
    Variant("TensorRT engine, int8", "engine", "int8-static"),
)

USUAL = {"num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512}
MODELS = {
    "MiniLM-L6": {**USUAL, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "BERT-base": {**USUAL, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
TINY = {**USUAL, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 100}
SHAPES = ((1, 32), (1, 128), (8, 128), (32, 128))


def main() -> None:
    """Plan, or prepare, run and publish."""
    options = _arguments()
    models = {"tiny": TINY} if options.quick else MODELS
    shapes = SHAPES[:1] if options.quick else SHAPES
    plan = _plan(models, shapes, options)
    print(plan)
    if options.dry:
        return
    deadline = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (model, config) in enumerate(models.items()):
            # Each model gets its share: the larger one is not squeezed out by the smaller.
            until = deadline - (len(models) - 1 - number) * options.seconds / len(models)
            rows += _run(model, config, shapes, Path(folder) / model, options, until)
    _publish(rows, options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency of exported encoders on a GPU.")
    parser.add_argument("--dry", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--seconds", type=int, default=450, help="time for everything (450)")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each variant, at most (3)")
    parser.add_argument("--repeats", type=int, default=100, help="timed calls for each shape in a process (100)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this file alone")
    parser.add_argument("--quick", action="store_true", help="one tiny model, one shape: figures mean nothing")
    parser.add_argument("--runtime", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of export.json and export.md")
    return parser.parse_args()


def _plan(models: dict[str, Any], shapes: tuple[tuple[int, int], ...], options: argparse.Namespace) -> str:
    lines = [
        f"{len(models)} models, {len(VARIANTS)} variants, at most {options.rounds} rounds, {options.seconds} s in all"
    ]
    sizes = ", ".join(f"{batch}x{length}" for batch, length in shapes)
    for model in models:
        lines.append(f"{model}, {sizes}:")
        lines += [f"  {variant.name}" for variant in _round()]
    return "\n".join(lines)


def _round() -> tuple[Variant, ...]:
    first = VARIANTS[0]
    return (*VARIANTS, first._replace(name=first.name + AGAIN))


# ---- one model


def _run(
    model: str,
    config: dict[str, int],
    shapes: tuple[tuple[int, int], ...],
    folder: Path,
    options: argparse.Namespace,
    until: float,
) -> list[dict[str, Any]]:
    """Rows of one model."""
    reasons = _prepare(config, shapes, folder, options, until)
    seen: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in _round()}
    for _ in range(options.rounds):
        for variant in _round():
            if variant.name in reasons:
                continue
            settings = {"shapes": shapes, "repeats": options.repeats, "device": options.device, **variant._asdict()}
            found = _call("time", folder, until, settings)
            if "error" not in found:
                seen[variant.name].append(found)
            elif not seen[variant.name]:
                reasons[variant.name] = found["error"]
            print(f"{model}, {variant.name}: {found}", flush=True)
    return [
        _row(model, variant.name, f"{batch}x{length}", seen[variant.name], reasons.get(variant.name, ""))
        for batch, length in shapes
        for variant in _round()
    ]


def _prepare(
    config: dict[str, int],
    shapes: tuple[tuple[int, int], ...],
    folder: Path,
    options: argparse.Namespace,
    until: float,
) -> dict[str, str]:
    """Why a variant cannot run, by its name."""
    made = _call("prepare", folder, until, {"config": config, "shapes": shapes})
    if "error" in made:
        return dict.fromkeys((variant.name for variant in _round()), made["error"])
    if options.device == "cpu":
        able = ("torch", "fp32")
        return {v.name: "not run: it needs a GPU" for v in VARIANTS if (v.runtime, v.precision) != able}
    reasons = {}
    for variant in VARIANTS:
        if variant.runtime == "engine":
            wanted = {"precision": variant.precision, "shapes": shapes, "runtime": options.runtime}
            if "error" in (built := _call("build", folder, until, wanted)):
                reasons[variant.name] = built["error"]
    return reasons


def _row(model: str, variant: str, shape: str, found: list[dict[str, float]], reason: str) -> dict[str, Any]:
    times = [one[shape] for one in found]
    return {
        "model": model,
        "shape": shape,
        "variant": variant,
        "median_ms": median(times) if times else None,
        "rounds_ms": times,
        "not run": "" if times else reason,
    }


def _call(what: str, folder: Path, until: float, settings: dict[str, Any]) -> dict[str, Any]:
    """What a process of the worker prints, or ``{"error": …}``."""
    left = until - time.monotonic()
    if left < 5:
        return {"error": "left out: no time"}
    command = [sys.executable, str(WORKER), what, str(folder), json.dumps(settings)]
    try:
        limit = min(left, LIMITS.get(what, left))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        return {"error": f"stopped after {error.timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- what is written


def _publish(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    machine = _call("machine", Path(), time.monotonic() + 60, {})
    content = {"date": date.today().isoformat(), "machine": machine, "device": options.device, "rows": rows}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "export.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = _markdown(rows, f"{content['date']}, {', '.join(f'{name} {value}' for name, value in machine.items())}")
    (options.results / "export.md").write_text(text, encoding="utf-8")
    print(text)


def _markdown(rows: list[dict[str, Any]], title: str) -> str:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = [f"Latency in ms (times as fast as the first row). {title}", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [f"**{model}**", "", f"| variant | {' | '.join(shapes)} |", f"|---|{'---|' * len(shapes)}"]
        mine = {(row["variant"], row["shape"]): row for row in rows if row["model"] == model}
        for variant in dict.fromkeys(name for name, _ in mine):
            cells = [_cell(mine[variant, shape], mine[VARIANTS[0].name, shape]) for shape in shapes]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any], first: dict[str, Any]) -> str:
    if row["median_ms"] is None:
        return str(row["not run"]).replace("|", "/")
    times = f" ({first['median_ms'] / row['median_ms']:.1f})" if first["median_ms"] else ""
    return f"{row['median_ms']:.2f}{times}"


if __name__ == "__main__":
    main()
