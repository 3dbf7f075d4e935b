"""What anchors cost: L2SP and EWC a step, the Fisher information, memory; and Avalanche's EWC beside ours. On the CPU.

Added to a step: what the callbacks do in each step, Python included, repeated inside fits whose optimiser steps nothing
(the decoupled pulls are hooks on it), over a training step of the same model on 32 x 64 tokens under Lightning. All
fits are open at once, each with a model of its own moved a little off its anchor, and everything takes turns. "by
autograd" is the usual way, α/2 Σ(θ - θ⁰)² added to the loss: its own forward and backward. EWC has the Fisher
information of SST-2 rows, in which most words of the vocabulary do not occur and weigh nothing; "every row weighs" has
random numbers instead.

Step time: whole training steps with and without.

Fisher: ``fisher_diagonal`` over the same examples as a plain forward and backward over batches, in eval mode, with as
many backward passes through the same graph. What it does once (three examples both ways, to see that they agree) is in
its time.

Memory: each in a process of its own, its highest resident memory (VmHWM) over that of the same process without it;
beside it what of its memory was anonymous and what were pages of files when training ended.

Two tasks: TREC-6, then Banking77, with our EWC and with Avalanche's plugin (from `make rivals`): see _two_tasks.py.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from _passes import Batch, Pass, inside_fit, random_batches, step_hooks
from _rivals import AVALANCHE, answers, begin, find_rival, rival_option, tell
from _timing import (
    DATA,
    Clock,
    Row,
    Seconds,
    arguments,
    compare,
    fit,
    interleave,
    loader,
    needs,
    publish,
    repeat,
    start,
)
from _timing import trainer as lightning_trainer
from _two_tasks import two_tasks
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from transformers import AutoConfig, AutoModel

from lightning_ft.callbacks import EWC, L2SP
from lightning_ft.core.fisher import Fisher, Variant
from lightning_ft.data import ClassificationData
from lightning_ft.demo import prepare_model
from lightning_ft.functional.fisher import as_measured, fisher_diagonal
from lightning_ft.modules import SequenceClassification

PARTS = ("added", "step", "fisher", "memory", "tasks")
PLAIN, AUTOGRAD = "without", "by autograd, α/2 Σ(θ - θ⁰)² in the loss"
EXACT, BACKWARD, LOOP = "exact", "plain backward", "exact, batches of one"
TARGETS = {"coupled": 1.5, "decoupled": 0.8}
STRENGTH = 0.01
MB = 1e6


class Size(NamedTuple):
    """How much is run."""

    rounds: int
    batch: int = 32
    length: int = 64
    steps: int = 14
    dropped: int = 4
    repeats: int = 20
    fisher_rounds: int = 3
    fisher_rows: int = 256
    memory_steps: int = 4


# ---- added to a step


class _Penalised(SequenceClassification):
    """L2-SP as it is usually written."""

    def on_fit_start(self) -> None:
        """Copy the pretrained weights."""
        self.anchor = [parameter.detach().clone() for parameter in self.model.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The penalty in the loss."""
        return super().training_step(batch, batch_idx) + penalty(self, self.anchor)


def penalty(module: SequenceClassification, anchor: Sequence[Tensor]) -> Tensor:
    """α/2 Σ(θ - θ⁰)², with its graph."""
    pairs = zip(module.model.parameters(), anchor, strict=True)
    total: Tensor = STRENGTH / 2 * sum((theta - origin).square().sum() for theta, origin in pairs)
    return total


def callbacks(fisher: Path) -> dict[str, tuple[Callback, str]]:
    """Each of ours, with its mode."""
    made: dict[str, tuple[Callback, str]] = {}
    for mode in ("coupled", "decoupled"):
        made[f"L2SP, {mode}, matrices"] = (L2SP(STRENGTH, mode), mode)
        made[f"L2SP, {mode}, all"] = (L2SP(STRENGTH, mode, kernels_only=False), mode)
        made[f"EWC, {mode}"] = (EWC(STRENGTH, fisher, mode=mode), mode)
        made[f"EWC, {mode}, in bf16"] = (EWC(STRENGTH, fisher, mode=mode, storage="bf16"), mode)
        made[f"EWC, {mode}, every row weighs"] = (EWC(STRENGTH, dense(fisher), mode=mode), mode)
    return made


