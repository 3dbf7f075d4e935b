"""Accuracy against how little of a model is a task's own: full fine-tuning, and methods that change a part. No time.

MiniLM on TREC-6 (questions, 6 classes) and RTE (pairs, 2 classes; half of the steps at a quarter of the rates, as at
the full ones it answers one class alone). Every run on a task takes the same number of steps over the same rows in the
seed's order, with AdamW, warm-up, linear decay and clipping at 1.0. The head is new, trains in every method, and counts
nowhere.

- BitFit: the biases.
- LoRA: r = 8 on queries and values.
- Pfeiffer: a bottleneck adapter of reduction 16 behind each feed-forward layer.
- diff pruning: half of the training with gates, then 0.5 % of all weights alone.
- SAID: d values, some of them scales of the tensors (there are 103, hence no d = 100), spread by a fixed random map.
- movement pruning: 15 % of the blocks' weights kept, embeddings frozen; "longer" are five times the steps of the rest,
  on TREC-6 alone.

"own" is what a task adds to or changes in the pretrained weights, over their number: for movement pruning the weights
that are kept and all others that train. "trained" are the values with gradients, which may be more while it is learned
which ones are needed. Accuracy is that on the dev set after the last step; no step is chosen by it. Learning rates are
the authors' for BERT-base times 5 to 30, as MiniLM is narrower and the training short: see METHODS. Of BitFit, LoRA,
Pfeiffer and SAID (d = 1000) the order of magnitude was tried, on TREC-6, with fewer steps and a seed that is none of
these.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from _grid import begin, finish
from _kept import kept
from _timing import Row, trainer
from datasets import Dataset
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from lightning_ft.core import Layers
from lightning_ft.data import ClassificationData
from lightning_ft.functional.picture import new_figure, save_figure
from lightning_ft.modules import SequenceClassification


class Task(NamedTuple):
    """How its rows are read; what part of the steps and of the learning rates it takes."""

    rows: dict[str, Any]
    steps: float = 1.0
    rates: float = 1.0


TASKS = {
    "trec6": Task({"text": "text", "batch_size": 32}),
    "rte": Task({"text": "premise", "text_pair": "hypothesis", "batch_size": 16, "max_length": 128}, 0.5, 0.25),
}
DIMENSIONS = (200, 1000, 10000)
WEIGHTS = 384 * 384  # of a matrix of MiniLM, for SAID's rates
RATE = 2e-4


class Method(NamedTuple):
    """Callbacks, made anew for each run; the highest rate (SAID: of the head); a factor of the steps; which tasks."""

    callbacks: Callable[[Task], list[Callback]]
    rate: float = RATE
    longer: float = 1.0
    tasks: tuple[str, ...] = tuple(TASKS)


def bit_fit(task: Task) -> list[Callback]:
    from lightning_ft.callbacks import BitFit

    return [BitFit()]


def lora(task: Task) -> list[Callback]:
    from peft import LoraConfig

    from lightning_ft.callbacks import PEFT

    return [PEFT(LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))]


def pfeiffer(task: Task) -> list[Callback]:
    from lightning_ft.callbacks import BottleneckAdapters

    return [BottleneckAdapters("pfeiffer")]


def diff_pruning(task: Task) -> list[Callback]:
    from lightning_ft.callbacks import DiffPruning

    return [DiffPruning(0.005, relaxed=0.5)]


def said(dimension: int, task: Task) -> list[Callback]:
    from lightning_ft.callbacks import IntrinsicDimension

    # ‖P v‖ is ‖v‖ for each tensor: a step of η in each of d values moves its D weights by η √(d/D) each.
    return [IntrinsicDimension(dimension, rate=task.rates * RATE * math.sqrt(WEIGHTS / dimension))]


def movement_pruning(task: Task) -> list[Callback]:
    from lightning_ft.callbacks import Freeze, MovementPruning

    return [MovementPruning(0.15), Freeze(groups="embeddings")]


METHODS = {
    "full": Method(lambda task: []),
    "BitFit": Method(bit_fit, 5e-3),
    "LoRA": Method(lora, 2e-3),
    "Pfeiffer": Method(pfeiffer, 3e-3),
    "diff pruning": Method(diff_pruning),
    **{f"SAID, d = {dimension}": Method(partial(said, dimension), 1e-3) for dimension in DIMENSIONS},
    "movement pruning": Method(movement_pruning),
    "movement pruning, longer": Method(movement_pruning, longer=5.0, tasks=("trec6",)),
}


# ---- a run


def rate_of(task: str, method: str) -> float:
    """The highest learning rate."""
    return TASKS[task].rates * METHODS[method].rate


def steps_of(options: Any, task: str, method: str) -> int:
    """Optimiser steps of a run."""
    return 2 if options.quick else round(METHODS[method].longer * TASKS[task].steps * options.steps)


def run(options: Any, task: str, method: str, seed: int) -> dict[str, float]:
    """Train once."""
    seed_everything(seed, verbose=False)
    rows = [Dataset.from_json(str(options.data / task / f"{part}.jsonl")) for part in ("train", "dev")]
    labels = sorted(set(rows[0]["label"]))
    train, dev = (table.select(range(min(len(table), options.rows))) for table in rows)
    data = ClassificationData(str(options.model), train, dev, labels=labels, seed=seed, **TASKS[task].rows)
    rate = rate_of(task, method)
    module = SequenceClassification(str(options.model), labels, learning_rate=rate, warmup=0.1, head_seed=seed)
    head = sum(parameter.numel() for parameter in Layers().of(module).parameters("head"))
    weights = sum(parameter.numel() for parameter in module.parameters()) - head
    told: dict[str, float] = {}

    def count(trainer: Trainer, module: LightningModule, *_: Any) -> None:
        told["trained"] = sum(p.numel() for p in module.parameters() if p.requires_grad) - head

    callbacks = METHODS[method].callbacks(TASKS[task])
    steps = steps_of(options, task, method)
    runner = trainer(*callbacks, LambdaCallback(on_train_batch_start=count), clip=1.0, steps=steps)
    began = time.perf_counter()
    runner.fit(module, data)
    seconds = time.perf_counter() - began
    runner.limit_val_batches = 1.0
    accuracy = runner.validate(module, data, verbose=False)[0]["val_accuracy"]
    own = _own(callbacks, told["trained"])
    return {"accuracy": accuracy, "own": own / weights, "trained": told["trained"] / weights, "seconds": seconds}


def _own(callbacks: list[Callback], trained: float) -> float:
    """Values that are a task's own, once training is over."""
    names = {type(callback).__name__: callback for callback in callbacks}
    if "DiffPruning" in names:
        return float(names["DiffPruning"].report.facts["kept"])
    if "MovementPruning" in names:
        facts = names["MovementPruning"].report.facts
        return float(trained - 2 * facts["weights"] + facts["kept"])  # scores, and what is 0, are not kept
    return trained


