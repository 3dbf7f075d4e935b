"""The rival: ``transformers.Trainer`` with our optimiser, schedule and clipping, timed where we are timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from _timing import Clock
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

Batch = dict[str, Tensor]
CLIP, WARMUP = 1.0, 0.1


class _Hooks(TrainerCallback):
    """Calls a clock at the moments at which ours is called."""

    def __init__(self, clock: Clock) -> None:
        self.on_epoch_begin = self.on_step_end = self.on_epoch_end = clock


class LossKeeper(Trainer):
    """The rival, remembering the loss of each step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def rival(
    model: nn.Module,
    data: Any,
    *,
    steps: int,
    collate: Callable[[list[Any]], Any],
    kind: type[Trainer] = Trainer,
    epochs: int = 1,
    learning_rate: float = 2e-5,
    seed: int = 0,
    **settings: Any,
) -> tuple[Trainer, Clock]:
    """The HF Trainer with our optimiser, schedule and clipping over ``steps`` in all; saving, logs, bars off."""
    everything = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=0.01,
        max_grad_norm=CLIP,
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP * steps),
        optim="adamw_torch_fused",
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    clock = Clock()
    theirs = kind(model, everything, train_dataset=data, data_collator=collate, callbacks=[_Hooks(clock)])
    theirs.remove_callback(PrinterCallback)
    return theirs, clock


def rival_on_batches(model: nn.Module, batches: Sequence[Batch], **options: Any) -> tuple[Trainer, Clock]:
    """The HF Trainer on batches that are collated already: it takes each as one row."""
    return rival(
        model,
        list(batches),
        steps=len(batches),
        collate=itemgetter(0),
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        **options,
    )