def dense(fisher: Path) -> Path:
    """Where the random one is."""
    return fisher.with_name("dense.safetensors")


def write_fishers(folder: Path, data: Path, file: Path, size: Size) -> None:
    """F of SST-2 rows, and random numbers in its place."""
    module = SequenceClassification(folder, num_labels=2)
    found = fisher_diagonal(module, sst2(folder, data, size), "sampled", limit=size.fisher_rows)
    # Fits it for any weights: those of a trial are drawn anew each time.
    Fisher(found.tensors, found.examples, found.variant).save(file)
    generator = torch.Generator().manual_seed(0)
    random = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in found.tensors.items()}
    Fisher(random, 1, "exact").save(dense(file))


def added(folder: Path, fisher: Path, size: Size) -> tuple[dict[str, list[Row]], Seconds]:
    """Each pass, and a training step, in turns."""
    batches = random_batches(size.batch, size.length, size.steps)
    trained = SequenceClassification(folder, num_labels=2)
    modes = {name: mode for name, (_, mode) in callbacks(fisher).items()}
    actions: dict[str, Callable[[], float]] = {PLAIN: lambda: fit(trained, loader(batches)).step(size.dropped)}
    seconds: dict[str, list[float]] = {}

    def run() -> None:
        seconds.update(interleave(actions, size.rounds))

    def opened(left: list[tuple[str, Callback, Pass]]) -> None:
        """Open a fit inside the one before, until all are."""
        if not left:
            run()
            return
        (name, callback, action), *others = left

        def inside(trainer: Trainer, module: SequenceClassification) -> None:
            nudge(module)
            actions[name] = lambda: repeat(lambda: action(trainer, module), size.repeats)
            opened(others)

        inside_fit(folder, callback, inside, random_batches(2, 8, 1)[0])

    opened(
        [(name, callback, _hook(callback, mode)) for name, (callback, mode) in callbacks(fisher).items()] + _autograd()
    )
    step = median(seconds[PLAIN])
    rows = [share(name, times, step, TARGETS.get(modes.get(name, ""))) for name, times in seconds.items()]
    return {"Added to a step": rows}, seconds


def _hook(callback: Callback, mode: str) -> Pass:
    """All that a callback does in a step: a coupled one has a hook on the optimiser, too, which counts."""

    def both(trainer: Trainer, module: SequenceClassification) -> None:
        callback.on_before_optimizer_step(trainer, module, trainer.optimizers[0])
        step_hooks(trainer, module)

    return both


def _autograd() -> list[tuple[str, Callback, Pass]]:
    anchor: list[Tensor] = []

    def action(trainer: Trainer, module: SequenceClassification) -> None:
        if not anchor:
            anchor.extend(parameter.detach() + 1e-4 for parameter in module.model.parameters())
        penalty(module, anchor).backward()

    return [(AUTOGRAD, Callback(), action)]


