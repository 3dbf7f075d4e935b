"""Gradual unfreezing, with and without a cache of the frozen layers, against finetuning-scheduler. On the CPU.

MiniLM on SST-2 and TREC-6 under Lightning's Trainer, with SequenceClassification for everyone. Four contestants: all
layers from the start; finetuning-scheduler (from `make rivals`) with an explicit schedule and epoch_transitions_only;
GradualUnfreezing with the same phases; and that with FrozenPrefixCache. Weights, head, batches, their order, optimiser
(fused AdamW, no decay for vectors), largest rate, warm-up and linear decay over the whole run are the same for all;
that they train alike is checked first, without dropout, step by step. The cache runs the frozen part without dropout;
the others keep it on. finetuning-scheduler has restore_best=False and an FTSCheckpoint that saves nothing, so that
nobody writes checkpoints; new groups get the schedule (apply_lambdas_new_pgs=True), the common rate, and no decay for
vectors (its no_decay attribute).

Every run is a process of its own. The clock starts right before trainer.fit and is read after each validation:
tokenising, filling the cache and validation count, start of Python and loading of the model do not. A step is timed
from one batch's end to the next one's, so that an epoch's first step, and with it a thaw or a fill, is in the wall time
alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import torch
import yaml
from _rivals import FTS, answers, begin, find_rival, rival_option, tell
from _timing import DATA, Row, arguments, compare, machine, needs, publish, save, start
from datasets import Dataset
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoConfig, BertConfig

from lightning_ft.callbacks import FrozenPrefixCache, GradualUnfreezing
from lightning_ft.core.files import atomic_file
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers
from lightning_ft.core.phases import Phase
from lightning_ft.data import ClassificationData
from lightning_ft.demo import prepare_model
from lightning_ft.modules import Architecture, SequenceClassification

FULL, OURS, CACHED = "full fine-tuning", "GradualUnfreezing", "GradualUnfreezing + FrozenPrefixCache"
CONTESTANTS = (FULL, FTS, OURS, CACHED)
TASKS = ("sst2", "trec6")
WARMUP, TOLERANCE = 0.1, 1e-4
NO_DECAY = ["bias", "LayerNorm.weight"]
Result = dict[str, Any]
Results = dict[str, list[Result]]


# ---- the phases, for each contestant


class Step(NamedTuple):
    """What is released at the beginning of an epoch."""

    what: str
    epoch: int

    @property
    def select(self) -> str | list[str]:
        """For ``LayerGroups.select``; the pooler belongs to the head."""
        return ["tail", "head"] if self.what == "head" else self.what


def read_phases(text: str, epochs: int) -> list[Step]:
    """Phases such as ``head@0,top:2@1``, as far as the epochs reach."""
    steps = [Step(what, int(epoch)) for what, epoch in (part.rsplit("@", 1) for part in text.split(","))]
    return [step for step in steps if step.epoch < epochs]


def our_callback(steps: Sequence[Step]) -> GradualUnfreezing:
    """Ours."""
    first, *others = steps
    later = [Phase(step.select, f"{step.epoch} epochs") for step in others]
    return GradualUnfreezing(phases=[Phase(first.select), *later])


def their_callbacks(steps: Sequence[Step], module: LightningModule, epochs: int) -> list[Callback]:
    """The rival's: each phase names what is new in it, and the epoch at which the next one begins."""
    fts = import_module("finetuning_scheduler")
    module.no_decay = NO_DECAY  # type: ignore[assignment]
    ends = [*(step.epoch for step in steps[1:]), epochs]
    rate = module.learning_rate
    schedule: dict[int, Row] = {
        number: {"params": names, "max_transition_epoch": end, **({"lr": rate} if number else {})}
        for number, (names, end) in enumerate(zip(released(Layers().of(module), steps), ends, strict=True))
    }
    scheduler = fts.FinetuningScheduler(
        ft_schedule=schedule,
        base_max_lr=rate,
        restore_best=False,
        epoch_transitions_only=True,
        apply_lambdas_new_pgs=True,
        logging_level=40,
    )
    return [scheduler, fts.FTSCheckpoint(monitor="val_loss", save_top_k=0)]


def released(groups: LayerGroups, steps: Sequence[Step]) -> list[list[str]]:
    """Names of the parameters that each phase adds."""
    known: set[str] = set()
    phases = []
    for step in steps:
        names = [name for group in groups.select(step.select) for name, _ in groups.named_parameters(group)]
        phases.append([name for name in names if name not in known])
        known.update(names)
    return phases


