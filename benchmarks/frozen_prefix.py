"""Step time with frozen lower layers, cached and not. On the CPU.

MiniLM on SST-2 under Lightning's Trainer with SequenceClassification and Freeze, for two epochs: with the head alone
training, and with the top block, too. FrozenPrefixCache fills at the first step, which its own report times; timed here
is the median step of the second epoch. The rival is the same run without the cache. In both, frozen modules are in eval
mode: the cache's prefix is, too.

Not timed: tokenising, evaluation, saving, logging. A step includes collating, and looking up the cached rows.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from _timing import DATA, Clock, Row, arguments, compare, interleave, needs, publish, start
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from lightning_ft.callbacks import Freeze, FrozenPrefixCache
from lightning_ft.data import ClassificationData
from lightning_ft.demo import prepare_model
from lightning_ft.modules import SequenceClassification

PHASES = {"head only": ["tail", "head"], "top block and head": ["top:1", "tail", "head"]}
TARGETS = {"head only": 1 / 20, "top block and head": 1 / 2}
Seconds = dict[str, list[float]]


class Run:
    """One kind of run; what it measured beside the step time."""

    def __init__(self, folder: Path, file: Path, keep: list[str], *, rows: int, cached: bool) -> None:
        self.folder, self.file, self.keep, self.rows, self.cached = folder, file, keep, rows, cached
        self.report: Row = {}

    def __call__(self) -> float:
        """Median seconds of a step in the second epoch."""
        torch.manual_seed(0)
        clock = Clock()
        cache = FrozenPrefixCache()
        hooks = LambdaCallback(on_train_epoch_start=clock, on_train_batch_end=clock, on_train_epoch_end=clock)
        callbacks: list[Callback] = [Freeze(self.keep, eval_mode=True), *([cache] if self.cached else []), hooks]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=callbacks,
            limit_val_batches=0,
            enable_model_summary=False,
            **quiet,  # type: ignore[arg-type]
        )
        rows = Dataset.from_json(str(self.file)).select(range(self.rows))
        data = ClassificationData(str(self.folder), rows, labels=["0", "1"], batch_size=32)
        trainer.fit(SequenceClassification(str(self.folder), num_labels=2), datamodule=data)
        half = len(clock.stamps) // 2
        if self.cached:
            self.report = dict(cache.report().rows[0])
        return median(b - a for a, b in pairwise(clock.stamps[half : 2 * half - 1]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "sst2", help="folder with train.jsonl")
    options = start(parser)
    needs(file := options.data / "train.jsonl")
    count, rounds = (96, 1) if options.quick else (1280, options.rounds)
    tables: dict[str, list[Row]] = {}
    seconds: dict[str, Seconds] = {}
    costs: list[Row] = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        prepare_model(folder)
        for phase, keep in PHASES.items():
            runs = {
                name: Run(folder, file, keep, rows=count, cached=name == "cached") for name in ("cached", "uncached")
            }
            seconds[phase] = interleave(runs, rounds)
            tables[f"Step time, {phase}"] = compare(seconds[phase], "cached", {"uncached": TARGETS[phase]})
            times = {f"{name}, ms": 1000 * median(values) for name, values in seconds[phase].items()}
            costs.append({"trains": phase, **times, **runs["cached"].report})
    tables["Steps, fill and memory"] = costs
    publish(
        "frozen_prefix",
        options.results,
        setting=f"all-MiniLM-L6-v2, SST-2, {count} rows in batches of 32, {2 * rounds} runs of two epochs each, "
        "seed 0; ratios of the second epoch's median step: median and quartiles. Targets: 20 times and twice as fast.",
        tables=tables,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
