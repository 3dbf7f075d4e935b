"""TREC-6, then Banking77: plain fine-tuning, our EWC, and the EWC plugin of Avalanche, each in a process of its own.

All start from the same model, trained on TREC-6, with a new head, and train under Lightning with the same module,
batches and optimiser. Avalanche's plugin is driven by its own hooks: ``after_training_exp`` computes its Fisher
information over batches of the size that it trains with, ``before_backward`` adds its penalty to the loss, in
``training_step``. Its entries for the head are taken out, as its multi-head classifiers have them under names of their
own. Its penalty is λ Σ F (θ - θ*)² without the ½ of the paper: λ/2 is what it gets for λ ("its λ: same"); and as its F
is the square of a batch's mean gradient, also that times our exact trace over its own ("trace matched").
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _rivals import AVALANCHE, answers, begin, tell
from _timing import Clock, Row, arguments, repeat, start, trainer
from datasets import Dataset as Table
from lightning import seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import BatchEncoding

from lightning_ft.callbacks import EWC
from lightning_ft.core.layers import Layers
from lightning_ft.data import ClassificationData
from lightning_ft.functional.fisher import fisher_diagonal
from lightning_ft.modules import SequenceClassification

OLD, NEW = "trec6", "banking77"
PLAIN, OURS = "plain fine-tuning", "EWC"
BATCH, RATE, DEV_ROWS = 32, 2e-4, 500
Result = dict[str, Any]


# ---- data and models


def data_of(options: Any, task: str) -> ClassificationData:
    """The first rows of a task, with all of its labels."""
    rows = {
        name: Table.from_json(str(options.data / task / f"{split}.jsonl"))
        for name, split in (("train", "train"), ("val", "dev"))
    }
    labels = sorted({str(label) for label in rows["train"]["label"]})
    counts = {"train": options.rows, "val": min(DEV_ROWS, options.rows)}
    parts = {name: part.select(range(min(counts[name], len(part)))) for name, part in rows.items()}
    return ClassificationData(str(options.model), **parts, labels=labels, batch_size=BATCH, seed=options.seed)


def module_of(
    options: Any, data: ClassificationData, kind: type[SequenceClassification] = SequenceClassification
) -> SequenceClassification:
    """The pretrained model with a new head."""
    return kind(str(options.model), data.labels, learning_rate=RATE, head_seed=options.seed)


def head_names(module: SequenceClassification) -> set[str]:
    """The parameters that no task shares."""
    return {name for name, _ in Layers().of(module).named_parameters("head")}


def old_state(options: Any) -> Path:
    """Where the model of the old task is."""
    path: Path = options.work / f"old-{options.seed}.pt"
    return path


def old_module(options: Any, data: ClassificationData) -> SequenceClassification:
    """The model that has learned the old task."""
    module = module_of(options, data)
    module.load_state_dict(torch.load(old_state(options), weights_only=True))
    return module


def new_module(
    options: Any, data: ClassificationData, kind: type[SequenceClassification] = SequenceClassification
) -> SequenceClassification:
    """That model with a new head for the new task."""
    module = module_of(options, data, kind)
    body = torch.load(old_state(options), weights_only=True)
    module.load_state_dict({n: t for n, t in body.items() if n not in head_names(module)}, strict=False)
    return module


def train(
    options: Any, module: SequenceClassification, data: ClassificationData, *callbacks: Callback
) -> dict[str, float]:
    """Fit; seconds in all and of a step."""
    seed_everything(options.seed, verbose=False)
    clock = Clock()
    hooks = LambdaCallback(on_train_batch_end=clock)
    runner = trainer(*callbacks, hooks, clip=1.0, epochs=options.epochs)
    began = time.perf_counter()
    runner.fit(module, data)
    fitted = time.perf_counter() - began
    return {"fit": fitted, "step": median(after - before for before, after in pairwise(clock.stamps))}


@torch.no_grad()
def accuracy(module: SequenceClassification, data: ClassificationData) -> float:
    """On the dev rows."""
    module.eval()
    data.setup("validate")
    hits = [module(batch).argmax(-1) == batch["labels"] for batch in data.val_dataloader()]
    return torch.cat(hits).float().mean().item()


def old_accuracy(options: Any, module: SequenceClassification) -> float:
    """Of the body that has learned both tasks, with the old task's head."""
    data = data_of(options, OLD)
    old = old_module(options, data)
    head = head_names(old)
    old.load_state_dict({n: t for n, t in module.state_dict().items() if n not in head}, strict=False)
    return accuracy(old, data)


# ---- the old task's examples