# ---- one run, in a process of its own


class Stopwatch(Callback):
    """Wall time, training time and accuracy after each epoch; when each batch of each epoch ended."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.epochs: list[Row] = []
        self.losses: list[torch.Tensor] = []
        self._validation = self._since = 0.0
        self.began = time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        """A new list of batches."""
        self.batches.append([])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """One more batch."""
        self.batches[-1].append(time.perf_counter())
        self.losses.append(outputs["loss"])

    def on_validation_start(self, *_: Any) -> None:
        """The training is interrupted."""
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over, as a user sees it."""
        now = time.perf_counter()
        self._validation += now - self._since
        wall = now - self.began
        accuracy = trainer.callback_metrics["val_accuracy"].item()
        self.epochs.append({"wall": wall, "training": wall - self._validation, "accuracy": accuracy})

    def steps(self, steps: Sequence[Step]) -> list[float]:
        """Median seconds of a step in each phase."""
        ends = [*(step.epoch for step in steps[1:]), len(self.batches)]
        parts = [self.batches[step.epoch : end] for step, end in zip(steps, ends, strict=True)]
        return [median(b - a for batches in part for a, b in pairwise(batches)) for part in parts]


def run(options: Any, name: str, seed: int) -> Result:
    """Train once."""
    seed_everything(seed, verbose=False)
    steps = read_phases(options.phases, options.epochs)
    folder = options.data / options.contestant_task
    rows = {
        name: Dataset.from_json(str(folder / f"{split}.jsonl")) for name, split in (("train", "train"), ("val", "dev"))
    }
    labels = sorted({str(label) for label in rows["train"]["label"]})
    counts = {"train": options.rows, "val": options.dev_rows}
    parts = {name: part.select(range(min(counts[name], len(part)))) for name, part in rows.items()}
    data = ClassificationData(str(options.model), **parts, labels=labels, batch_size=options.batch, seed=seed)
    module = SequenceClassification(
        str(options.model), labels, learning_rate=options.learning_rate, warmup=WARMUP, head_seed=seed
    )
    cache = FrozenPrefixCache()
    callbacks: dict[str, list[Callback]] = {FULL: [], OURS: [our_callback(steps)], CACHED: [our_callback(steps), cache]}
    chosen = their_callbacks(steps, module, options.epochs) if name == FTS else callbacks[name]
    if options.check:
        for layer in module.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
    with tempfile.TemporaryDirectory() as root:
        watch = Stopwatch()
        runner = trainer(Path(root), options.epochs, [*chosen, watch])
        watch.began = time.perf_counter()
        runner.fit(module, data)
    phases = [Step("all", 0)] if name == FULL else steps
    memory = [dict(row) for row in cache.report().rows] if name == CACHED else []
    result = {"contestant": name, "seed": seed, "epochs": watch.epochs, "steps": watch.steps(phases), "cache": memory}
    return {**result, "losses": [loss.item() for loss in watch.losses]} if options.check else result


def trainer(root: Path, epochs: int, callbacks: list[Callback]) -> Trainer:
    """Lightning's, quiet; it validates after each epoch and writes nothing."""
    checkpoints = any(type(callback).__name__ == "FTSCheckpoint" for callback in callbacks)
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=root,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


# ---- how many phases each makes by default


def shapes(model: Path) -> dict[str, Any]:
    """Configurations with the blocks of two models; narrow, because the phases do not depend on the width."""
    narrow = {"hidden_size": 12, "num_attention_heads": 12, "intermediate_size": 12, "vocab_size": 10}
    small = AutoConfig.from_pretrained(model, **narrow)
    return {"MiniLM, 6 blocks": small, "BERT-base, 12 blocks": BertConfig(**narrow)}


def our_phases(model: Path) -> dict[str, int]:
    """Ours, for each model."""
    modules = {
        name: SequenceClassification(Architecture(config), num_labels=2) for name, config in shapes(model).items()
    }
    return {name: len(GradualUnfreezing().stages(module)) for name, module in modules.items()}


