"""Whether a graph still does its task: the task's own metrics on held-out data, and how often it decides alike."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ft.export.graphs import graph_forward

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
    "CausalLM": "val_perplexity",
    "Seq2Seq": "val_loss",
}
"""What counts for each head; of regression ``val_pearson``, of an encoder-decoder with labels ``val_accuracy``."""

PERCENT = ("QuestionAnswering",)
WRITERS = ("CausalLM", "Seq2Seq")


def drop(module: TransformerModule, metric: str, reference: float, found: float) -> float:
    """How much of a metric was lost, as a share.

    Of a metric whose higher values are better it is the difference (of percentages, a hundredth of it). Of perplexity,
    whose lower values are better, it is the relative rise; of a loss, the rise in nats, which for a small one is the
    same: 0.01 is 1 % in perplexity.
    """
    if metric.endswith("perplexity"):
        return found / reference - 1
    if metric.endswith("loss"):
        return found - reference
    return (reference - found) / (100 if type(module).__name__ in PERCENT else 1)


@dataclass(frozen=True)
class Judgement:
    """What a model did on held-out data.

    Args:
        metrics: What validation logged.
        outputs: Of each batch the values that mean something: not those of padding, nor of tokens without a label; of
            models that write text log p of each labelled token.
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
    if getattr(module, "label_texts", None):
        return "val_accuracy"
    return "val_pearson" if getattr(module, "problem", None) == "regression" else METRICS[name]


def judge(
    module: TransformerModule,
    data: LightningDataModule,
    graph: InferenceSession | Mapping[str, Callable[..., Any]] | None = None,
    *,
    batches: int | None = None,
) -> Judgement:
    """Validate a module, or a graph of it in the module's place.

    Args:
        module: One of ours with a single head. It is left as it was.
        data: With validation data.
        graph: A graph that computes what the module's ``forward`` would; or methods of the module by name, ``forward``
            at least, with graphs in its model's place, as :meth:`lightning_ft.export.graphs.Graphs.replacements` gives.
        batches: How many batches of the validation data to take; all by default.

    Raises:
        ValueError: There is no validation data.
    """
    from lightning.pytorch import Trainer

    seen: list[tuple[Tensor, Tensor | None]] = []
    given = graph if isinstance(graph, Mapping) or graph is None else {"forward": graph_forward(module, graph)}
    methods = {"forward": module.forward, **(given or {})}
    forward = methods.pop("forward")
    with _kept(module, methods), _quiet():
        for name, method in methods.items():
            setattr(module, name, method)
        module.forward = lambda batch: _note(seen, module, batch, forward(batch))  # type: ignore[method-assign]
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
    outputs, decisions = zip(*seen, strict=True)
    return Judgement(
        {name: float(value) for logged in found for name, value in logged.items()},
        list(outputs),
        [decision for decision in decisions if decision is not None],
    )


def _note(seen: list[tuple[Tensor, Tensor | None]], module: TransformerModule, batch: Batch, outputs: Any) -> Any:
    seen.append(_read(module, batch, outputs))
    return outputs


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
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if isinstance(outputs, tuple):  # of question answering: starts and ends
        masked = [values.float().masked_fill(~mask, -torch.inf) for values in outputs]
        return torch.cat([values[mask] for values in outputs]).float(), torch.stack([v.argmax(-1) for v in masked])
    if type(module).__name__ in WRITERS:
        return _of_tokens(outputs, batch["labels"], shifted=type(module).__name__ == "CausalLM")
    values = outputs.float()
    if values.ndim == 3:  # per token
        chosen = batch["labels"] != -100 if "labels" in batch else mask
        values = values[chosen]
    problem = getattr(module, "problem", "single_label")
    if problem == "regression":
        return values, None
    return values, values > 0 if problem == "multi_label" else values.argmax(-1)


def _of_tokens(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Of each labelled token its log p, and which was the most probable: all logits would fill the memory."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != -100
    values, targets = logits[chosen].float(), labels[chosen]
    return values.log_softmax(-1).gather(1, targets[:, None]).squeeze(1), values.argmax(-1)


@contextmanager
def _kept(module: TransformerModule, methods: Iterable[str]) -> Iterator[None]:
    """The module as it was: its methods, its trainer, and what a validation tunes."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    trainer = module._trainer
    try:
        yield
    finally:
        for name in ("forward", *methods):
            module.__dict__.pop(name, None)
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
