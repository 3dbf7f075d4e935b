"""How much fine-tuning on 100 examples varies with the seed, with and without what is said to steady it. No time.

MiniLM on 100 rows of SST-2, always the same ones: a seed draws the head, the order, dropout and what a method draws.
Every run takes the same number of optimiser steps, with AdamW (bias-corrected), warm-up and linear decay, the longer
training that Mosbach et al. (2021) and Zhang et al. (2021) found to be the strongest simple cure: "plain" has it, too.

- LayerReinit: the top block (and the pooler) drawn anew.
- Mixout: p = 0.5 with the body's dropout off.
- L2-SP: coupled, strength 0.1, the paper's.
- LP-FT: the head fitted by logistic regression on the frozen features first.

Accuracy is that on the dev set after the last step: no step is chosen by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _kept import kept
from _timing import DATA, Row, arguments, needs, publish, start, trainer
from datasets import Dataset
from lightning import seed_everything
from lightning.pytorch import Callback

from lightning_ft.callbacks import L2SP, LPFT, LayerReinit, Mixout
from lightning_ft.data import ClassificationData
from lightning_ft.demo import prepare_model
from lightning_ft.modules import SequenceClassification

METHODS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "LayerReinit": lambda: [LayerReinit(1)],
    "Mixout": lambda: [Mixout(0.5, dropout=0.0)],
    "L2-SP": lambda: [L2SP(0.1)],
    "LP-FT": lambda: [LPFT()],
}


def run(options: Any, method: str, seed: int) -> dict[str, float]:
    """Train once."""
    seed_everything(seed, verbose=False)
    rows = {
        part: Dataset.from_json(str(options.data / f"{part}.jsonl")).select(range(count))
        for part, count in (("train", options.rows), ("dev", options.dev_rows))
    }
    data = ClassificationData(
        str(options.model), rows["train"], rows["dev"], labels=["0", "1"], batch_size=16, seed=seed
    )
    module = SequenceClassification(
        str(options.model), data.labels, learning_rate=options.learning_rate, warmup=0.1, head_seed=seed
    )
    runner = trainer(*METHODS[method](), clip=1.0, steps=options.steps)
    began = time.perf_counter()
    runner.fit(module, data)
    seconds = time.perf_counter() - began
    runner.limit_val_batches = 1.0
    found = runner.validate(module, data, verbose=False)[0]
    return {"accuracy": found["val_accuracy"], "loss": found["val_loss"], "seconds": seconds}


def table(results: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Mean, standard deviation and worst run of each method."""
    rows = []
    for method, runs in results.items():
        scores = [found["accuracy"] for found in runs]
        spread = stdev(scores) if len(scores) > 1 else None
        losses = mean(found["loss"] for found in runs)
        rows.append(
            {"method": method, "mean": mean(scores), "std": spread, "worst": min(scores), "best": max(scores)}
            | {"dev loss": losses, "seeds": len(scores)}
        )
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "sst2", help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--runs", type=Path, required=True, help="folder of finished runs; empty it for new code")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None)
    options = start(parser)
    if options.threads:
        torch.set_num_threads(options.threads)
    needs(options.data / "train.jsonl")
    options.rows, options.steps, options.dev_rows = (32, 2, 32) if options.quick else (100, 200, 872)
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
        "few_sample",
        options.results,
        setting=f"all-MiniLM-L6-v2, the first {options.rows} training rows of SST-2, {options.steps} steps of batch "
        f"16, learning rate {options.learning_rate:g}, {options.dev_rows} dev rows, seeds 0 to {seeds - 1}; "
        f"{hours:.1f} hours of training.",
        tables={"Dev accuracy": table(results)},
        seconds={method: [found["seconds"] for found in runs] for method, runs in results.items()},
    )


if __name__ == "__main__":
    main()