def their_phases(model: Path) -> dict[str, int]:
    """The rival's, read from the schedule that it writes."""
    fts = import_module("finetuning_scheduler")
    counts = {}
    for name, config in shapes(model).items():
        module = SequenceClassification(Architecture(config), num_labels=2)
        with tempfile.TemporaryDirectory() as root:
            writer = fts.FinetuningScheduler(gen_ft_sched_only=True, logging_level=40)
            checkpoint = fts.FTSCheckpoint(monitor="val_loss")
            with suppress(SystemExit):
                trainer(Path(root), 1, [writer, checkpoint]).fit(module, DataLoader([0]))  # type: ignore[arg-type]
            (file,) = Path(root).rglob("*_ft_schedule.yaml")
            counts[name] = len(yaml.safe_load(file.read_text(encoding="utf-8")))
    return counts


def phases_table(ours: dict[str, int], theirs: dict[str, int], steps: Sequence[Step]) -> list[Row]:
    """A row for each model, and one for this benchmark."""
    rows = [{"model": name, **({FTS: theirs[name]} if theirs else {}), OURS: ours[name]} for name in ours]
    return [*rows, {"model": "here, both", **({FTS: len(steps)} if theirs else {}), OURS: len(steps)}]


# ---- tables


def curve(runs: Sequence[Result], what: str) -> list[float]:
    """Mean over seeds after each epoch."""
    return [mean(values) for values in zip(*([epoch[what] for epoch in run["epochs"]] for run in runs), strict=True)]


def accuracy_table(results: Results) -> list[Row]:
    """Best and last epoch of each run: mean and standard deviation over seeds."""
    rows = []
    for name, runs in results.items():
        scores = [[epoch["accuracy"] for epoch in run["epochs"]] for run in runs]
        row: Row = {"contestant": name, "seeds": len(runs)}
        for which, values in (("best", [max(s) for s in scores]), ("last", [s[-1] for s in scores])):
            row |= {f"{which}, mean": mean(values), f"{which}, std": stdev(values) if len(values) > 1 else None}
        rows.append(row)
    return rows


def curve_table(results: Results) -> list[Row]:
    """The mean accuracy and the mean wall time after each epoch."""
    rows = []
    for name, runs in results.items():
        for what, unit in (("accuracy", ""), ("wall", ", s"), ("training", " alone, s")):
            points = {f"epoch {number}": value for number, value in enumerate(curve(runs, what), 1)}
            rows.append({"contestant": name, "mean of": what + unit, **points})
    return rows


def reached(results: Results) -> tuple[float, dict[str, int]]:
    """The highest accuracy that every mean curve reaches, and the epoch in which each does so first."""
    curves = {name: curve(runs, "accuracy") for name, runs in results.items()}
    target = min(map(max, curves.values()))
    return target, {name: next(i for i, value in enumerate(c) if value >= target) for name, c in curves.items()}


def seconds_to_target(results: Results) -> dict[str, list[float]]:
    """Wall seconds of each seed at the end of that epoch."""
    _, epochs = reached(results)
    return {name: [run["epochs"][epochs[name]]["wall"] for run in runs] for name, runs in results.items()}


def target_tables(results: Results) -> dict[str, list[Row]]:
    """When each reaches the common accuracy; our seconds over the rivals'."""
    target, epochs = reached(results)
    seconds = seconds_to_target(results)
    rows = []
    for name, values in seconds.items():
        training = mean(run["epochs"][epochs[name]]["training"] for run in results[name])
        what = {"wall, s": mean(values), "training alone, s": training}
        rows.append({"contestant": name, "dev accuracy": target, "after epoch": epochs[name] + 1, **what})
    return {"Seconds to the same dev accuracy": rows, "Seconds to it, ratios": ratios(seconds)}


def ratios(seconds: dict[str, list[float]]) -> list[Row]:
    """With the cache over everyone else, without it over the rival; each A/A row once."""
    rivals = [name for name in seconds if name != CACHED]
    rows = compare(seconds, CACHED, {name: 1.0 if name == FTS else None for name in rivals}) if rivals else []
    if FTS in seconds:
        rows += compare(seconds, OURS, {FTS: None})
    unique = {row["comparison"]: row for row in rows}.values()
    return sorted(unique, key=lambda row: row["comparison"].startswith("A/A"))