@torch.no_grad()
def nudge(module: SequenceClassification) -> None:
    """Weights that have moved, as in training."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=1e-4)


def share(name: str, seconds: Sequence[float], step: float, target: float | None) -> Row:
    """What was added, and again (A/A), as a share of a step."""
    again = [after / before for before, after in zip(seconds[::2], seconds[1::2], strict=True)]
    low, _, high = quantiles(again, n=4, method="inclusive") if len(again) > 1 else again * 3
    taken = median(seconds)
    row = {"added to a step": name, "ms": 1e3 * taken, "A/A": median(again), "A/A quartiles": [low, high]}
    part = 100 * taken / step
    verdict = None if target is None else "met" if part <= target else "missed"
    return {**row, "% of a step": part, "target, %": target, "verdict": verdict}


# ---- whole steps


def step_time(folder: Path, fisher: Path, size: Size) -> tuple[dict[str, list[Row]], Seconds]:
    """Whole training steps with each over those without."""
    batches = random_batches(size.batch, size.length, size.steps)
    module, penalised = SequenceClassification(folder, num_labels=2), _Penalised(folder, num_labels=2)
    contestants: dict[str, Callable[[], float]] = {
        PLAIN: lambda: fit(module, loader(batches)).step(size.dropped),
        AUTOGRAD: lambda: fit(penalised, loader(batches)).step(size.dropped),
    }
    for name, (callback, _) in callbacks(fisher).items():
        if "bf16" not in name and "matrices" not in name:
            contestants[name] = lambda callback=callback: fit_with(callback, module, batches).step(size.dropped)  # type: ignore[misc]
    seconds = interleave(contestants, size.rounds)
    return {"Step time": against(seconds, PLAIN)}, seconds


def fit_with(callback: Callback, module: SequenceClassification, batches: Sequence[Batch]) -> Clock:
    """One epoch under Lightning with a callback of ours."""
    clock = Clock()
    hooks = LambdaCallback(on_train_epoch_start=clock, on_train_batch_end=clock, on_train_epoch_end=clock)
    lightning_trainer(callback, hooks).fit(module, loader(batches))
    return clock


def against(seconds: Seconds, plain: str, targets: Mapping[str, float] | None = None) -> list[Row]:
    """Everyone's time over one's, each A/A row once, below."""
    rows = [
        row for name in seconds if name != plain for row in compare(seconds, name, {plain: (targets or {}).get(name)})
    ]
    unique = {row["comparison"]: row for row in rows}.values()
    return sorted(unique, key=lambda row: row["comparison"].startswith("A/A"))


# ---- Fisher


def sst2(folder: Path, data: Path, size: Size) -> list[Batch]:
    """Real rows, as they are batched."""
    rows = Dataset.from_json(str(data / "sst2" / "train.jsonl")).select(range(size.fisher_rows))
    labels = sorted({str(label) for label in rows["label"]})
    source = ClassificationData(str(folder), train=rows, labels=labels, batch_size=size.batch, seed=0)
    source.prepare_data()
    source.setup("fit")
    return list(source.train_dataloader())


def fisher_cases(folder: Path, data: Path, size: Size) -> Iterator[tuple[str, list[Batch], int]]:
    """Examples, and the number of classes."""
    yield "SST-2, 2 classes", sst2(folder, data, size), 2
    rectangles = random_batches(size.batch, size.length, max(1, size.fisher_rows // size.batch))
    yield f"{size.batch} x {size.length} tokens, 2 classes", rectangles, 2
    yield f"{size.batch} x {size.length} tokens, 6 classes", rectangles, 6


def backward(module: SequenceClassification, batches: Sequence[Batch], classes: int) -> int:
    """Forward, and C - 1 backward passes that leave gradients, over each batch; returns how many passes there were."""
    passes = 0
    with as_measured(module):
        for batch in batches:
            module.zero_grad()
            terms = module.log_likelihood_terms(batch)
            scores = list(terms.scores("exact")) if classes > 2 else list(terms.scores("empirical"))
            for number, score in enumerate(scores, 1):
                terms.outputs.backward(score, retain_graph=number < len(scores))
            passes += len(scores)
    return passes // len(batches)


def timed(action: Callable[[], object]) -> float:
    """Seconds of an action."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def fisher_time(folder: Path, data: Path, size: Size) -> tuple[dict[str, list[Row]], dict[str, Seconds]]:
    """Each way of each variant over a plain backward."""
    table: list[Row] = []
    ratios: list[Row] = []
    everything: dict[str, Seconds] = {}
    for title, batches, classes in fisher_cases(folder, data, size):
        module = SequenceClassification(folder, num_labels=classes)
        ways: dict[str, Callable[[], object]] = {BACKWARD: lambda m=module, b=batches, c=classes: backward(m, b, c)}  # type: ignore[misc]
        if classes > 2:
            ways[f"{BACKWARD}, one pass"] = lambda m=module, b=batches: backward(m, b, 2)  # type: ignore[misc]
        for variant in ("exact", "sampled", "empirical"):
            ways[variant] = _estimate(module, batches, variant, None)
        ways[LOOP] = _estimate(module, batches, "exact", False)
        contestants = {name: lambda way=way: timed(way) for name, way in ways.items()}
        seconds = interleave(contestants, size.fisher_rounds)
        everything[title] = seconds
        examples = sum(len(batch["labels"]) for batch in batches)
        for name, times in seconds.items():
            passes = classes - 1 if name in (EXACT, LOOP, BACKWARD) else 1
            each = {"s": median(times), "ms per example and pass": 1e3 * median(times) / examples / passes}
            table.append({"data": title, "what": name, "examples": examples, "passes": passes, **each})
        ratios += [{"data": title, **row} for row in _fisher_ratios(seconds, classes)]
    return {"Fisher information": table, "Fisher information, ratios": ratios}, everything


