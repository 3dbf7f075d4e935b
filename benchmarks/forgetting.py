"""What fine-tuning on a second task makes a model forget of the first, with and without an anchor. Accuracy, no time.

MiniLM is fine-tuned on TREC-6 (the old task), then on BANKING77 (the new one) under each method: its body goes on, the
head is new. Afterwards the old task's head is put back on the body as it is now, and both tasks are evaluated. Old data
are used for the Fisher information alone (EWC), and never trained on again.

- plain: AdamW, nothing else.
- L2-SP and EWC: coupled. F is divided by its mean, so that their strengths are of one scale; its three variants are
  computed by fisher_diagonal of the same old training rows, without the head.
- Mixout: p, with the body's dropout off, as its authors have it.
- WiSE-FT: the plain run's body, interpolated with the old solution's; the new head stays.

Each method's strength is chosen by the dev sets: what keeps the most of the old accuracy while the new one is at most
one point below plain fine-tuning's (means over seeds); the table shows it on the test sets. "kept" is the share of what
plain fine-tuning forgets that a method keeps: 1 - forgotten / forgotten by plain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from _kept import kept
from _timing import DATA, Row, arguments, needs, publish, start, trainer
from datasets import Dataset
from lightning import seed_everything
from lightning.pytorch import Callback
from torch import Tensor

from lightning_ft.callbacks import EWC, L2SP, Mixout
from lightning_ft.core import Layers
from lightning_ft.core.files import atomic_file
from lightning_ft.data import ClassificationData
from lightning_ft.demo import prepare_model
from lightning_ft.functional import fisher_diagonal
from lightning_ft.modules import SequenceClassification

OLD, NEW = "trec6", "banking77"
VARIANTS = ("exact", "sampled", "empirical")
WISE = "WiSE-FT"
COUPLED = (0.01, 0.1, 0.3)
GRID: dict[str, tuple[float, ...]] = {
    "plain": (0.0,),
    "L2-SP": (0.01, 0.03, 0.1),
    **{f"EWC, {variant}": COUPLED for variant in VARIANTS},
    "Mixout": (0.3, 0.6, 0.9),
    WISE: (0.2, 0.4, 0.6, 0.8),
}
POINT = 0.01


class Size(NamedTuple):
    """How much is run."""

    rows: int = 2000
    epochs: int = 4
    examples: int = 500
    evaluated: int = 500
    seeds: int = 3


Score = dict[str, float]
Weights = dict[str, Tensor]


def data_of(task: str, folder: Path, options: Any, size: Size) -> ClassificationData:
    """A task's rows; labels of the whole training file, so that a subset that lacks one changes nothing."""
    files = {part: Dataset.from_json(str(options.data / task / f"{part}.jsonl")) for part in ("train", "dev", "test")}
    labels = sorted({str(label) for label in files["train"]["label"]})
    rows = {
        part: rows.select(range(min(len(rows), size.rows if part == "train" else size.evaluated)))
        for part, rows in files.items()
    }
    return ClassificationData(str(folder), rows["train"], rows["dev"], rows["test"], labels=labels, batch_size=32)


def accuracy(module: SequenceClassification, data: ClassificationData) -> Score:
    """Accuracy on the dev and the test set."""
    judge = trainer()
    judge.limit_val_batches = 1.0
    found = {**judge.validate(module, data, verbose=False)[0], **judge.test(module, data, verbose=False)[0]}
    return {"dev": found["val_accuracy"], "test": found["test_accuracy"]}


def body(module: SequenceClassification) -> Weights:
    """The parameters of everything but the head, by name: not copied."""
    groups = Layers().of(module)
    return {name: p.data for group in groups if group != "head" for name, p in groups.named_parameters(group)}


def train(module: SequenceClassification, data: ClassificationData, size: Size, callbacks: list[Callback]) -> float:
    """Fine-tune; the seconds that it took."""
    began = time.perf_counter()
    trainer(*callbacks, clip=1.0, epochs=size.epochs).fit(module, data)
    return time.perf_counter() - began