def step_tables(results: Results, steps: Sequence[Step]) -> dict[str, list[Row]]:
    """Medians in milliseconds, and ratios phase by phase; full fine-tuning has one phase, everything."""
    medians: list[Row] = []
    compared: list[Row] = []
    for name, runs in results.items():
        phases = [Step("all from the start", 0)] if name == FULL else steps
        times = [median(run["steps"][number] for run in runs) for number in range(len(phases))]
        medians.append({"contestant": name, **{f"{p.what}, ms": 1e3 * t for p, t in zip(phases, times, strict=True)}})
    for number, step in enumerate(steps):
        seconds = {name: [run["steps"][number] for run in runs] for name, runs in results.items() if name != FULL}
        compared += [{"phase": step.what, **row} for row in ratios(seconds)]
    return {"Step time by phase": medians, "Step time by phase, ratios": compared}


def cache_tables(results: Results) -> dict[str, list[Row]]:
    """Accuracy with the cache less that without it; what the cache held (first seed)."""
    pairs = zip(results[OURS], results[CACHED], strict=True)
    rows: list[Row] = []
    for without, cached in pairs:
        pair = {"without": without["epochs"][-1]["accuracy"], "with": cached["epochs"][-1]["accuracy"]}
        rows.append({"seed": str(cached["seed"]), **pair, "difference": pair["with"] - pair["without"]})
    rows.append({"seed": "mean", **{key: mean(row[key] for row in rows) for key in ("without", "with", "difference")}})
    return {"Last dev accuracy with the cache": rows, "Memory of the cache": results[CACHED][0]["cache"]}


def tables_of(results: dict[str, Results], steps: Sequence[Step]) -> dict[str, list[Row]]:
    """All tables of all data sets that have runs."""
    tables: dict[str, list[Row]] = {}
    for task, runs in results.items():
        parts = {
            "Dev accuracy": accuracy_table(runs),
            "After each epoch": curve_table(runs),
            **target_tables(runs),
            **step_tables(runs, steps),
            **cache_tables(runs),
        }
        tables |= {f"{title}, {task}": rows for title, rows in parts.items()}
    return tables


# ---- the parent


def child(options: Any, python: Path | str, names: Sequence[str], task: str, seeds: Sequence[int], *extra: str) -> Any:
    """The results of contestants, run in a process of its own, or read if it has been run before."""
    given = {"epochs": options.epochs, "rows": options.rows, "dev-rows": options.dev_rows, "phases": options.phases}
    given |= {
        "learning-rate": options.learning_rate,
        "data": options.data,
        "contestant-task": task,
        "batch": options.batch,
    }
    command = [*(f"--{key}={value}" for key, value in given.items()), *extra, *(["--quick"] if options.quick else [])]
    command += ["--seeds", *map(str, seeds), "--contestants", *names]
    key = hashlib.sha256(" ".join([*command, str(torch.get_num_threads())]).encode()).hexdigest()[:16]
    kept = None if options.runs is None else options.runs / f"{key}.json"
    if kept is not None and kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    began = time.perf_counter()
    told = answers(begin(python, __file__, *command, f"--model={options.model}"))
    if kept is not None:
        with atomic_file(kept) as path:
            path.write_text(json.dumps(told), encoding="utf-8")
    for result in told:
        last = result["epochs"][-1]
        line = f"{task}, seed {result['seed']}, {result['contestant']}{' (check)' if extra else ''}"
        print(f"{line}: fit {last['wall']:.1f} s, dev accuracy {last['accuracy']:.3f}", flush=True)
    print(f"  process {time.perf_counter() - began:.0f} s", flush=True)
    return told


def measure(options: Any, python: Mapping[str, Path | str]) -> dict[str, Results]:
    """Everyone's runs. A round is two seeds; what it gave is written at once."""
    results: dict[str, Results] = {}
    for number in range(options.rounds):
        seeds = [2 * number, 2 * number + 1]
        for task in options.tasks:
            runs = results.setdefault(task, {name: [] for name in python})
            for names, some in shares(options, python, seeds):
                for result in child(options, python[names[0]], names, task, some):
                    runs[result["contestant"]].append(result)
        tables = tables_of(results, read_phases(options.phases, options.epochs))
        partial = {"setting": setting(options, number + 1), "machine": machine(), "tables": tables}
        save("depth", options.results, **partial, seconds=results)
    return results


def shares(
    options: Any, python: Mapping[str, Path | str], seeds: Sequence[int]
) -> list[tuple[Sequence[str], Sequence[int]]]:
    """Which contestants and seeds share a process: none; in a trial all of an interpreter, whose start takes longer."""
    if not options.quick:
        return [([name], [seed]) for seed in seeds for name in python]
    return [(names, seeds) for names in together(python)]