def _fisher_ratios(seconds: Seconds, classes: int) -> list[Row]:
    """Over as many backward passes."""
    single = f"{BACKWARD}, one pass" if classes > 2 else BACKWARD
    several = {name: seconds[name] for name in (EXACT, LOOP, BACKWARD)}
    one = {name: seconds[name] for name in ("sampled", "empirical", single)}
    rows = [*against(several, BACKWARD, {EXACT: 2.0}), *compare(seconds, EXACT, {LOOP: 1.0}), *against(one, single)]
    unique = {row["comparison"]: row for row in rows}.values()
    return sorted(unique, key=lambda row: row["comparison"].startswith("A/A"))


def _estimate(
    module: SequenceClassification, batches: Sequence[Batch], variant: Variant, vectorise: bool | None
) -> Callable[[], Fisher]:
    return lambda: fisher_diagonal(module, batches, variant, vectorise=vectorise)


# ---- memory

TRAINED = "training"
ESTIMATED = "plain forward and backward"
CHILDREN = {
    TRAINED: TRAINED,
    **{f"L2SP, {place}": TRAINED for place in ("device", "bf16", "cpu", "disk")},
    **{f"EWC, {place}": TRAINED for place in ("device", "bf16", "cpu", "disk")},
    AUTOGRAD: TRAINED,
    ESTIMATED: ESTIMATED,
    "Fisher, batches whole": ESTIMATED,
    "Fisher, batches of one": ESTIMATED,
}
"""Each with what it is compared with."""


def child(options: Namespace, name: str, size: Size) -> None:
    """In a process of its own: do it, and tell how much memory it took."""
    folder, fisher = options.model, options.fisher
    batches = random_batches(size.batch, size.length, size.memory_steps)
    kind = _Penalised if name == AUTOGRAD else SequenceClassification
    module = kind(folder, num_labels=2)
    seen: dict[str, float] = {}
    look = LambdaCallback(on_train_batch_end=lambda *_: seen.update(memory()))
    if CHILDREN[name] == TRAINED:
        owner, _, place = name.partition(", ")
        chosen: list[Callback] = []
        if owner == "L2SP":
            chosen = [L2SP(STRENGTH, kernels_only=False, storage=place)]  # type: ignore[arg-type]
        elif owner == "EWC":
            chosen = [EWC(STRENGTH, fisher, storage=place)]  # type: ignore[arg-type]
        os.chdir(folder.parent)  # the disk's file, if the pretrained checkpoint does not serve
        lightning_trainer(*chosen, look).fit(module, loader(batches))
    elif name == ESTIMATED:
        backward(module, batches, 2)
        seen = memory()
    else:
        kept = fisher_diagonal(module, batches, vectorise=name.endswith("whole"))
        seen = memory()
        del kept
    tell({**seen, "VmHWM": memory()["VmHWM"], "model": sum(4 * p.numel() for p in module.parameters()) / MB})


