"""Our module under Lightning against ``transformers.Trainer``: losses, step time, epoch time. On the CPU.

Losses: dropout off, same weights (head included), same batches, fused AdamW, linear warm-up and decay, clipping at 1.0.
The two runs must agree at every step to 1e-5, else this script fails.

Step time: from one step's end to the next one's, inside each trainer's own loop, so that data loading, forward,
backward, clipping, optimiser, schedule and the trainer's bookkeeping all count. Both train the same module object on
the same SST-2 batches, collated beforehand. The trainers' own share of it shows in a model of the same architecture
with hidden size 12, on batches cut to 4 rows of 8 tokens.

Epoch time: a full epoch over SST-2 from rows tokenised beforehand, from each trainer's hook at its begin to the one at
its end: order, batching and padding count; start-up (and the scan for lengths that ``group_by_length`` makes in it)
does not. Ours batches by length (ClassificationData's default), theirs at random (their default) and by length.

Not timed: tokenisation, evaluation, saving, logging. Nothing is said about accuracy.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from _hf import CLIP, WARMUP, Batch, LossKeeper, rival, rival_on_batches
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
    publish,
    start,
    trainer,
    without_arithmetic,
)
from datasets import Dataset
from lightning.pytorch.callbacks import LambdaCallback
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

from lightning_ft.data import ClassificationData
from lightning_ft.demo import prepare_model
from lightning_ft.modules import SequenceClassification

OURS, THEIRS, GROUPED = "lightning_ft", "HF Trainer", "HF Trainer by length"
STRATEGIES = {THEIRS: "random", GROUPED: "group_by_length"}
LENGTH, SEED, TOLERANCE = 128, 0, 1e-5


class Size(NamedTuple):
    """How much is run: ``checked`` steps for the losses; segments of ``steps``, the first ``dropped`` left out."""

    rounds: int
    rows: int
    batch: int = 32
    checked: int = 50
    steps: int = 40
    dropped: int = 5


def compare_losses(folder: Path, batches: Sequence[Batch]) -> Row:
    """Train once with each trainer from the same weights."""
    torch.manual_seed(SEED)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    with tempfile.TemporaryDirectory() as start:
        theirs.save_pretrained(start)
        ours = SequenceClassification(start, num_labels=2, warmup=WARMUP)
    ours.model.load_state_dict(theirs.state_dict())

    hf, _ = rival_on_batches(theirs, batches, kind=LossKeeper)
    matrices = {name for name, parameter in ours.model.named_parameters() if parameter.ndim >= 2}
    same_decay = matrices == set(hf.get_decay_parameter_names(theirs))
    hf.train()
    losses: list[float] = []
    keep = LambdaCallback(on_train_batch_end=lambda *hook: losses.append(hook[2]["loss"].item()))
    trainer(keep, clip=CLIP).fit(ours, loader(batches))
    weights = zip(ours.model.parameters(), theirs.parameters(), strict=True)
    return {
        "steps": len(losses),
        "first loss": losses[0],
        "last loss": losses[-1],
        "worst difference": max(abs(a - b) for a, b in zip(losses, hf.losses, strict=True)),
        "tolerance": TOLERANCE,
        "worst difference of a weight": max((a - b).abs().max().item() for a, b in weights),
        "same parameters decay": same_decay,
    }


def time_steps(module: SequenceClassification, batches: Sequence[Batch], size: Size) -> Seconds:
    """Median seconds of a step in each segment."""

    def theirs() -> float:
        hf, clock = rival_on_batches(module.model, batches)
        hf.train()
        return clock.step(size.dropped)

    def ours() -> float:
        return fit(module, loader(batches), clip=CLIP).step(size.dropped)

    return interleave({OURS: ours, THEIRS: theirs}, size.rounds)


def time_epochs(
    module: SequenceClassification, folder: Path, rows: Dataset, size: Size
) -> tuple[Seconds, dict[str, float]]:
    """Seconds of each epoch, and each trainer's padding tokens per real token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = rows.map(
        lambda part: tokenizer(part["text"], truncation=True, max_length=LENGTH), batched=True, remove_columns=["text"]
    )

    def theirs(strategy: str) -> tuple[Trainer, Clock]:
        return rival(
            module.model,
            tokens,
            steps=-(-len(rows) // size.batch),
            collate=DataCollatorWithPadding(tokenizer),
            per_device_train_batch_size=size.batch,
            train_sampling_strategy=strategy,
        )

    def epoch(strategy: str) -> float:
        hf, clock = theirs(strategy)
        hf.train()
        return clock.epoch()

    ours = our_data(folder, rows, size.batch)
    loaders = {OURS: ours.train_dataloader()}
    loaders |= {name: theirs(strategy)[0].get_train_dataloader() for name, strategy in STRATEGIES.items()}
    waste = {name: padding(batches) for name, batches in loaders.items()}
    epochs: dict[str, Callable[[], float]] = {OURS: lambda: fit(module, ours, clip=CLIP).epoch()}
    epochs |= {name: partial(epoch, strategy) for name, strategy in STRATEGIES.items()}
    return interleave(epochs, size.rounds), waste


def our_data(folder: Path, rows: Dataset, batch: int) -> ClassificationData:
    """Our data module, ready to be asked for loaders."""
    data = ClassificationData(str(folder), train=rows, batch_size=batch, max_length=LENGTH, seed=SEED)
    data.setup("fit")
    return data


def padding(batches: Iterable[Batch]) -> float:
    """Padding tokens over real tokens."""
    masks = [batch["attention_mask"] for batch in batches]
    return sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks) - 1


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "sst2", help="folder of SST-2, with train.jsonl")
    parser.add_argument("--rows", type=int, default=2000, help="rows of a timed epoch")
    options = start(parser)
    file = options.data / "train.jsonl"
    if not file.is_file():
        sys.exit(f"{file} does not exist: pass --data FOLDER with SST-2's train.jsonl (fields text and label)")
    size = Size(1, 8, 4, 3, 5, 2) if options.quick else Size(options.rounds, options.rows)

    table = Dataset.from_json(str(file))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        prepare_model(folder)
        stream = our_data(folder, table, size.batch).train_dataloader()
        drawn = list(islice(stream, max(size.checked, size.steps)))
        batches = [{name: batch[name] for name in batch if name != "row"} for batch in drawn]
        agreement = compare_losses(folder, batches[: size.checked])
        module = SequenceClassification(folder, num_labels=2, warmup=WARMUP)
        step = time_steps(module, batches[: size.steps], size)
        cut = [{name: tensor[:4][..., :8] for name, tensor in batch.items()} for batch in batches[: size.steps]]
        own = time_steps(without_arithmetic(folder), cut, size)
        epoch, waste = time_epochs(module, folder, table.select(range(size.rows)), size)

    medians = [
        {
            "trainer": name,
            "step, ms": 1e3 * median(step[name]) if name in step else None,
            "step without arithmetic, ms": 1e3 * median(own[name]) if name in own else None,
            "epoch, s": median(epoch[name]),
            "padding per real token": waste[name],
        }
        for name in epoch
    ]
    publish(
        "vs_hf_trainer",
        options.results,
        setting=f"all-MiniLM-L6-v2 on SST-2, batch {size.batch}, max_length {LENGTH}, clipping {CLIP:g}, seed {SEED}. "
        f"Step: {2 * size.rounds} segments of {size.steps}, the first {size.dropped} dropped. Epoch: the first "
        f"{size.rows} of {len(table)} rows, {2 * size.rounds} times. Ratios: median and quartiles.",
        tables={
            "Losses, step by step": [agreement],
            "Step time, identical batches": compare(step, OURS, {THEIRS: 1.0}),
            "Step time without arithmetic": compare(own, OURS, {THEIRS: 1.0}),
            "Epoch time": compare(epoch, OURS, {THEIRS: 0.55, GROUPED: 1.0}),
            "Medians": medians,
        },
        seconds={"step": step, "step without arithmetic": own, "epoch": epoch},
    )
    if agreement["worst difference"] > TOLERANCE or not agreement["same parameters decay"]:
        sys.exit("the two trainers do not train alike: see the first table")


if __name__ == "__main__":
    main()
