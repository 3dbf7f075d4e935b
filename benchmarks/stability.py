"""How often fine-tuning on little data fails, by the luck of the seed, and what helps. No time.

MiniLM on the first 500 rows of RTE (pairs) and the first 100 of SST-2; a seed draws the head, the order of the data,
dropout and what a method draws. Batches of 16, AdamW, warm-up over 10 %, linear decay, clipping at 1.0; the rate is ten
times BERT's 2e-5, as MiniLM is a quarter as wide. No setting was chosen on these dev sets.

- 3 epochs: what is usually done. "uncorrected" is the same with the Adam of the first BERT (BiasCorrection).
- long: more steps (--steps), ε = 1e-6: Mosbach et al. (2021). All that follow are this, and one thing more.
- re-init: the top one of 6 blocks and the pooler drawn anew.
- LP-FT: the head fitted to the frozen features first; half of the rate, as its authors want it lower.
- mixout: p = 0.7, with the body's dropout off.
- R3F: λ = 0.7. FreeLB: its authors' for SST-2 (α = 0.1, m = 0.6, K = 2) and RTE (0.03, 0, 3). SMART: λ = μ = 1.
- seeds: ``lightning-ft seeds`` over 3 epochs for the steps of one long run: as many runs as that buys by the published
  rule are ranked after a quarter of their steps, the best finished, the best of these taken, all by rows that are
  neither trained on nor in the dev set. Each run is trained once to its end and judged by what it was at the rung: that
  is what the command gives, as a run that it resumes equals one that never stopped.

Accuracy is that on the dev set after the last step. A run has failed if it is no better than always answering the
commonest label (Mosbach et al.'s definition). "alarms" are the runs in which StabilityMonitor saw a sign of failure,
from training alone. Costs are those of a run: optimiser steps, and forward and backward passes of a batch through the
model, counted as they are made.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _grid import begin, finish
from _kept import kept
from _timing import Row, trainer
from datasets import Dataset
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from lightning_ft.data import ClassificationData
from lightning_ft.functional.picture import new_figure, save_figure
from lightning_ft.modules import SequenceClassification

TASKS: dict[str, dict[str, Any]] = {"rte": {"text": "premise", "text_pair": "hypothesis"}, "sst2": {}}
ROWS = {"rte": 500, "sst2": 100}
BATCH, RATE, EPOCHS, RUNG = 16, 2e-4, 3, 0.25
SEEDS = "seeds"


class Method(NamedTuple):
    """Callbacks of a task, made anew for each run; whether it trains long; the highest learning rate."""

    callbacks: Callable[[str], list[Callback]]
    long: bool = True
    rate: float = RATE


# Imported where they are used: a method can be run alone.


def uncorrected(task: str) -> list[Callback]:
    from lightning_ft.callbacks import BiasCorrection

    return [BiasCorrection(correct_bias=False)]


def reinit(task: str) -> list[Callback]:
    from lightning_ft.callbacks import LayerReinit

    return [LayerReinit(1)]


def lp_ft(task: str) -> list[Callback]:
    from lightning_ft.callbacks import LPFT

    return [LPFT()]


def mixout(task: str) -> list[Callback]:
    from lightning_ft.callbacks import Mixout

    return [Mixout(0.7, dropout=0.0)]


def r3f(task: str) -> list[Callback]:
    from lightning_ft.callbacks import R3F

    return [R3F(0.7)]


def free_lb(task: str) -> list[Callback]:
    from lightning_ft.callbacks import FreeLB

    return [FreeLB(0.1, 2, magnitude=0.6) if task == "sst2" else FreeLB(0.03, 3, magnitude=0.0)]


def smart(task: str) -> list[Callback]:
    from lightning_ft.callbacks import SMART

    return [SMART(1.0)]


METHODS = {
    "3 epochs": Method(lambda task: [], long=False),
    "3 epochs, uncorrected": Method(uncorrected, long=False),
    "long": Method(lambda task: []),
    "re-init": Method(reinit),
    "LP-FT": Method(lp_ft, rate=RATE / 2),
    "mixout": Method(mixout),
    "R3F": Method(r3f),
    "FreeLB": Method(free_lb),
    "SMART": Method(smart),
}


# ---- a run


class Passes:
    """Counts forward passes that begin and backward passes that reach the logits."""

    def __init__(self, module: SequenceClassification) -> None:
        self.forward = self.backward = 0
        model = module.model
        self._handles = [model.register_forward_pre_hook(self._begins), model.register_forward_hook(self._ends)]

    def _begins(self, *_: Any) -> None:
        self.forward += 1

    def _ends(self, model: Any, inputs: Any, output: Any) -> None:
        if output.logits.requires_grad:
            output.logits.register_hook(self._reached)

    def _reached(self, gradient: Any) -> None:
        self.backward += 1

    def stop(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def evaluate(module: SequenceClassification, data: ClassificationData) -> dict[str, float]:
    """Accuracy, loss, and the share of the commonest label, on the validation rows of the data."""
    module.eval()
    rows = [(module(batch), batch["labels"]) for batch in data.val_dataloader()]
    module.train()
    logits, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    return {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "loss": F.cross_entropy(logits.float(), labels).item(),
        "commonest": labels.bincount().max().item() / len(labels),
    }


def steps_of(options: Any, task: str, *, long: bool) -> int:
    """Optimiser steps of a run."""
    if options.quick:
        return 8 if long else 4
    return options.steps if long else EPOCHS * -(-ROWS[task] // BATCH)


def run(options: Any, task: str, method: str, seed: int, *, rung: int | None = None) -> dict[str, Any]:
    """Train once; with ``rung``, also say how it stood after so many steps, on rows to choose by."""
    from lightning_ft.callbacks.stability_monitor import StabilityMonitor

    seed_everything(seed, verbose=False)
    how, count = METHODS[method], min(ROWS[task], options.rows)
    train = Dataset.from_json(str(options.data / task / "train.jsonl"))
    dev = Dataset.from_json(str(options.data / task / "dev.jsonl"))
    dev = dev.select(range(min(len(dev), options.rows)))
    shared = {"labels": sorted(set(map(str, train["label"]))), "batch_size": BATCH, "max_length": 128, **TASKS[task]}
    data = ClassificationData(str(options.model), train.select(range(count)), dev, seed=seed, **shared)
    chooses = train.select(range(count, count + min(len(dev), count)))
    choice = ClassificationData(str(options.model), train.select(range(count)), chooses, **shared)
    for part in (data, choice):
        part.prepare_data()
        part.setup("fit")
    module = SequenceClassification(
        str(options.model), shared["labels"], learning_rate=how.rate, warmup=0.1, head_seed=seed
    )
    told: dict[str, Any] = {}

    def epsilon(trainer: Trainer, module: LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["eps"] = 1e-6 if how.long else 1e-8

    def at_rung(trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == rung and "rung" not in told:
            before = passes.forward
            told["rung"] = evaluate(module, choice)  # type: ignore[arg-type]
            told["evaluation"] = passes.forward - before

    monitor = StabilityMonitor("5 steps")
    runner = trainer(
        *how.callbacks(task),
        monitor,
        LambdaCallback(on_train_start=epsilon, on_train_batch_end=at_rung),
        clip=1.0,
        steps=steps_of(options, task, long=how.long),
        root=options.runs,
    )
    passes = Passes(module)
    began = time.perf_counter()
    runner.fit(module, data)
    passes.stop()
    told["seconds"] = time.perf_counter() - began
    told["signs"] = {finding.sign: finding.step for finding in monitor.findings}
    told |= {"steps": runner.global_step, "forward": passes.forward, "backward": passes.backward}
    if rung is not None:
        told["end"] = evaluate(module, choice)
    return {**told, **evaluate(module, data)}


def study(options: Any, task: str, seed: int) -> dict[str, Any]:
    """The chosen run of a study of seeds that takes the steps of a long run."""
    from lightning_ft.functional.seed_pruning import (
        Judged,
        best_first,
        budget,
        rank,
        rung_step,
    )

    horizon, long = (steps_of(options, task, long=which) for which in (False, True))
    started, finished = budget(long / horizon, RUNG)
    rung = rung_step(horizon, RUNG)
    name = f"{task}-seeds-{RATE:g}-{horizon}"
    runs = {
        number: kept(options.runs, f"{name}-{number}", partial(run, options, task, "3 epochs", number, rung=rung))
        # No run is in two studies, nor among those of the other methods.
        for number in range(1000 * (seed + 1), 1000 * (seed + 1) + started)
    }

    def judged(when: str, numbers: Any) -> dict[int, Any]:
        return {n: Judged(runs[n][when]["accuracy"], runs[n][when]["loss"]) for n in numbers}

    chance = next(iter(runs.values()))["rung"]["commonest"]
    going = rank(judged("rung", runs), finished, chance=chance, classes=2).kept
    # Where all have collapsed the command chooses none; the first one stands for what that is worth.
    chosen = runs[best_first(judged("end", going), "max")[0] if going else min(runs)]
    steps = started * rung + len(going) * (horizon - rung)
    forward = steps + (started + len(going)) * chosen["evaluation"]
    costs = {"steps": steps, "forward": forward, "backward": steps}
    return {**chosen, **costs, "seconds": sum(one["seconds"] for one in runs.values())}


# ---- table and picture

Results = dict[str, dict[str, list[dict[str, Any]]]]


def failed(one: dict[str, Any]) -> bool:
    """No better than always answering the commonest label."""
    return one["accuracy"] <= one["commonest"] + 1e-6


def table(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """What each method's runs on a task came to."""
    rows = []
    for method, runs in found.items():
        scores = [one["accuracy"] for one in runs]
        seen = [min(one["signs"].values()) for one in runs if one["signs"]]
        rows.append(
            {
                "method": method,
                "mean": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else None,
                "worst": min(scores),
                "best": max(scores),
                "failed": sum(map(failed, runs)),
                "alarms": len(seen),
                "first alarm, step": f"{min(seen)}–{max(seen)}" if seen else None,
                "seeds": len(runs),
                "steps": round(mean(one["steps"] for one in runs)),
                "forward": round(mean(one["forward"] for one in runs)),
                "backward": round(mean(one["backward"] for one in runs)),
            }
        )
    return rows


