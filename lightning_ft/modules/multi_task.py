"""Several heads on one shared backbone, trained together."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from typing_extensions import override

from lightning_ft.functional.alterations import restore
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.modules.base import Batch, Schedule, TransformerModule, reset
from lightning_ft.modules.checkpoint import KEY, Architecture, pack, read_checkpoint, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loss_weight(outcomes: int) -> float:
    """What brings losses to one scale: 1 / ln n, with n the outcomes that a head chooses among; 1 for one or none.

    A head that knows nothing has the cross-entropy ln n: every task begins with a loss of 1.

    Args:
        outcomes: n: labels, choices or size of the vocabulary.

    Example:
        >>> [round(loss_weight(n), 4) for n in (1, 2, 3, 50265)]
        [1.0, 1.4427, 0.9102, 0.0924]

    Reference:
        Aghajanyan et al. 2021, Muppet: Massive Multi-task Representations with Pre-Finetuning.
    """
    return 1 / math.log(outcomes) if outcomes > 1 else 1.0


class MultiTask(TransformerModule):
    """Fine-tune one pretrained model on several tasks at once: a head for each on one shared backbone.

    A batch belongs to one task, named under ``task``, and holds what that task's head takes; see
    :class:`~lightning_ft.data.MultiTaskData`. Train with ``accumulate_grad_batches`` of several, so that each optimiser
    step mixes tasks. Its gradient is the mean over its batches of each task's mean loss times the task's weight.

    Each head computes its own loss, metrics and predictions. They are logged as ``val_<task>_<metric>`` and
    ``val_<task>_loss`` (unweighted), likewise ``test_…`` and ``train_<task>_loss``; ``val_loss`` is the mean over the
    tasks of the weighted losses, and ``train_loss`` the weighted loss of a batch.

    The heads' own arguments for the optimiser, and ``token_weighted``, have no effect.
    Under DDP every parameter takes part in every step, those
    of other heads with a gradient of zero, so plain ``strategy="ddp"`` works, and any number of processes trains alike.

    Args:
        heads: Name of each task to its head. They must come from one pretrained model; the backbone with most weights
            (BERT's pooler is in some only) becomes that of all.
        loss_scaling: Weigh each task's loss by 1 / ln n, see :func:`loss_weight`. n is the last dimension of the head's
            output; 2 where labels are independent, and weight 1 for regression and question answering.
        weights: Weight of a task's loss, instead of that.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, more time.

    Raises:
        ValueError: No head, heads of different models, or weights that do not fit.
    """

    def __init__(
        self,
        heads: dict[str, TransformerModule],
        *,
        loss_scaling: bool = True,
        weights: dict[str, float] | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        gradient_checkpointing: bool = False,
    ) -> None:
        weights = {} if weights is None else {str(task): float(weight) for task, weight in weights.items()}
        arguments = {name: value for name, value in locals().items() if name not in ("self", "heads", "__class__")}
        _check(heads, weights)
        backbone, used = _share(heads)
        first = next(iter(heads.values()))
        unset = {"head_seed": 0, "trust_remote_code": False, "allow_pickle": False}
        super().__init__(
            _Made(backbone),
            Architecture(backbone.config, first.tokenizer),
            arguments={**arguments, **unset},
            metrics={},
        )
        self._arguments = arguments
        self.heads: Mapping[str, TransformerModule] = nn.ModuleDict(heads)  # type: ignore[assignment]
        self.loss_scaling = loss_scaling
        self.weights = weights
        # What a batch of a task leaves without a gradient: the other heads, and a pooler that this head does not read.
        self._unused = {task: [p for p in self.parameters() if id(p) not in ids] for task, ids in used.items()}
        self._losses = MetricCollection({task: MeanMetric() for task in heads}, compute_groups=False)
        self._seen: dict[str, float] = {}

    # ---- one task's batch

    @override
    def forward(self, batch: Batch) -> Any:
        """What the head of the batch's task computes."""
        return self._head(batch)(batch)

    @override
    def likelihood(self, outputs: Any, batch: Batch) -> Likelihood:
        """What the head of the batch's task says, whatever the weight of its loss."""
        return self._head(batch).likelihood(outputs, batch)

    @override
    def update_metrics(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        self._head(batch).update_metrics(metrics, outputs, batch)

    @override
    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """``task``, and the columns of the task's head, for each row of the batch."""
        columns = self._head(batch).predictions(batch)
        return {"task": [batch["task"]] * len(next(iter(columns.values()))), **columns}

    def weight(self, task: str, outputs: Any) -> float:
        """The factor on a task's loss.

        Args:
            task: Its name.
            outputs: What :meth:`forward` returned for one of its batches.
        """
        if task in self.weights or not self.loss_scaling:
            return self.weights.get(task, 1.0)
        if self.heads[task].model.config.problem_type == "multi_label_classification":
            return loss_weight(2)
        return loss_weight(outputs.shape[-1]) if isinstance(outputs, Tensor) else 1.0

    def _head(self, batch: Batch) -> TransformerModule:
        task = batch.get("task")
        if task is None or task not in self.heads:
            raise ValueError(f"a batch of the task {task!r}, but the heads are {list(self.heads)}: name both alike")
        return self.heads[task]

    # ---- steps

    @override
    def setup(self, stage: str) -> None:
        tasks = getattr(getattr(self.trainer, "datamodule", None), "tasks", None)
        if tasks is not None and set(tasks) != set(self.heads):
            raise ValueError(
                f"the data's tasks are {list(tasks)}, but the heads are {list(self.heads)}: name both alike"
            )
        for task, head in self.heads.items():
            head.trainer = self.trainer
            head.setup(stage)
            if tasks is not None and stage == "fit":  # predicting needs no training file to read labels from
                _agree_on_labels(task, head, tasks[task])

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        outputs = self(batch)
        loss, _ = self._head(batch).loss(outputs, batch)
        weighted = loss * self.weight(batch["task"], outputs)
        self.log("train_loss", weighted, prog_bar=True, batch_size=1)
        self.log(f"train_{batch['task']}_loss", loss, batch_size=1)
        # One element of each: enough to give all of it a gradient, of zero.
        others = [p.flatten()[0] for p in self._unused[batch["task"]] if p.requires_grad]
        return weighted + 0 * torch.stack(others).sum() if others else weighted

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", self._head(batch).val_metrics)

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", self._head(batch).test_metrics)

    @override
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Any]]:
        """The rows' numbers in their task's source and names, the task, and its head's columns."""
        return super().predict_step(batch, batch_idx)

    @override
    def _evaluate(self, batch: Batch, split: str, metrics: MetricCollection) -> None:
        task, outputs = batch["task"], self(batch)
        loss, items = self._head(batch).loss(outputs, batch)
        self._losses[task].update(loss.detach(), items)
        self._seen[task] = self.weight(task, outputs)
        self.update_metrics(metrics, outputs, batch)

    # ---- the heads' own hooks, which Lightning calls for the outermost module alone

    @override
    def on_validation_start(self) -> None:
        self._begin("validation")

    @override
    def on_test_start(self) -> None:
        self._begin("test")

    @override
    def on_predict_start(self) -> None:
        self._begin("predict")

    @override
    def on_validation_epoch_end(self) -> None:
        self._end("validation", "val_")

    @override
    def on_test_epoch_end(self) -> None:
        self._end("test", "test_")

    def _begin(self, stage: str) -> None:
        self._seen = {}
        reset(self._losses)
        for head in self.heads.values():
            for hook in (f"on_{stage}_start", f"on_{stage}_epoch_start"):
                getattr(head, hook)()

    def _end(self, stage: str, prefix: str) -> None:
        logged: dict[str, Any] = {}
        weighted = []
        for task, weight in self._seen.items():
            metric = self._losses[task]
            logged[f"{prefix}{task}_loss"] = loss = metric.compute()
            reset(metric)
            weighted.append(weight * loss)
            for name, value in _logged(self.heads[task], f"on_{stage}_epoch_end").items():
                logged[f"{prefix}{task}_{name.removeprefix(prefix)}"] = value
        if weighted:
            self.log_dict({**logged, f"{prefix}loss": torch.stack(weighted).mean()})

    # ---- files

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY]["heads"] = {
            task: pack(type(head).__name__, head._arguments, head.model, {}) for task, head in self.heads.items()
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint.get(KEY, {}).get("heads", {})
        now = {task: type(head).__name__ for task, head in self.heads.items()}
        if stored and (before := {task: each["class"] for task, each in stored.items()}) != now:
            raise ValueError(f"the checkpoint was trained with the heads {before}, and this module has {now}")
        for task, each in stored.items():
            _take_labels(self.heads[task], each["arguments"].get("labels") or ())
            self.heads[task].on_load_checkpoint({KEY: each})

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
    ) -> MultiTask:
        """Build the module as it was trained, from its checkpoint alone; in train mode, as every new module.

        Args:
            checkpoint_path: A checkpoint that a trainer wrote. It is read with ``weights_only=True``.
            map_location: Device of the module.

        Raises:
            ValueError: The file is no checkpoint of this class, or holds a head that is not there.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        stored = checkpoint[KEY]
        if stored["class"] != cls.__name__:
            raise ValueError(f"{checkpoint_path} holds a {stored['class']}, not a {cls.__name__}")
        heads = {
            task: _head_class(each["class"])(unpack({**each, "tokenizer": stored["tokenizer"]}), **each["arguments"])
            for task, each in stored["heads"].items()
        }
        module = cls(heads, **stored["arguments"])
        restore(module, checkpoint, source=str(checkpoint_path))
        return module.to(map_location)

    @override
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder for each task, named after it, that the Auto class of its head opens."""
        for task, head in self.heads.items():
            head.save_pretrained(Path(folder) / task)


