"""Training on a GPU: tokens a second, MFU and peak memory, beside the Hugging Face Trainer. Under 8 minutes.

    python benchmarks/gpu/training.py          # needs an NVIDIA GPU, accelerate, and bitsandbytes for the 8 and 4 bits
    python benchmarks/gpu/training.py --dry    # says what would be run; needs no GPU

It has not been run on a GPU by those who wrote it: the machines it was written on have none. What runs without one is
tested (`--dry`, and `--quick --device cpu`, whose figures mean nothing).

A classifier of BERT-base's size and a decoder of Llama 1B's, with random weights, on random tokens in rows of full
length that lie on the GPU: only training is timed. Ours is Lightning's Trainer with our modules, plugins and callbacks;
theirs is `transformers.Trainer` on the same model with the same batches, fused AdamW (or bitsandbytes' 8-bit one), clipping
at 1.0, constant rate and precision; its check of every loss for NaN, which waits for the GPU, is off. Quantised, ours is
our plugin on fp32 weights, theirs what `BitsAndBytesConfig` loads from a folder; both have the same LoRA on all linear
layers, and recompute no activations.

All contestants of a model run in one process, one after the other, round after round until the time is used up; each is
built anew and freed before the next one. A pass is a few steps of warm-up, a guess of how many steps fill a segment,
and five segments; the GPU is waited for at the ends of segments alone. The figure is the median of the segments of all
rounds. The first contestant runs again in each round, after its rival: how much its two figures differ is the noise
(A/A), and a ratio within it is no difference. What does not fit into `--seconds` is left out, and said. A variant that
cannot run is a row with its reason.

MFU is the model's FLOPs (`_flops.py`: 6·N + 3·A a token; 4·N + 6·N_lora + 3·A where the base is frozen) over the dense
peak of the GPU in the data type of the products: of its data sheet, by its name, and left empty where `_flops.py` does
not know it. int8 and 4 bits are held against the peak of bf16, which their gradients are computed in. Peak memory is
`torch.cuda.max_memory_allocated` from before the model is built.
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
from statistics import median
from typing import Any, NamedTuple

from _flops import flops_per_token, matrix_weights, peak

WORKER = Path(__file__).with_name("_training_worker.py")
RESULTS = Path(__file__).parents[1] / "results" / "gpu"
OURS, THEIRS, AGAIN = "lightning_ft", "HF Trainer", "lightning_ft (again)"
NO_TIME, NO_GPU = "left out: no time", "not run: it needs a GPU"
RANK = 16
PACKAGES = ("torch", "lightning", "transformers", "accelerate", "peft", "bitsandbytes", "flash-attn", "triton")


class Variant(NamedTuple):
    """What is trained, and how.

    ``precision`` is fp32, tf32, bf16 or fp16 (the last two as autocast over fp32 weights); ``base`` is full (all weights
    train), lora, int8 or int4 (LoRA over a frozen base); ``flash`` is PyTorch's own kernel and no other.
    """

    name: str
    precision: str
    base: str = "full"
    optimizer: str = "adamw"
    attention: str = "sdpa"
    compiled: bool = False

    @property
    def needs_gpu(self) -> bool:
        """Whether there is no such thing on a CPU."""
        return self.precision in ("tf32", "fp16") or self.attention.startswith("flash")


# In the order in which they matter: what there is no time for stands last.
VARIANTS = (
    Variant("bf16", "bf16"),
    Variant("fp32", "fp32"),
    Variant("tf32", "tf32"),
    Variant("fp16", "fp16"),
    Variant("bf16, 8-bit AdamW", "bf16", optimizer="adamw8bit"),
    Variant("bf16, LoRA", "bf16", base="lora"),
    Variant("bf16, int8 + LoRA", "bf16", base="int8"),
    Variant("bf16, 4 bits + LoRA (QLoRA)", "bf16", base="int4"),
    Variant("bf16, eager attention", "bf16", attention="eager"),
    Variant("bf16, PyTorch's flash attention", "bf16", attention="flash"),
    Variant("bf16, flash-attn 2", "bf16", attention="flash_attention_2"),
    Variant("bf16, torch.compile", "bf16", compiled=True),
)


class Model(NamedTuple):
    """A size, the rows and tokens of its batches, and its share of the time."""

    config: dict[str, Any]
    rows: int
    length: int
    share: float


BERT = {
    "decoder": False,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}
LLAMA = {  # Llama 3.2 1B
    "decoder": True,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
MODELS = {"BERT-base": Model(BERT, 64, 128, 0.4), "Llama-1B": Model(LLAMA, 4, 1024, 0.6)}
QUICK = {
    "tiny BERT": Model({**BERT, **TINY}, 2, 8, 0.5),
    "tiny Llama": Model({**LLAMA, **TINY, "num_key_value_heads": 2, "head_dim": 16}, 2, 8, 0.5),
}


def main() -> None:
    """Plan, or run and publish."""
    options = _arguments()
    models = {name: m for name, m in (QUICK if options.quick else MODELS).items() if name in (options.models or [name])}
    variants = [variant for variant in VARIANTS if variant.name in (options.variants or [variant.name])]
    if not (models and variants):
        sys.exit(f"nothing to run: --models of {[*MODELS]}, --variants of {[variant.name for variant in VARIANTS]}")
    print(_plan(models, variants, options), flush=True)
    if options.dry:
        return
    deadline = time.time() + options.seconds
    machine = _machine(options.device)
    rows: list[dict[str, Any]] = []
    shares = sum(model.share for model in models.values())
    for name, model in models.items():
        # What a model leaves of its share goes to those after it.
        left = deadline - time.time()
        until = time.time() + left * model.share / shares
        shares -= model.share
        rows += _run(name, model, variants, options, until, machine)
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


def _plan(models: dict[str, Model], variants: list[Variant], options: argparse.Namespace) -> str:
    contestants = len(_order(variants))
    lines = [
        f"{len(models)} models, {len(variants)} variants, {contestants} contestants, at most {options.rounds} rounds, "
        f"{options.seconds} s in all"
    ]
    for name, model in models.items():
        full, lora = (flops_per_token(model.config, model.length, lora_rank=rank) / 1e9 for rank in (None, RANK))
        lines.append(
            f"{name}, {model.rows} rows of {model.length} tokens, N = {matrix_weights(model.config) / 1e6:.1f} million, "
            f"{full:.3g} GFLOPs a token ({lora:.3g} with a frozen base):"
        )
        lines += [f"  {trainer}, {variant.name}" for variant, trainer in _order(variants)]
    return "\n".join(lines)


def _order(variants: list[Variant]) -> list[tuple[Variant, str]]:
    """A round: each variant under both trainers, and the first one again."""
    pairs = [(variant, trainer) for variant in variants for trainer in (OURS, THEIRS)]
    return [*pairs[:2], (variants[0], AGAIN), *pairs[2:]]


# ---- one model


def _run(
    name: str,
    model: Model,
    variants: list[Variant],
    options: argparse.Namespace,
    until: float,
    machine: dict[str, Any],
) -> list[dict[str, Any]]:
    """Rows of one model. A process that dies is begun anew, without the contestant that it died of."""
    order = _order(variants)
    passes: list[list[dict[str, Any]]] = [[] for _ in order]
    reasons = {n: NO_GPU for n, (variant, _) in enumerate(order) if options.device == "cpu" and variant.needs_gpu}
    with tempfile.TemporaryDirectory() as folder:
        while todo := [number for number in range(len(order)) if number not in reasons]:
            running, ended = todo, ""
            for told in _lines(_settings(model, order, todo, options, until, folder), until):
                if "begins" in told:
                    running = [told["begins"]]
                elif "ended" in told:
                    ended = told["ended"]
                elif "error" in told:
                    reasons[told["contestant"]] = told["error"]
                else:
                    passes[told["contestant"]].append(told)
                if "begins" not in told:
                    print(f"{name}, {', '.join(_title(order[n]) for n in running)}: {told}", flush=True)
            if not ended:
                break
            reasons |= dict.fromkeys(running, ended)
    return [
        _row(name, model, *contestant, found, reasons.get(number, NO_TIME), machine)
        for number, (contestant, found) in enumerate(zip(order, passes, strict=True))
    ]


def _title(contestant: tuple[Variant, str]) -> str:
    return f"{contestant[1]}, {contestant[0].name}"


def _settings(
    model: Model, order: list[tuple[Variant, str]], todo: list[int], options: argparse.Namespace, until: float, folder: str
) -> dict[str, Any]:
    return {
        "config": model.config,
        "rows": model.rows,
        "length": model.length,
        "rank": RANK,
        "contestants": [(number, order[number][0]._asdict(), order[number][1] == THEIRS) for number in todo],
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


def _row(
    name: str,
    model: Model,
    variant: Variant,
    trainer: str,
    passes: list[dict[str, Any]],
    reason: str,
    machine: dict[str, Any],
) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "variant": variant.name, "trainer": trainer}
    if not passes:
        return {**row, "tokens_per_s": None, "mfu": None, "peak_gib": None, "not run": reason}
    speed = model.rows * model.length / median(second for one in passes for second in one["steps"])
    flops = flops_per_token(model.config, model.length, lora_rank=None if variant.base == "full" else RANK)
    most = peak(machine.get("GPU", ""), variant.precision)
    peaks = [one["peak_gib"] for one in passes if one["peak_gib"] is not None]
    return {
        **row,
        "tokens_per_s": speed,
        "mfu": speed * flops / most if most else None,
        "peak_gib": max(peaks) if peaks else None,
        "passes": passes,
        "not run": "",
    }


# ---- what is written


def _machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {}
    if device == "cuda":
        command = "import json, torch; c = torch.cuda; p = c.get_device_properties(0) if c.is_available() else None\n"
        command += "print(json.dumps(p and {'GPU': p.name, 'SM': f'{p.major}{p.minor}', 'CUDA': torch.version.cuda}))"
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if not found:
            sys.exit("no GPU, or a PyTorch without CUDA: --dry says what would be run")
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _publish(rows: list[dict[str, Any]], machine: dict[str, Any], options: argparse.Namespace) -> None:
    content = {"date": date.today().isoformat(), "machine": machine, "device": options.device, "rows": rows}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "training.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = _markdown(rows, f"{content['date']}, {', '.join(f'{name} {value}' for name, value in machine.items())}.")
    (options.results / "training.md").write_text(text, encoding="utf-8")


def _markdown(rows: list[dict[str, Any]], title: str) -> str:
    lines = [f"Training: tokens a second, MFU and peak memory. {title}", ""]
    if not any(row["mfu"] for row in rows):
        lines += ["No MFU: the peak of this device is not in benchmarks/gpu/_flops.py.", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        heads = ("variant", *(f"{what}, {who}" for what in ("tokens/s", "MFU", "GiB") for who in (OURS, THEIRS)))
        lines += [f"**{model}**", "", f"| {' | '.join((*heads, 'speed, ratio'))} |", f"|{'---|' * (len(heads) + 1)}"]
        mine = {(row["variant"], row["trainer"]): row for row in rows if row["model"] == model}
        for variant in dict.fromkeys(name for name, _ in mine):
            ours, theirs = mine[variant, OURS], mine[variant, THEIRS]
            cells = [_cell(row, what) for what in ("tokens_per_s", "mfu", "peak_gib") for row in (ours, theirs)]
            lines.append(f"| {' | '.join((variant, *cells, _ratio(ours, theirs)))} |")
        first = next(variant for variant, _ in mine)
        noise = _ratio(mine[first, AGAIN], mine[first, OURS])
        lines += ["", f"A/A ({first}, ours again over ours): {noise or mine[first, AGAIN]['not run']}.", ""]
    return "\n".join(lines)


def _cell(row: dict[str, Any], what: str) -> str:
    if row["tokens_per_s"] is None:
        return str(row["not run"]).replace("|", "/") if what == "tokens_per_s" else ""
    if row[what] is None:
        return ""
    return {"tokens_per_s": "{:,.0f}", "mfu": "{:.1%}", "peak_gib": "{:.2f}"}[what].format(row[what])


def _ratio(above: dict[str, Any], below: dict[str, Any]) -> str:
    """Of the speeds; in brackets the lowest and highest of single rounds, where there are several."""
    if above["tokens_per_s"] is None or below["tokens_per_s"] is None:
        return ""
    pairs = list(zip(above["passes"], below["passes"], strict=False))
    rounds = [median(b["steps"]) / median(a["steps"]) for a, b in pairs]
    spread = f" ({min(rounds):.2f}–{max(rounds):.2f})" if len(rounds) > 1 else ""
    return f"{above['tokens_per_s'] / below['tokens_per_s']:.2f}{spread}"


if __name__ == "__main__":
    main()
