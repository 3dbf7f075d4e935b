"""AdamW with states of 8 bits against AdamW: bytes of state, and accuracy over seeds. No time.

MiniLM on TREC-6. The same module, rows, order, head and dropout for a seed; the callback EightBitOptimizer puts
bitsandbytes' AdamW8bit in the place of the module's AdamW, with its groups and its schedule. Embeddings keep states of
32 bits, as does any tensor below 4,096 values. Accuracy is that on the dev set after the last step. The third
contestant is AdamW again with another order of sums (one thread), which says what mere rounding does to a run.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _kept import kept
from _timing import DATA, Row, arguments, needs, publish, start, trainer
from lightning import seed_everything
from torch import nn

from lightning_ft.callbacks import EightBitOptimizer
from lightning_ft.data import ClassificationData
from lightning_ft.demo import prepare_model
from lightning_ft.modules import SequenceClassification

METHODS = ("AdamW", "AdamW8bit", "AdamW, other sums")


def run(options: Any, method: str, seed: int) -> dict[str, float]:
    """Train once."""
    seed_everything(seed, verbose=False)
    torch.set_num_threads(1 if options.quick or method == METHODS[2] else options.threads)
    data = ClassificationData(
        str(options.model), str(options.data / "train.jsonl"), str(options.data / "dev.jsonl"), batch_size=32, seed=seed
    )
    module = SequenceClassification(str(options.model), data.labels, learning_rate=2e-4, warmup=0.1, head_seed=seed)
    callbacks = [EightBitOptimizer("adamw")] if method == METHODS[1] else []
    runner = trainer(*callbacks, clip=1.0, steps=options.steps)
    began = time.perf_counter()
    runner.fit(module, data)
    seconds = time.perf_counter() - began
    (optimizer,) = runner.optimizers
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    bytes_of = {"embeddings": 0, "others": 0}
    for parameter, state in optimizer.state.items():
        part = "embeddings" if id(parameter) in embeddings else "others"
        bytes_of[part] += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    runner.limit_val_batches = 4 if options.quick else 1.0
    found = runner.validate(module, data, verbose=False)[0]
    return {"accuracy": found["val_accuracy"], "loss": found["val_loss"], **bytes_of, "seconds": seconds}


def table(results: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Accuracy and bytes, and the bytes over AdamW's."""
    rows = []
    for method, runs in results.items():
        scores = [found["accuracy"] for found in runs]
        rows.append(
            {
                "optimiser": method,
                "accuracy": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else None,
                "dev loss": mean(found["loss"] for found in runs),
                "state of embeddings, MB": runs[0]["embeddings"] / 1e6,
                "of the others, MB": runs[0]["others"] / 1e6,
                "the others over AdamW": runs[0]["others"] / results[METHODS[0]][0]["others"],
                "seeds": len(scores),
            }
        )
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "trec6", help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--runs", type=Path, required=True, help="folder of finished runs; empty it for new code")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = start(parser)
    needs(options.data / "train.jsonl")
    options.steps = 2 if options.quick else 340
    seeds = 2 if options.quick else options.seeds
    options.model = options.runs / "model"
    if not (options.model / "config.json").is_file():
        prepare_model(options.model)
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        for method, found in results.items():
            found.append(kept(options.runs, f"{method}-{seed}", partial(run, options, method, seed)))
    hours = sum(found["seconds"] for runs in results.values() for found in runs) / 3600
    publish(
        "eight_bit_optimizer",
        options.results,
        setting=f"all-MiniLM-L6-v2 on TREC-6, {options.steps} steps of 32 rows, learning rate 2e-4, seeds 0 to "
        f"{seeds - 1}, {options.threads} threads (the third contestant: 1); {hours:.2f} hours of a busy machine.",
        tables={"States of 8 bits": table(results)},
        seconds={method: [found["seconds"] for found in runs] for method, runs in results.items()},
    )


if __name__ == "__main__":
    main()