# ---- tables and picture

Results = dict[str, dict[str, list[dict[str, float]]]]


def table(task: str, found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Share and accuracy of each method on a task."""
    rows = []
    for method, runs in found.items():
        scores = [one["accuracy"] for one in runs]
        rows.append(
            {
                "method": method,
                "own, %": 100 * mean(one["own"] for one in runs),
                "trained, %": 100 * mean(one["trained"] for one in runs),
                "learning rate": f"{rate_of(task, method):g}",
                "accuracy": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else None,
                "worst": min(scores),
                "best": max(scores),
                "seeds": len(scores),
            }
        )
    return rows


def commonest(options: Any, task: str) -> float:
    """Accuracy of always answering the dev set's commonest label."""
    labels = Dataset.from_json(str(options.data / task / "dev.jsonl"))["label"]
    return max(Counter(labels).values()) / len(labels)


def draw(results: Results, chance: dict[str, float], path: Path) -> None:
    """A panel for each task: accuracy over the share on a logarithmic axis, the commonest label as a line."""
    figure = new_figure(path, 5 * len(results) + 2, 4.2)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (task, found) in zip(panels, results.items(), strict=True):
        for row in table(task, found):
            spread = 100 * (row["std"] or 0)
            panel.errorbar(row["own, %"], 100 * row["accuracy"], spread, fmt="o", capsize=3, label=row["method"])
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("a task's own values, % of the pretrained ones")
        panel.set_ylabel("dev accuracy, %")
        panel.axhline(100 * chance[task], color="#888888", linestyle="--", linewidth=1)
        panel.set_title(f"{task} (dashed: the commonest label)", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    save_figure(figure, path)


def main() -> None:
    options = begin(__doc__, TASKS, METHODS, steps=400, seeds=3)
    options.rows = 64 if options.quick else 10**9
    options.seeds = 1 if options.quick else options.seeds

    results: Results = {
        task: {method: [] for method in options.methods if task in METHODS[method].tasks} for task in options.tasks
    }
    for seed in range(options.seeds):
        for task, found in results.items():
            for method, runs in found.items():
                words = method.replace(", longer", "").replace(", d = ", "-").replace(" ", "-")
                name = f"{task}-{words}-{rate_of(task, method):g}-{steps_of(options, task, method)}"
                one = partial(run, options, task, method, seed)
                runs.append(kept(options.runs, f"{name}-{seed}", one))
    chance = {task: commonest(options, task) for task in options.tasks}
    draw(results, chance, options.results / "parameter_efficient.png")
    tables = {f"Dev accuracy, {task}": table(task, found) for task, found in results.items()}
    always = ", ".join(f"{task} {share:.3f}" for task, share in chance.items())
    rte = steps_of(options, "rte", "full")
    setting = f"{options.steps} steps of 32 rows (RTE: {rte} of 16), commonest label: {always}"
    finish("parameter_efficient", options, tables, results, setting=setting)


if __name__ == "__main__":
    main()
