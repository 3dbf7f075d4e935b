"""What both benchmarks share: interleaved passes, ratios with their A/A rows, the table, the machine."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import datasets
import torch
import transformers
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig

from lightning_ft.core.files import atomic_file
from lightning_ft.modules import Architecture, SequenceClassification

THREADS = 2
SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(os.environ.get("LIGHTNING_FT_DATA", SHARED / "data"))
Row = dict[str, Any]
Seconds = Mapping[str, Sequence[float]]


class Clock:
    """Notes the time whenever it is called: when an epoch begins, after each step, when the epoch ends."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, *_: Any, **__: Any) -> None:
        self.stamps.append(time.perf_counter())

    def step(self, dropped: int) -> float:
        """Median seconds from one step's end to the next one's, the first steps left out."""
        ends = self.stamps[1 + dropped : -1]
        return median(after - before for before, after in pairwise(ends))

    def epoch(self) -> float:
        """Seconds of the whole epoch."""
        return self.stamps[-1] - self.stamps[0]


def loader(batches: Sequence[Mapping[str, Tensor]]) -> DataLoader[Any]:
    """Batches as they are, in this order."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def trainer(
    *callbacks: Callback,
    clip: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    root: Path | None = None,
) -> Trainer:
    """Lightning's on the CPU, for one epoch unless it is said, with everything off that is not training."""
    return Trainer(
        max_epochs=1 if epochs is steps is None else epochs,
        max_steps=-1 if steps is None else steps,
        default_root_dir=root,
        accelerator="cpu",
        callbacks=list(callbacks),
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def needs(file: Path) -> None:
    """End the script where its data are not there."""
    if not file.is_file():
        raise SystemExit(f"{file} does not exist: pass --data FOLDER")


def fit(module: LightningModule, data: DataLoader[Any] | LightningDataModule, *, clip: float | None = None) -> Clock:
    """One epoch of our module under Lightning."""
    clock = Clock()
    hooks = LambdaCallback(on_train_epoch_start=clock, on_train_batch_end=clock, on_train_epoch_end=clock)
    trainer(hooks, clip=clip).fit(module, data)
    return clock


def without_arithmetic(pretrained: Path) -> SequenceClassification:
    """The same architecture with as many tensors, so narrow that a step is little more than bookkeeping."""
    config = AutoConfig.from_pretrained(pretrained, hidden_size=12, intermediate_size=12)
    return SequenceClassification(Architecture(config), num_labels=2)


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run A B A' B' in each round; the seconds of each contestant, two a round, in the order in which they ran."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(2 * rounds):
        for name, contestant in contestants.items():
            gc.collect()
            seconds[name].append(contestant())
    return seconds


def repeat(action: Callable[[], object], times: int) -> float:
    """Median seconds of an action, after five runs that do not count."""
    seconds = []
    for _ in range(5 + times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return median(seconds[5:])


def compare(seconds: Seconds, ours: str, targets: Mapping[str, float | None]) -> list[Row]:
    """Our time over each rival's, in neighbouring passes; below, everyone's time over its own before it (A/A)."""
    again = {name: _ratio(f"A/A: {name}", seconds[name][1::2], seconds[name][::2]) for name in (ours, *targets)}
    rows = []
    for theirs, target in targets.items():
        row = _ratio(f"{ours} / {theirs}", seconds[ours], seconds[theirs])
        band = [quartile for name in (ours, theirs) for quartile in again[name]["quartiles"]]
        rows.append({**row, "target": target, "verdict": _verdict(row["ratio"], target, min(band), max(band))})
    return [*rows, *again.values()]


def _verdict(ratio: float, target: float | None, low: float, high: float) -> str:
    """Whether the target is met; a ratio that identical code has, too, is no difference."""
    met = (
        []
        if target is None
        else ["met" if ratio <= target else "met within A/A" if ratio <= target * high else "missed"]
    )
    return ", ".join([*met, *(["no difference from A/A"] if low <= ratio <= high else [])])


def _ratio(name: str, above: Sequence[float], below: Sequence[float]) -> Row:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"comparison": name, "ratio": median(ratios), "quartiles": [low, high], "pairs": len(ratios)}


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a table; a column is whatever any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "–".join(_cell(item) for item in value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"
    return "" if value is None else str(value)


def publish(name: str, results: Path, *, setting: str, tables: Mapping[str, Sequence[Row]], **details: Any) -> None:
    """Write ``NAME.json`` whole or not at all, and print the tables as Markdown."""
    where = machine()
    save(name, results, setting=setting, machine=where, tables=tables, **details)
    for title, rows in tables.items():
        print(f"\n**{title}**\n\n{markdown(rows)}")
    print(f"\n{setting}\n{'; '.join(f'{key} {value}' for key, value in where.items())}.")


def save(name: str, results: Path, **content: Any) -> None:
    """Write ``NAME.json`` whole or not at all."""
    with atomic_file(results / f"{name}.json") as path:
        text = json.dumps({"benchmark": name, **content}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Hardware, threads, versions and date, for the line under a table."""
    model = platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    packages = ("torch", "lightning", "transformers", "accelerate")
    return {
        "CPU": f"{model}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "date": date.today().isoformat(),
        "load before": round(_LOAD, 2),
    }


_LOAD = os.getloadavg()[0]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few tiny steps: no figures")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of A B A' B'")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options; from here on offline, quiet, and on a fixed number of threads."""
    options = parser.parse_args()
    # Under load, two threads wait for each other at every barrier, ten times slower: not for a mere trial.
    torch.set_num_threads(1 if options.quick else THREADS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    for noisy in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return options