class _Made:
    """In place of an Auto class: gives a model that is there already."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def from_config(self, config: Any, **options: Any) -> PreTrainedModel:
        return self.model


def _check(heads: Mapping[str, TransformerModule], weights: Mapping[str, float]) -> None:
    if not heads:
        raise ValueError("heads must name one task or more, got none")
    reserved = [task for task in heads if not task or "." in task or "/" in task or hasattr(nn.ModuleDict, task)]
    if reserved:
        raise ValueError(f"heads: {reserved} cannot name tasks: take words without . and /, not those of dictionaries")
    if unknown := weights.keys() - heads.keys():
        raise ValueError(f"weights names {sorted(unknown)}, but the tasks are {list(heads)}")
    if any(not weight > 0 for weight in weights.values()):
        raise ValueError(f"weights={dict(weights)} must all be above 0: leave a task out instead")
    sources = {
        task: os.fspath(head._source) for task, head in heads.items() if not isinstance(head._source, Architecture)
    }
    given = {task: sources.get(task, "an Architecture or a checkpoint") for task in heads}
    if sources and len(set(given.values())) > 1:
        raise ValueError(f"heads share one backbone, so they need one pretrained model, got {given}")
    if checkpointed := [task for task, head in heads.items() if head._arguments.get("gradient_checkpointing")]:
        raise ValueError(f"heads {checkpointed} have gradient_checkpointing=True: give it to MultiTask")


def _take_labels(head: TransformerModule, labels: Sequence[str]) -> None:
    """Name the labels of a head that has as many of them and no names."""
    if getattr(head, "labels", None) == [f"LABEL_{i}" for i in range(len(labels))]:
        head._arguments["labels"] = head.labels = list(labels)  # type: ignore[assignment]
        head.model.config.id2label = dict(enumerate(labels))
        head.model.config.label2id = {name: i for i, name in enumerate(labels)}


def _agree_on_labels(task: str, head: TransformerModule, data: Any) -> None:
    """Give a head without names for its labels those of its data; refuse another number or order of them."""
    labels = getattr(data, "labels", None) or []
    _take_labels(head, labels)
    names: list[str] = getattr(head, "labels", None) or []
    if labels and names and (len(names) != len(labels) or (set(names) == set(labels) and names != list(labels))):
        raise ValueError(
            f"task {task!r}: its head has the labels {names}, and its data {list(labels)}: give both the same "
            "labels=[...], in one order"
        )


def _share(heads: Mapping[str, TransformerModule]) -> tuple[PreTrainedModel, dict[str, set[int]]]:
    """Give all heads the backbone with most weights; it, and the parameters that each head uses (their ids)."""
    backbones = {task: head.model.base_model for task, head in heads.items()}
    if alone := [task for task, head in heads.items() if backbones[task] is head.model]:
        raise ValueError(f"heads {alone}: {type(backbones[alone[0]]).__name__} has no backbone apart from its head")
    shapes = {task: {n: p.shape for n, p in each.state_dict().items()} for task, each in backbones.items()}
    chosen = max(shapes, key=lambda task: len(shapes[task]))
    for task, backbone in backbones.items():
        same = type(backbone) is type(backbones[chosen]) and shapes[task].items() <= shapes[chosen].items()
        if not same:
            raise ValueError(
                f"heads {chosen!r} and {task!r} have different architectures ({type(backbones[chosen]).__name__} and "
                f"{type(backbone).__name__}, or other sizes): one backbone cannot serve both"
            )
        kept, own = backbones[chosen].state_dict(), backbone.state_dict()
        loaded = heads[task].from_checkpoint or heads[chosen].from_checkpoint
        if loaded and not all(torch.equal(value, kept[name]) for name, value in own.items()):
            raise ValueError(
                f"heads {chosen!r} and {task!r} bring different weights of the backbone, of which one would be lost: "
                "make both from one pretrained model, or load one MultiTask checkpoint"
            )
    used = {}
    for task, head in heads.items():
        names = [name for name, _ in head.named_parameters(remove_duplicate=False)]
        setattr(head.model, head.model.base_model_prefix, backbones[chosen])
        head.model.tie_weights()
        used[task] = {id(head.get_parameter(name)) for name in names}
    return backbones[chosen], used


def _logged(head: TransformerModule, hook: str) -> dict[str, Any]:
    """What a hook of a head logs."""
    values: dict[str, Any] = {}
    head.log_dict = values.update  # type: ignore[method-assign,assignment]  # it has no logger of its own
    try:
        getattr(head, hook)()
    finally:
        del head.log_dict
    return values


def _head_class(name: str) -> type[TransformerModule]:
    from lightning_ft import modules  # noqa: F401  # so that all heads are known

    known = [TransformerModule]
    for each in known:
        known += each.__subclasses__()
    found = [each for each in known if each.__name__ == name]
    if not found:
        raise ValueError(f"the checkpoint holds a head {name}, which is not there: import the module that defines it")
    return found[-1]
