"""What Lightning, our module and our callbacks cost on top of a bare PyTorch loop. On the CPU.

Step time: from one step's end to the next one's, under Lightning's Trainer with SequenceClassification, over the same
in a loop written by hand: the same module object, batches of 32 x 64 random tokens, AdamW and schedule. What Lightning
and our module add to it is timed apart, too: both loops on 2 x 8 tokens with hidden size 12, and the difference.

Callbacks: each one's added pass alone, repeated inside a fit on all parameters of the model with their gradients, over
that step time. Where the pass is a hook on the optimiser (DiscriminativeLR), the optimiser steps nothing, so that only
the hooks are timed. What L2SP and EWC add is in anchors.py.

Not timed: collating, evaluation, saving, logging; nor what DiscriminativeLR's further groups cost inside AdamW. No data
is needed: the tokens are random, and the losses mean nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _passes import Batch, Pass, inside_fit, random_batches, step_hooks
from _timing import (
    Clock,
    Row,
    Seconds,
    arguments,
    compare,
    fit,
    interleave,
    loader,
    publish,
    repeat,
    start,
    without_arithmetic,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch.optim.lr_scheduler import LambdaLR

from lightning_ft.callbacks import DiscriminativeLR, ExactResume
from lightning_ft.demo import prepare_model
from lightning_ft.functional.learning_rates import decay_groups, warmup_then
from lightning_ft.modules import SequenceClassification

OURS, BARE, UNFUSED = "Lightning + lightning_ft", "bare loop", "bare loop, AdamW not fused"


class Size(NamedTuple):
    """How much is run: segments of ``steps``, the first ``dropped`` left out; each pass ``repeats`` times."""

    rounds: int
    batch: int = 32
    length: int = 64
    steps: int = 20
    dropped: int = 5
    repeats: int = 200


def bare_loop(module: SequenceClassification, batches: Sequence[Batch], *, fused: bool) -> Clock:
    """The loop that one would write by hand."""
    model, clock = module.model, Clock()
    optimizer = torch.optim.AdamW(
        decay_groups(model.parameters(), module.weight_decay), lr=module.learning_rate, fused=fused
    )
    warmup = round(module.warmup * len(batches))
    scheduler = LambdaLR(optimizer, warmup_then("linear", total_steps=len(batches), warmup_steps=warmup))
    clock()
    for batch in loader(batches):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        clock()
    clock()
    return clock


def time_pass(folder: Path, callback: Callback, action: Pass, size: Size) -> list[float]:
    """Median seconds of what a callback adds to a step, and again (A/A), after a step that left gradients."""
    seconds: list[float] = []

    def probe(trainer: Trainer, module: SequenceClassification) -> None:
        seconds.extend(repeat(lambda: action(trainer, module), size.repeats) for _ in range(2))

    inside_fit(folder, callback, probe, random_batches(size.batch, size.length, 1)[0])
    return seconds


def added_passes() -> dict[str, tuple[Callback, Pass, float | None]]:
    """The callback, its pass, and the most that it may take of a step, in percent."""
    resume = ExactResume(every="1000000 steps")

    def reseed(trainer: Trainer, module: SequenceClassification) -> None:
        resume.on_train_batch_start(trainer, module, None, 0)

    return {
        "ExactResume, seeding a batch": (LambdaCallback(on_fit_start=resume.on_fit_start), reseed, None),
        "DiscriminativeLR, splitting": (DiscriminativeLR(), step_hooks, None),
    }


def added_row(name: str, seconds: Sequence[float], step: float, target: float | None) -> Row:
    """What was added, and again (A/A), as a share of a step."""
    first, again = seconds
    share = 100 * first / step
    verdict = None if target is None else "met" if share <= target else "missed"
    row = {"added to a step": name, "ms": 1e3 * first, "A/A": again / first, "% of a step": share}
    return {**row, "target, %": target, "verdict": verdict}


def time_loops(module: SequenceClassification, size: Size) -> Seconds:
    """Median seconds of a step in each segment."""
    batches = random_batches(size.batch, size.length, size.steps)
    contestants: dict[str, Callable[[], Clock]] = {
        OURS: lambda: fit(module, loader(batches)),
        BARE: lambda: bare_loop(module, batches, fused=True),
        UNFUSED: lambda: bare_loop(module, batches, fused=False),
    }
    return interleave(
        {name: lambda run=run: run().step(size.dropped) for name, run in contestants.items()}, size.rounds
    )


def main() -> None:
    options = start(arguments(__doc__))
    size = Size(1, 2, 8, 5, 2, 3) if options.quick else Size(options.rounds)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        prepare_model(folder)
        seconds = time_loops(SequenceClassification(folder, num_labels=2), size)
        own = time_loops(without_arithmetic(folder), size._replace(batch=2, length=8))
        step = median(seconds[OURS])
        halves = [median(own[OURS][i::2]) - median(own[BARE][i::2]) for i in (0, 1)]
        added = [added_row("Lightning + lightning_ft, bookkeeping", halves, step, 5.0)]
        for name, (callback, action, target) in added_passes().items():
            added.append(added_row(name, time_pass(folder, callback, action, size), step, target))
    publish(
        "overhead",
        options.results,
        setting=f"all-MiniLM-L6-v2, batches of {size.batch} x {size.length} random tokens, no clipping, seed 0. Step: "
        f"{2 * size.rounds} segments of {size.steps}, the first {size.dropped} dropped. Ratios: median and quartiles. "
        f"Added passes: medians of {size.repeats}; a step is {1e3 * step:.0f} ms.",
        tables={
            "Step time": compare(seconds, OURS, {BARE: 1.05, UNFUSED: None}),
            "Added to a step": added,
        },
        seconds={"step": seconds, "step without arithmetic": own},
    )


if __name__ == "__main__":
    main()