def together(python: Mapping[str, Path | str]) -> list[list[str]]:
    """The contestants of each interpreter."""
    return [[name for name in python if python[name] == which] for which in dict.fromkeys(python.values())]


def compare_losses(options: Any, python: Mapping[str, Path | str]) -> list[Row]:
    """Without dropout, everyone with these phases must take the same steps."""
    asked = {name: which for name, which in python.items() if name != FULL}
    small = argparse.Namespace(**{**vars(options), "rows": min(options.rows, 128), "dev_rows": 16})
    rows = []
    for task in options.tasks:
        told = [child(small, python[names[0]], names, task, [0], "--check") for names in together(asked)]
        losses = {result["contestant"]: result["losses"] for part in told for result in part}
        for name in set(losses) - {OURS}:
            worst = max(abs(a - b) for a, b in zip(losses[OURS], losses[name], strict=True))
            rows.append(
                {
                    "data": task,
                    "pair": f"{OURS}, {name}",
                    "steps": len(losses[name]),
                    "first loss": losses[OURS][0],
                    "last loss": losses[OURS][-1],
                    "worst difference": worst,
                    "tolerance": TOLERANCE,
                }
            )
    return sorted(rows, key=lambda row: (row["data"], row["pair"]))


def setting(options: Any, rounds: int) -> str:
    """The line below the tables."""
    return (
        f"all-MiniLM-L6-v2, the first {options.rows} training and {options.dev_rows} dev rows, batch {options.batch}, "
        f"{options.epochs} epochs, AdamW at {options.learning_rate:g}, warm-up {WARMUP:g}, linear decay, clipping 1.0, "
        f"{2 * rounds} seeds; phases (what@epoch): {options.phases}. Target accuracy: the highest that every "
        "contestant's mean over seeds reaches; the time is that at the end of the epoch in which its mean first does. "
        "Ratios: median and quartiles over seeds; A/A: a seed's run over that of the seed before."
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3)
    rival_option(parser)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds sst2/ and trec6/")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1024, help="training rows")
    parser.add_argument("--dev-rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--phases", default="head@0,top:2@1,top:4@2,all@3", help="what is released at which epoch")
    parser.add_argument("--runs", type=Path, help="folder of finished runs: those that it holds are not run again")
    hidden = argparse.SUPPRESS
    parser.add_argument("--contestants", nargs="+", help=hidden)
    parser.add_argument("--contestant-task", help=hidden)
    parser.add_argument("--model", type=Path, help=hidden)
    parser.add_argument("--seeds", type=int, nargs="+", help=hidden)
    parser.add_argument("--check", action="store_true", help=hidden)
    options = start(parser)
    if options.contestants:
        contest(options)
        return
    if options.quick:
        # Fewer steps would have no warm-up, and the rival calls the schedule's function for step -1.
        options.batch, options.rows, options.dev_rows, options.epochs, options.rounds = 8, 24, 16, 2, 1
    for task in options.tasks:
        needs(options.data / task / "train.jsonl")
    version = find_rival(options.rival)
    python: dict[str, Path | str] = {name: options.rival if name == FTS else sys.executable for name in CONTESTANTS}
    if version is None:
        del python[FTS]
    with tempfile.TemporaryDirectory() as root:
        options.model = Path(root) / "model"
        prepare_model(options.model)
        losses = compare_losses(options, python)
        results = measure(options, python)
        question = ("--contestants", "phases", f"--model={options.model}")
        (theirs,) = answers(begin(options.rival, __file__, *question)) if version else ({},)
        ours = our_phases(options.model)
    steps = read_phases(options.phases, options.epochs)
    publish(
        "depth",
        options.results,
        setting=f"{setting(options, options.rounds)} {FTS} {version or 'was left out'}.",
        tables={
            "Losses without dropout, step by step": losses,
            **tables_of(results, steps),
            "Phases by default": phases_table(ours, theirs, steps),
        },
        seconds=results,
    )
    if any(row["worst difference"] > TOLERANCE for row in losses):
        sys.exit("the contestants do not train alike: see the first table")


def contest(options: Any) -> None:
    """In a contestant's process."""
    if options.contestants == ["phases"]:
        tell(their_phases(options.model))
        return
    for name in options.contestants:
        for seed in options.seeds:
            tell(run(options, name, seed))


if __name__ == "__main__":
    main()