def memory() -> dict[str, float]:
    """Of this process, in MB. Not ru_maxrss, which begins with what the parent had when it started this one."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM", "RssAnon", "RssFile")))
    return {name: 1024 * int(value.split()[0]) / MB for name, value in values.items()}


def memory_table(options: Namespace, folder: Path, fisher: Path, size: Size) -> tuple[dict[str, list[Row]], Any]:
    """Each, run twice, over the same process without it."""
    quick = ["--quick"] if options.quick else []
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CHILDREN if name in options.children}
    for _ in range(1 if options.quick else 2):
        for some in [list(runs)] if options.quick else [[name] for name in runs]:
            command = [f"--model={folder}", f"--fisher={fisher}", *quick, "--children", *some]
            for name, told in zip(some, answers(begin(sys.executable, __file__, *command)), strict=True):
                runs[name].append(told)
    rows = []
    for name, told in runs.items():
        plain = runs[CHILDREN[name]]
        row: Row = {"what": name, "peak, MB": told[0]["VmHWM"], "again (A/A), MB": told[-1]["VmHWM"]}
        if name != CHILDREN[name]:
            for title, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"), ("pages of files", "RssFile")):
                more = median(run[key] for run in told) - median(run[key] for run in plain)
                row[f"more {title}, MB"] = more
        rows.append({**row, "model, MB": told[0]["model"]})
    return {"Memory": rows}, runs


# ---- everything


def narrow(folder: Path) -> None:
    """Random weights instead, of so few that a trial takes no time."""
    config = AutoConfig.from_pretrained(folder, hidden_size=12, intermediate_size=12, num_hidden_layers=2)
    AutoModel.from_config(config).save_pretrained(folder)


def setting(part: str, options: Namespace, size: Size, version: str | None) -> str:
    """The line below a part's tables."""
    model = "A tiny model" if options.quick else "all-MiniLM-L6-v2"
    tasks = f"{options.rows} rows of TREC-6, then of Banking77, {options.epochs} epochs each, {options.seeds} seeds"
    said = {
        "memory": f"{size.memory_steps} steps, or {size.memory_steps} batches",
        "added": f"Medians of {2 * size.rounds} x {size.repeats}",
        "step": f"{2 * size.rounds} segments of {size.steps} steps, the first {size.dropped} dropped",
        "fisher": f"{size.fisher_rows} examples, {2 * size.fisher_rounds} times",
        "tasks": f"{tasks}; {AVALANCHE} {version or 'was left out'}",
    }
    if part == "tasks":
        return f"{model}, AdamW, gradients clipped at 1. {said[part]}."
    return f"{model}, batches of {size.batch} x {size.length} random tokens, AdamW, no clipping, seed 0. {said[part]}."


def main() -> None:
    parser = arguments(__doc__)
    rival_option(parser, AVALANCHE)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds sst2/, trec6/ and banking77/")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=1024, help="training rows of each of the two tasks")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="of each of the two tasks")
    parser.add_argument("--strengths", type=float, nargs="+", default=[3e3, 3e4], help="λ on the second task")
    for hidden in ("--model", "--fisher"):
        parser.add_argument(hidden, type=Path, help=SUPPRESS)
    parser.add_argument("--children", nargs="+", help=SUPPRESS)
    options = start(parser)
    size = Size(1, 2, 8, 4, 1, 2, 1, 4, 2) if options.quick else Size(options.rounds)
    if options.children:
        for name in options.children:
            child(options, name, size)
        return
    options.children = list(CHILDREN)
    if options.quick:
        options.rows, options.epochs, options.seeds, options.strengths = 96, 1, 1, options.strengths[:1]
        options.children = [TRAINED, "L2SP, device", ESTIMATED, "Fisher, batches whole"]
    for task in ("sst2", "trec6", "banking77"):
        needs(options.data / task / "train.jsonl")
    version = find_rival(options.rival, AVALANCHE) if "tasks" in options.parts else None
    with tempfile.TemporaryDirectory() as root:
        folder, fisher = Path(root) / "model", Path(root) / "fisher.safetensors"
        prepare_model(folder)
        if options.quick:
            narrow(folder)
        write_fishers(folder, options.data, fisher, size)
        measured: dict[str, Callable[[], tuple[dict[str, list[Row]], Any]]] = {
            # First: nothing else is in the way.
            "memory": lambda: memory_table(options, folder, fisher, size),
            "added": lambda: added(folder, fisher, size),
            "step": lambda: step_time(folder, fisher, size),
            "fisher": lambda: fisher_time(folder, options.data, size),
            "tasks": lambda: two_tasks(options, folder, version),
        }
        for part, measure in measured.items():
            if part in options.parts:
                tables, seconds = measure()
                text = setting(part, options, size, version)
                publish(f"anchors_{part}", options.results, setting=text, tables=tables, seconds=seconds)


if __name__ == "__main__":
    main()
