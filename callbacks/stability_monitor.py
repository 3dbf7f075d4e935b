"""Says early, and in words, that a run is failing, and what to try."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._head_inputs import Labels, find_labels
from lightning_ft.callbacks._quadratic_pull import pending_scale
from lightning_ft.callbacks._trainer import refuse_deepspeed, training_progress
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.gradient_norms import group_squares, joined
from lightning_ft.functional.plot_stability import plot_stability
from lightning_ft.functional.stability import Finding, LabelCounts, StabilityRecord, Step, by_row, own_loss

_Waiting = tuple[int, Tensor | None, Tensor | None, Tensor | None]
"""Of a batch its step, and what is kept on the device: loss, labels, predictions."""


class StabilityMonitor(Callback):
    """Warn as soon as a run shows that it fails: the loss stays at chance, gradients of the top blocks vanish, …

    The signs are those of :class:`lightning_ft.functional.stability.StabilityRecord`: non-finite, diverging, vanishing
    gradients, at chance, constant predictions. Each is told once, in a warning with the step since which it is so, the
    numbers that show it and what to try; :attr:`findings` has them as objects, ``trainer.callback_metrics`` their
    number as ``stability/findings``.

    Loss, labels and predictions of each step are kept as they are on the device; every ``every`` they are read at
    once, and in that step's ``on_before_optimizer_step`` the gradient norms of all layer groups are taken in one fused
    pass: after accumulation, DDP's reduction and unscaling, before clipping. What is frozen has no norm, and does not
    vanish. Logs ``stability/grad_norm/<group>`` to the trainer's loggers. When the fit ends, or breaks off, a table is
    told and the norms are drawn with the signs marked, where matplotlib is installed (extra ``plot``).

    Chance is the loss of the best constant prediction: the entropy of the labels so far (ln C if classes are even; of
    the numbers of right choices, where a head scores several for each row), or for regression their variance. It is
    known where the labels are found and the loss is the cross-entropy or squared error of what the head's last linear
    layer gives; else ``chance_loss`` says it (ln C for weighted classes), or the signs that need it stay silent. The
    loss is what ``training_step`` returns.

    Under DDP rank 0 judges, by its own batches and the gradients of all, and the others stop with it. A resumed run
    goes on with the windows and the table of the interrupted one.

    Args:
        every: Time between two looks: ``"10 steps"`` (optimiser steps), ``"1 epoch"``, or a share of training.
        stop: Whether the first finding stops the fit.
        patience: By when a healthy run has left chance; up to then only the other signs speak.
        chance_loss: Loss at chance, where it is not found.
        labels: Where a batch has its labels: a key, a position, or a function of the batch; by default the key
            ``labels``, where there is one.
        path: The picture: ``.png``, ``.svg`` or ``.pdf``; by default ``stability.png`` in the trainer's
            default_root_dir.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: An argument is out of range; ``labels`` is not in the batches; FSDP1 or DeepSpeed.
        ImportError: A ``path`` is given, and matplotlib is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StabilityMonitor("20 steps", stop=True)], logger=False)

    Reference:
        Mosbach, Andriushchenko and Klakow 2021, "On the Stability of Fine-tuning BERT".
    """

    def __init__(
        self,
        every: float | str = "10 steps",
        *,
        stop: bool = False,
        patience: float | str = 0.5,
        chance_loss: float | None = None,
        labels: Labels | None = None,
        path: str | os.PathLike[str] | None = None,
        layers: Layers | None = None,
    ) -> None:
        if chance_loss is not None and not chance_loss > 0:
            raise ValueError(f"chance_loss={chance_loss!r} must be above 0: ln C for C classes")
        self.every = Duration.parse(every, "every")
        self.stop = stop
        self.patience = Duration.parse(patience, "patience")
        self.chance_loss = chance_loss
        self.labels = labels
        self.path = None if path is None else Path(path)
        self.layers = layers or Layers()
        self._members: dict[str, list[nn.Parameter]] = {}
        self._handles: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._record = StabilityRecord([])
        self._labelled = LabelCounts()
        self._agrees = False
        self._done = -1
        self._drop()

    def _drop(self) -> None:
        """Forget what waits on the device."""
        self._batch_idx = self._step = self._count = 0
        self._logits: Tensor | None = None
        self._squares: Tensor | None = None
        self._waiting: list[_Waiting] = []

    @property
    def findings(self) -> list[Finding]:
        """The signs of failure so far, in the order in which they were seen."""
        return list(self._record.findings)

    def report(self) -> Report:
        """The signs, and how the norms of the groups went."""
        return self._record.report()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        if self.path is not None and find_spec("matplotlib") is None:
            raise ImportError(f'path={str(self.path)!r} needs matplotlib: pip install "lightning-ft[plot]"')

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for duration in (self.every, self.patience):
            duration.count(training_progress(trainer, 0))  # refuses a share of an endless training
        self._drop()
        groups = self.layers.of(pl_module)
        self._members = {name: list(groups.parameters(name)) for name in groups}
        if self._record.groups != list(groups):
            self._record = StabilityRecord(list(groups))
        head = set(self._members.get("head", ()))
        self._handles = [
            child.register_forward_hook(self._saw_logits)
            for child in pl_module.modules()
            if isinstance(child, nn.Linear) and child.weight in head
        ]

    def _saw_logits(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer.training and torch.is_grad_enabled() and output.ndim == 2:
            self._logits = output.detach()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_idx, self._step, self._logits = batch_idx, trainer.global_step + 1, None

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._count = self.every.count(training_progress(trainer, self._batch_idx))
        if self._count <= self._done:
            return
        squares = group_squares(self._members, {p for group in optimizer.param_groups for p in group["params"]})
        scale = pending_scale(trainer, optimizer)
        self._squares = joined(self._squares, squares if scale is None else squares / scale.square())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss, labels = _loss(trainer, outputs), self._labels(batch)
        logits = None if self._logits is None else by_row(self._logits, labels)
        predicted = logits.argmax(-1) if logits is not None and logits.shape[-1] > 1 else None
        self._waiting.append((self._step, loss, labels, predicted))
        if self._squares is None:
            return
        self._done = self._count
        own = None if logits is None or labels is None else own_loss(logits, labels)
        self._read(own)
        self._record.add_norms(self._step, [None if s < 0 else math.sqrt(s) for s in self._squares.tolist()])
        self._squares = None
        for logger in trainer.loggers:
            norms = zip(self._record.groups, self._record.norms[-1], strict=True)
            numbers = {f"stability/grad_norm/{name}": norm for name, norm in norms if norm is not None}
            logger.log_metrics(numbers, step=trainer.global_step)
        self._judge(trainer)

    def _labels(self, batch: Any) -> Tensor | None:
        if self.labels is not None:
            found = find_labels(batch, self.labels)
        elif isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
            found = batch["labels"]
        else:
            return None
        # Those of tokens are too many to keep, and have no one chance.
        return found if found.ndim == 1 or (found.ndim == 2 and found.is_floating_point()) else None

    def _read(self, standard: Tensor | None = None) -> None:
        """Bring what waits on the device into the record: the one wait for it.

        Args:
            standard: What a standard loss would have been on the last batch, if that is to be compared.
        """
        waiting, self._waiting = self._waiting, []
        steps: dict[int, list[float]] = {}
        predictions: dict[int, Counter[int]] = {}
        loss = None
        for (step, *_), (loss, labels, predicted) in zip(waiting, _fetch(waiting), strict=True):
            steps.setdefault(step, []).extend([] if loss is None else [loss])
            predictions.setdefault(step, Counter()).update(predicted)
            self._labelled.add(labels)
        for number, losses in steps.items():
            self._record.add(Step(number, fmean(losses) if losses else None, dict(predictions[number])))
        if standard is not None and loss is not None:
            expected = float(standard)
            self._agrees = abs(expected - loss) <= 0.1 * max(expected, loss)

    def _judge(self, trainer: Trainer) -> None:
        """Look for signs, tell new ones, stop."""
        new = self._record.judge(
            trainer.global_step,
            due=self.patience.count(training_progress(trainer, self._batch_idx + 1)) > 0,
            chance=self.chance_loss or (self._labelled.chance() if self._agrees else None),
            commonest=self._labelled.commonest(),
            scaled=getattr(trainer.precision_plugin, "scaler", None) is not None,
        )
        for finding in new:
            rank_zero_warn(f"StabilityMonitor: {finding}")
        trainer.callback_metrics["stability/findings"] = torch.tensor(float(len(self._record.findings)))
        # Rank 0 decides: the others see other batches.
        if self.stop and trainer.strategy.broadcast(bool(new)):
            trainer.should_stop = True
            rank_zero_info(f"StabilityMonitor: stopped after step {trainer.global_step}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read()
        rank_zero_info(str(self.report()))
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        dry = not trainer.is_global_zero or trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry or not (self._record.steps and self._members) or (self.path is None and find_spec("matplotlib") is None):
            return
        path = self.path or Path(trainer.default_root_dir) / "stability.png"
        plot_stability(self._record, path, title=f"{type(module).__name__}: gradient norms")
        rank_zero_info(f"StabilityMonitor: {path}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._draw(trainer, pl_module)
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._members = [], {}
        self._drop()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._read()
        seen = {"done": self._done, "agrees": self._agrees}
        return {"record": self._record.state(), "labels": copy.deepcopy(vars(self._labelled)), **seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._record.load(state_dict["record"])
        vars(self._labelled).update(copy.deepcopy(state_dict["labels"]))
        self._done, self._agrees = state_dict["done"], state_dict["agrees"]


def _loss(trainer: Trainer, outputs: Any) -> Tensor | None:
    """What ``training_step`` returned, before it was divided for accumulation."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    divided = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
    return loss.detach() * divided if divided > 1 else loss.detach()


def _fetch(waiting: Sequence[_Waiting]) -> Iterator[tuple[float | None, list[Any], list[int]]]:
    """Loss, labels and predictions of each batch, in main memory after one copy."""
    tensors = [tensor for _, *those in waiting for tensor in those if tensor is not None]
    if not tensors:
        yield from ((None, [], []) for _ in waiting)
        return
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([tensor.reshape(-1).to(device, torch.float32) for tensor in tensors]).tolist()
    position = 0
    for _, *those in waiting:
        row: list[Any] = []
        for tensor in those:
            count = 0 if tensor is None else tensor.numel()
            values, position = flat[position : position + count], position + count
            row.append(values if tensor is None or tensor.is_floating_point() else [int(value) for value in values])
        loss, labels, predicted = row
        if those[1] is not None and those[1].ndim == 2:
            width = those[1].shape[1]
            labels = [labels[i : i + width] for i in range(0, len(labels), width)]
        yield loss[0] if loss else None, labels, predicted