class Seed:
    """Everything that starts from one seed: the old task's model, its Fisher information, and the second trainings."""

    def __init__(self, seed: int, folder: Path, options: Any, size: Size) -> None:
        self.seed, self.size, self.options = seed, size, options
        self.folder = folder / f"seed-{seed}"
        self.old_data = data_of(OLD, options.model, options, size)
        self.new_data = data_of(NEW, options.model, options, size)

    def module(self, data: ClassificationData, pretrained: Path) -> SequenceClassification:
        """A model with a new head for a task."""
        seed_everything(self.seed, verbose=False)
        assert data.labels is not None
        return SequenceClassification(
            str(pretrained), data.labels, learning_rate=self.options.learning_rate, head_seed=self.seed
        )

    def learn_old(self) -> Score:
        """Fine-tune on the old task, keep the model and the Fisher information at it."""
        module = self.module(self.old_data, self.options.model)
        train(module, self.old_data, self.size, [])
        module.save_pretrained(self.folder / "old")
        names = list(body(module))
        for variant in VARIANTS:
            batches = self.old_data.train_dataloader()
            fisher = fisher_diagonal(module, batches, variant, parameters=names, limit=self.size.examples)
            fisher.save(self.folder / f"{variant}.safetensors")
        return accuracy(module, self.old_data)

    def old_model(self) -> SequenceClassification:
        """The old task's model, head and all."""
        assert self.old_data.labels is not None
        return SequenceClassification(str(self.folder / "old"), self.old_data.labels)

    def scores(self, new: SequenceClassification) -> dict[str, Score]:
        """Both tasks' accuracy with the body of ``new``."""
        old = self.old_model()
        for target, source in zip(body(old).values(), body(new).values(), strict=True):
            target.copy_(source)
        return {"old": accuracy(old, self.old_data), "new": accuracy(new, self.new_data)}

    def learn_new(self, method: str, strength: float) -> dict[str, Any]:
        """Fine-tune on the new task under a method."""
        callbacks: dict[str, Callable[[], list[Callback]]] = {
            "plain": list,
            "L2-SP": lambda: [L2SP(strength, kernels_only=False)],
            **{
                f"EWC, {v}": lambda v=v: [EWC(strength, self.folder / f"{v}.safetensors", normalize=True)]
                for v in VARIANTS
            },
            "Mixout": lambda: [Mixout(strength, dropout=0.0)],
        }
        module = self.module(self.new_data, self.folder / "old")
        seconds = train(module, self.new_data, self.size, callbacks[method]())
        if method == "plain":
            torch.save(module.state_dict(), self.folder / "plain.pt")
        return {**self.scores(module), "seconds": seconds}

    def interpolate(self, alpha: float) -> dict[str, Any]:
        """WiSE-FT: the plain run's body, on the way back to the old solution."""
        module = self.module(self.new_data, self.folder / "old")
        start = {name: value.clone() for name, value in body(module).items()}
        module.load_state_dict(torch.load(self.folder / "plain.pt", weights_only=True))
        for name, value in body(module).items():
            value.copy_(torch.lerp(start[name], value, alpha))
        return {**self.scores(module), "seconds": 0.0}


Results = dict[str, dict[float, list[dict[str, Any]]]]


def measure(options: Any, size: Size, folder: Path) -> tuple[list[Score], Results]:
    """All runs, of which finished ones are read again."""
    results: Results = {method: {strength: [] for strength in grid} for method, grid in options.grid.items()}
    old: list[Score] = []
    for seed in range(size.seeds):
        runs = Seed(seed, folder, options, size)
        old.append(kept(runs.folder, "old", runs.learn_old))
        for method, strengths in results.items():
            for strength, found in strengths.items():
                run = (
                    partial(runs.interpolate, strength) if method == WISE else partial(runs.learn_new, method, strength)
                )
                found.append(kept(runs.folder, f"{method.replace(', ', '-')}-{strength:g}", run))
    return old, results


# ---- tables and picture


def average(runs: list[dict[str, Any]], task: str, part: str) -> float:
    """Mean accuracy over the seeds."""
    return mean(run[task][part] for run in runs)