def draw(results: Results, path: Path) -> None:
    """A panel for each task: every run's accuracy by method, failed ones as crosses, the commonest label as a line."""
    figure = new_figure(path, 6 * len(results), 4.6)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (task, found) in zip(panels, results.items(), strict=True):
        for x, runs in enumerate(found.values()):
            # Runs of one accuracy, side by side.
            seen = Counter[float]()
            for one in runs:
                number = seen[one["accuracy"]]
                seen[one["accuracy"]] += 1
                place = x + 0.09 * ((number + 1) // 2) * (-1) ** number
                style = {"marker": "x", "color": "#bb3333"} if failed(one) else {"marker": "o", "color": "#33669988"}
                panel.scatter(place, 100 * one["accuracy"], s=26, **style)
            average = 100 * mean(one["accuracy"] for one in runs)
            panel.plot([x - 0.3, x + 0.3], [average, average], color="#222222")
        commonest = next(iter(found.values()))[0]["commonest"]
        panel.axhline(100 * commonest, color="#888888", linestyle="--", linewidth=1)
        panel.set_xticks(range(len(found)), found, rotation=40, ha="right")
        panel.set_ylabel("dev accuracy, %")
        panel.set_title(f"{task}, {ROWS[task]} rows (dashed: the commonest label; crosses: failed)", fontsize="medium")
    save_figure(figure, path)


def main() -> None:
    options = begin(__doc__, TASKS, [*METHODS, SEEDS], steps=200, seeds=10)
    options.rows, options.seeds = (48, 2) if options.quick else (10**9, options.seeds)

    results: Results = {task: {method: [] for method in options.methods} for task in options.tasks}
    for seed in range(options.seeds):
        for task, found in results.items():
            for method, runs in found.items():
                if method == SEEDS:
                    runs.append(study(options, task, seed))
                    continue
                steps = steps_of(options, task, long=METHODS[method].long)
                name = f"{task}-{method.replace(', ', '-').replace(' ', '-')}-{METHODS[method].rate:g}-{steps}-{seed}"
                runs.append(kept(options.runs, name, partial(run, options, task, method, seed)))
    draw(results, options.results / "stability.png")
    tables = {f"Dev accuracy, {task}, {ROWS[task]} rows": table(found) for task, found in results.items()}
    setting = f"batches of {BATCH}, learning rate {RATE:g}, {options.steps} steps of a long run"
    finish("stability", options, tables, results, setting=setting)


if __name__ == "__main__":
    main()
