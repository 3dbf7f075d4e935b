"""Whether a graph still does its task: the task's own metrics on held-out data, and how often it decides alike."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
    from onnxruntime import InferenceSession

    from lightning_ft.modules import TransformerModule
    from lightning_ft.modules.base import Batch

METRICS = {
    "SequenceClassification": "val_accuracy",
    "TokenClassification": "val_f1",
    "QuestionAnswering": "val_f1",
    "MultipleChoice": "val_accuracy",
    "MaskedLM": "val_accuracy",
    "Cloze": "val_accuracy",
}
"""What counts for each head; of regression it is ``val_pearson``."""

PERCENT = ("QuestionAnswering",)


@dataclass(frozen=True)
class Judgement:
    """What a model did on held-out data.

    Args:
        metrics: What validation logged.
        outputs: Of each batch the values that mean something: not those of padding, nor of tokens without a label.
        decisions: Of each batch what was chosen by them; none of regression, where nothing is chosen.
    """

    metrics: Mapping[str, float]
    outputs: list[Tensor]
    decisions: list[Tensor]

    def agreement(self, other: Judgement) -> float | None:
        """The share of decisions that both make alike; None where nothing is decided."""
        if not self.decisions:
            return None
        pairs = list(zip(self.decisions, other.decisions, strict=True))
        same = sum(int((mine == theirs).sum()) for mine, theirs in pairs)
        return same / sum(mine.numel() for mine, _ in pairs)

    def distance(self, other: Judgement) -> float:
        """Root mean squared difference of the outputs, over the root mean square of ``other``'s."""
        error = sum(float((a - b).square().sum()) for a, b in zip(self.outputs, other.outputs, strict=True))
        scale = sum(float(b.square().sum()) for b in other.outputs)
        return float((error / scale) ** 0.5) if scale else float(error**0.5)


def main_metric(module: TransformerModule) -> str:
    """The name of the metric that counts for a module's head.

    Raises:
        TypeError: It has none here.
    """
    name = type(module).__name__
    if name not in METRICS:
        raise TypeError(f"a {name} has no metric here to be judged by: export each head, or at fp32")
    return "val_pearson" if getattr(module, "problem", None) == "regression" else METRICS[name]


def judge(
    module: TransformerModule,
    data: LightningDataModule,
    session: InferenceSession | None = None,
    *,
    batches: int | None = None,
) -> Judgement:
    """Validate a module, or a graph of it in the module's place.

    Args:
        module: One of ours with a single head. It is left as it was.
        data: With validation data.
        session: The graph, which computes what the module's ``forward`` would.
        batches: How many batches of the validation data to take; all by default.

    Raises:
        ValueError: There is no validation data.
    """
    from lightning.pytorch import Trainer

    seen: list[tuple[Batch, Any]] = []
    forward = module.forward if session is None else _forward(module, session)
    with _kept(module), _quiet():
        module.forward = lambda batch: _note(seen, batch, forward(batch))  # type: ignore[method-assign]
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=1.0 if batches is None else batches,
        )
        found = trainer.validate(module, datamodule=data, verbose=False)
    if not seen:
        raise ValueError("data: its validation set is empty: name one, which an export in fewer bits is judged by")
    outputs, decisions = zip(*(_read(module, batch, result) for batch, result in seen), strict=True)
    return Judgement(
        {name: float(value) for logged in found for name, value in logged.items()},
        list(outputs),
        [decision for decision in decisions if decision is not None],
    )


def _note(seen: list[tuple[Batch, Any]], batch: Batch, outputs: Any) -> Any:
    seen.append((batch, outputs))
    return outputs


def _forward(module: TransformerModule, session: InferenceSession) -> Callable[[Batch], Any]:
    """A module's ``forward``, computed by a graph."""
    names = [entry.name for entry in session.get_inputs()]

    def forward(batch: Batch) -> Any:
        values = session.run(None, graph_feed(module, batch, names))
        tensors = tuple(torch.from_numpy(value) for value in values)
        return tensors if len(tensors) > 1 else tensors[0]

    return forward


def graph_feed(module: TransformerModule, batch: Batch, names: Sequence[str]) -> dict[str, Any]:
    """What a graph is given of a batch: an array for each of its inputs' names."""
    # What a module is not given is 0 to it.
    given = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    if "gap" in names:
        given["gap"] = module.gap(batch)  # type: ignore[operator]
    return {name: given[name].numpy() for name in names}


def calibration_batches(data: LightningDataModule) -> tuple[str, Iterator[Batch]]:
    """Batches that are like those a model will see, and the name of the split they are of.

    Args:
        data: Its training data are taken, or its validation data where it has none.
    """
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from lightning_ft.data import TextData

    trains = (
        data.sources["train"] is not None if isinstance(data, TextData) else is_overridden("train_dataloader", data)
    )
    data.prepare_data()
    data.setup("fit" if trains else "validate")
    return ("training", iter(data.train_dataloader())) if trains else ("validation", iter(data.val_dataloader()))


def _read(module: TransformerModule, batch: Batch, outputs: Any) -> tuple[Tensor, Tensor | None]:
    """Outputs that mean something, and what was decided by them."""
    mask = batch["attention_mask"].bool()
    if isinstance(outputs, tuple):  # of question answering: starts and ends
        masked = [values.float().masked_fill(~mask, -torch.inf) for values in outputs]
        return torch.cat([values[mask] for values in outputs]).float(), torch.stack([v.argmax(-1) for v in masked])
    values = outputs.float()
    if values.ndim == 3:  # per token
        chosen = batch["labels"] != -100 if "labels" in batch else mask
        values = values[chosen]
    problem = getattr(module, "problem", "single_label")
    if problem == "regression":
        return values, None
    return values, values > 0 if problem == "multi_label" else values.argmax(-1)


@contextmanager
def _kept(module: TransformerModule) -> Iterator[None]:
    """The module as it was: its ``forward``, its trainer, and what a validation tunes."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    trainer = module._trainer
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        module._trainer = trainer
        for name, value in module.named_buffers():
            if name in before:
                value.copy_(before[name])


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