def chosen(results: Results) -> dict[str, float]:
    """Each method's best strength, by the dev sets alone."""
    plain = average(results["plain"][0.0], "new", "dev")
    best = {}
    for method, strengths in results.items():
        good = {s: runs for s, runs in strengths.items() if average(runs, "new", "dev") >= plain - POINT}
        # None is good enough: the one that hurts the new task least.
        best[method] = (
            max(good, key=lambda s: average(good[s], "old", "dev"))
            if good
            else max(strengths, key=lambda s: average(strengths[s], "new", "dev"))
        )
    return best


def summary(old: list[Score], results: Results) -> list[Row]:
    """The chosen strengths on the test sets."""
    before = mean(score["test"] for score in old)
    forgotten = before - average(results["plain"][0.0], "old", "test")
    rows = []
    for method, strength in chosen(results).items():
        runs = results[method][strength]
        row: Row = {"method": method, "strength": strength or None}
        for task in ("old", "new"):
            values = [run[task]["test"] for run in runs]
            row |= {f"{task} task": mean(values), f"{task}, std": stdev(values) if len(values) > 1 else None}
        lost = before - row["old task"]
        rows.append({**row, "forgotten": lost, "kept": 1 - lost / forgotten if forgotten else None})
    return rows


def frontier(old: list[Score], results: Results) -> list[Row]:
    """Every point of the grid: means on dev and test."""
    rows: list[Row] = [{"method": "before the new task", "old, test": mean(score["test"] for score in old)}]
    for method, strengths in results.items():
        for strength, runs in strengths.items():
            points = {
                f"{task}, {part}": average(runs, task, part) for task in ("old", "new") for part in ("dev", "test")
            }
            seconds = mean(run["seconds"] for run in runs)
            rows.append({"method": method, "strength": strength, **points, "seconds": seconds})
    return rows


def draw(old: list[Score], results: Results, path: Path) -> None:
    """Old against new accuracy on the test sets: a line a method, a point a strength."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for method, strengths in results.items():
        points = [[100 * average(runs, task, "test") for task in ("new", "old")] for runs in strengths.values()]
        across, up = zip(*points, strict=True)
        axes.plot(
            across, up, "*" if method == "plain" else "o-", label=method, markersize=14 if method == "plain" else 5
        )
    before = 100 * mean(score["test"] for score in old)
    axes.axhline(before, linestyle=":", color="grey")
    axes.annotate(
        "before the new task",
        (0.3, before),
        (0, -12),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
    )
    axes.set_xlabel(f"new task, {NEW}: test accuracy, %")
    axes.set_ylabel(f"old task, {OLD}: test accuracy, %")
    axes.legend(fontsize="small")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {OLD}/ and {NEW}/")
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder that keeps finished runs; empty it for new code"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--methods", nargs="+", default=list(GRID), choices=list(GRID), help="by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    options = start(parser)
    if options.threads:
        torch.set_num_threads(options.threads)
    needs(options.data / OLD / "train.jsonl")
    size = Size(64, 1, 16, 32, 1) if options.quick else Size(seeds=options.seeds)
    options.grid = {m: g[-1:] if options.quick else g for m, g in GRID.items() if m in (*options.methods, "plain")}
    options.model = options.runs / "model"
    if not (options.model / "config.json").is_file():
        prepare_model(options.model)
    old, results = measure(options, size, options.runs)
    draw(old, results, options.results / "forgetting.png")
    hours = sum(run["seconds"] for strengths in results.values() for runs in strengths.values() for run in runs) / 3600
    publish(
        "forgetting",
        options.results,
        setting=f"all-MiniLM-L6-v2, {OLD} then {NEW}: {size.rows} training rows and {size.epochs} epochs each, batch "
        f"32, learning rate {options.learning_rate:g}, Fisher information of {size.examples} rows, up to "
        f"{size.evaluated} dev and test rows each; seeds 0 to {size.seeds - 1}; {hours:.1f} hours of training on the "
        "new task.",
        tables={"Forgetting": summary(old, results), "All strengths": frontier(old, results)},
        seconds={
            method: [run["seconds"] for runs in strengths.values() for run in runs]
            for method, strengths in results.items()
        },
    )


if __name__ == "__main__":
    main()