class OldRows(Dataset[dict[str, Tensor]]):
    """Rows of the old task, of which batches of any size can be made."""

    def __init__(self, data: ClassificationData) -> None:
        data.setup("fit")
        self.rows = [
            {"input_ids": ids[mask.bool()], "labels": label}
            for batch in data.train_dataloader()
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]

    @staticmethod
    def batch(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As ours takes it."""
        ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack([row["labels"] for row in rows])}

    @classmethod
    def collate_fn(cls, rows: Sequence[dict[str, Tensor]]) -> tuple[BatchEncoding, Tensor, Tensor]:
        """As Avalanche takes it: inputs, labels, the number of the task."""
        batch = cls.batch(rows)
        labels = batch.pop("labels")
        return BatchEncoding(batch), labels, torch.zeros_like(labels)


def measured(action: Callable[[], Any], times: int) -> tuple[Any, list[float]]:
    """The last result, and the seconds of each time."""
    seconds, result = [], None
    for _ in range(times):
        began = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - began)
    return result, seconds


# ---- the contestants


def first(options: Any) -> Result:
    """Learn the old task."""
    data = data_of(options, OLD)
    module = module_of(options, data)
    told = train(options, module, data)
    torch.save(module.state_dict(), old_state(options))
    return {**told, "old": accuracy(module, data)}


def plain(options: Any) -> Result:
    """Learn the new task with nothing against forgetting."""
    data = data_of(options, NEW)
    module = new_module(options, data)
    told = train(options, module, data)
    return {"runs": [{"λ": 0.0, **told, "old": old_accuracy(options, module), "new": accuracy(module, data)}]}


def ours(options: Any) -> Result:
    """Our callback."""
    old = old_module(options, data := data_of(options, OLD))
    rows = OldRows(data)
    head = head_names(old)
    fisher, found = [], {}
    for variant in ("exact", "sampled", "empirical"):
        found[variant], seconds = measured(
            lambda v=variant: fisher_diagonal(old, DataLoader(rows, BATCH, collate_fn=rows.batch), v),  # type: ignore[misc]
            options.times,
        )
        fisher.append({"F": variant, "trace": trace(found[variant].tensors, head), "seconds": seconds})
    file = options.work / f"fisher-{options.seed}.safetensors"
    found["exact"].save(file)
    return {"fisher": fisher, "runs": [_ours_at(options, strength, file) for strength in options.strengths]}


def _ours_at(options: Any, strength: float, file: Path) -> Result:
    data = data_of(options, NEW)
    module = new_module(options, data)
    callback, added = EWC(strength, file), []

    def probe(trainer: Any, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        added.append(repeat(lambda: callback.on_before_optimizer_step(trainer, module, optimizer), options.repeats))

    told = train(options, module, data, LambdaCallback(on_train_end=probe), callback)
    scores = {"old": old_accuracy(options, module), "new": accuracy(module, data)}
    return {"λ": strength, "its λ": "", **told, "added": added[0], **scores}


class Theirs(SequenceClassification):
    """Our module, with a plugin's penalty in the loss."""

    plugin: Any
    strategy: Any

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss with the penalty."""
        self.strategy.loss = super().training_step(batch, batch_idx)
        self.plugin.before_backward(self.strategy)
        loss: Tensor = self.strategy.loss
        return loss


def theirs(options: Any) -> Result:
    """Avalanche's plugin."""
    plugins = import_module("avalanche.training.plugins")
    old = old_module(options, data := data_of(options, OLD))
    rows = OldRows(data)
    head = head_names(old)
    optimizer = torch.optim.SGD(old.parameters(), lr=0.0)
    fisher = []
    for size in (BATCH, 1):
        plugin = plugins.EWCPlugin(1.0)
        importances, seconds = measured(
            lambda p=plugin, s=size: p.compute_importances(old, F.cross_entropy, optimizer, rows, "cpu", s),  # type: ignore[misc]
            options.times,
        )
        values = {name: importance.data for name, importance in importances.items()}
        fisher.append({"F": f"batches of {size}", "trace": trace(values, head), "seconds": seconds})
    ratio = options.trace / fisher[0]["trace"]
    strategy = SimpleNamespace(
        model=old,
        _criterion=F.cross_entropy,
        optimizer=optimizer,
        experience=SimpleNamespace(dataset=rows),
        device="cpu",
        train_mb_size=BATCH,
        clock=SimpleNamespace(train_exp_counter=0),
    )
    plugin = plugins.EWCPlugin(1.0)
    plugin.after_training_exp(strategy)
    for kept in (plugin.importances[0], plugin.saved_params[0]):
        for name in head:
            del kept[name]
    runs = [
        {"λ": strength, "its λ": what, **_theirs_at(options, plugin, strength / 2 * factor)}
        for strength in options.strengths
        for what, factor in (("same", 1.0), ("trace matched", ratio))
    ]
    return {"fisher": fisher, "runs": runs}


def _theirs_at(options: Any, plugin: Any, strength: float) -> Result:
    data = data_of(options, NEW)
    module = new_module(options, data, Theirs)
    assert isinstance(module, Theirs)
    plugin.ewc_lambda = strength
    strategy = SimpleNamespace(model=module, device="cpu", clock=SimpleNamespace(train_exp_counter=1))
    module.plugin, module.strategy = plugin, strategy
    added = []

    def penalise() -> None:
        strategy.loss = torch.zeros(())
        plugin.before_backward(strategy)
        strategy.loss.backward()

    told = train(
        options,
        module,
        data,
        LambdaCallback(on_train_end=lambda *_: added.append(repeat(penalise, options.repeats))),
    )
    return {**told, "added": added[0], "old": old_accuracy(options, module), "new": accuracy(module, data)}


def trace(tensors: Any, head: set[str]) -> float:
    """Of the shared parameters."""
    return sum(float(t.sum(dtype=torch.float64)) for name, t in tensors.items() if name not in head)


CONTESTANTS = {"first": first, PLAIN: plain, OURS: ours, AVALANCHE: theirs}


# ---- the parent


def two_tasks(options: Namespace, model: Path, version: str | None) -> tuple[dict[str, list[Row]], Any]:
    """Everyone's runs, and the tables."""
    results: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    names = [name for name in CONTESTANTS if name != AVALANCHE or version]
    given = [f"--data={options.data}", f"--model={model}", f"--rows={options.rows}", f"--epochs={options.epochs}"]
    given += ["--strengths", *map(str, options.strengths), *(["--quick"] if options.quick else [])]
    with tempfile.TemporaryDirectory() as work:
        for seed in range(options.seeds):
            known = 0.0
            for some in shares(options, names):
                python = options.rival if AVALANCHE in some else sys.executable
                asked = [*given, f"--seed={seed}", f"--work={work}", f"--trace={known}", "--contestants", *some]
                for name, told in zip(some, answers(begin(python, __file__, *asked)), strict=True):
                    results[name].append(told)
                    known = told["fisher"][0]["trace"] if name == OURS else known
                print(f"seed {seed}, {', '.join(some)}: done", flush=True)
    tables = {
        "Two tasks, Fisher information": fisher_table(results),
        "Two tasks, a step": step_table(results),
        "Two tasks, dev accuracy": accuracy_table(results),
    }
    return tables, {name: told for name, told in results.items() if told}


def shares(options: Namespace, names: Sequence[str]) -> list[list[str]]:
    """Which contestants share a process: none; in a trial all of an interpreter, whose start takes longer."""
    if not options.quick:
        return [[name] for name in names]
    return [part for part in ([n for n in names if n != AVALANCHE], [n for n in names if n == AVALANCHE]) if part]


def fisher_table(results: dict[str, list[Result]]) -> list[Row]:
    """Size and seconds of each F over the same examples; A/A: the last time over the first."""
    rows = []
    for name in (OURS, AVALANCHE):
        for parts in zip(*(told["fisher"] for told in results[name]), strict=True):
            times = [part["seconds"] for part in parts]
            found = {"trace": mean(part["trace"] for part in parts), "s": median(s for t in times for s in t)}
            again = median(t[-1] / t[0] for t in times)
            rows.append({"contestant": name, "F": parts[0]["F"], **found, "A/A": again})
    return rows


def _by_run(results: dict[str, list[Result]]) -> list[tuple[str, list[Result]]]:
    """Each setting of each contestant, over the seeds."""
    named = ((name, results[name]) for name in (PLAIN, OURS, AVALANCHE) if results[name])
    return [(name, list(runs)) for name, told in named for runs in zip(*(t["runs"] for t in told), strict=True)]


def step_table(results: dict[str, list[Result]]) -> list[Row]:
    """Milliseconds: the penalty alone, and whole steps; the lowest and highest of all runs beside the median."""
    rows = []
    for name in (PLAIN, OURS, AVALANCHE):
        runs = [run for told in results[name] for run in told["runs"]]
        if runs:
            steps, added = [1e3 * run["step"] for run in runs], [1e3 * run["added"] for run in runs if "added" in run]
            row: Row = {"contestant": name, "penalty alone, ms": median(added) if added else None}
            rows.append({**row, "step, ms": median(steps), "lowest, highest": [min(steps), max(steps)]})
    return rows


def accuracy_table(results: dict[str, list[Result]]) -> list[Row]:
    """Means over seeds."""
    before = mean(told["old"] for told in results["first"])
    rows = []
    for name, runs in _by_run(results):
        row: Row = {"contestant": name, "λ": f"{runs[0]['λ']:g}", "its λ": runs[0].get("its λ", ""), "seeds": len(runs)}
        means = {key: mean(run[key] for run in runs) for key in ("old", "new")}
        rows.append({**row, "old, before": before, "old, after": means["old"], "new": means["new"]})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    for path in ("--data", "--model", "--work"):
        parser.add_argument(path, type=Path, required=True)
    for number in ("--rows", "--epochs", "--seed"):
        parser.add_argument(number, type=int, required=True)
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), required=True)
    parser.add_argument("--strengths", type=float, nargs="+", required=True)
    parser.add_argument("--trace", type=float, required=True, help="of our exact F")
    options = start(parser)
    options.times, options.repeats = (1, 1) if options.quick else (3, 50)
    for name in options.contestants:
        tell(CONTESTANTS[name](options))


if __name__ == "__main__":
    main()
