"""What a fine-tuning forgets: an old task, or the language model, measured while it goes on."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.callbacks._beside import BesideValidation, Summed
from lightning_ft.callbacks._trainer import WindowTracker, training_progress
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.share_body import share_body


class ForgettingMonitor(Callback):
    """Evaluate other data than those that are trained on, at the start and every so often, and tell the change.

    In ``on_train_start`` of a new run, then in the ``on_train_batch_start`` after each stretch of ``every``, and in
    ``on_train_end``, Lightning's own validation loop runs once more over ``datamodule``'s validation data: with the
    module's ``validation_step``, precision, device and ranks. Nothing of the fit hears of it: no callback, no logger,
    no metric, no random state.

    Who is measured:

    - The module that trains, on other data that fit its head.
    - With ``old``, an old task's own module with its head, on the body that trains now
      (:func:`lightning_ft.functional.share_body`): forgetting trec while banking trains. A masked language model on a
      general corpus is one: ``old=MaskedLM(folder)`` with a folder that has the pretrained head.

    Logs ``forgetting/<name>`` and ``forgetting/<name>_change`` (since the start) to the trainer's loggers; they are in
    ``trainer.callback_metrics`` from then on, for ``EarlyStopping`` and ``ModelCheckpoint``. A resumed run goes on with
    the table of the interrupted one, and with its start. Use several for several tasks, each with a name.

    Args:
        datamodule: The other data; its validation data are read.
        metric: Name of what ``validation_step`` (or a hook of the validation epoch) logs; or a function of (module,
            batch) that gives a sum and how many things it is a sum over, called in place of ``validation_step``.
        every: Time between two evaluations: ``"500 steps"`` (optimiser steps), ``"1 epoch"``, or a share of training.
        old: The old task's module, which this callback takes over; in YAML by ``class_path:
            lightning_ft.modules.load_checkpoint`` with ``init_args: {path: ...}``, or by its class.
        name: What it is called in logs; by default the class of ``datamodule``.
        batches: Validation batches to look at, on each rank; all by default.
        layers: Where the blocks and the head are, if they are not found by themselves; of both modules.

    Raises:
        ValueError: An argument is out of range; the metric is not logged; the bodies differ; sharded weights with
            ``old``.

    Example:
        >>> from lightning_ft.data import ClassificationData
        >>> old_task = ClassificationData("csv", data_files={"validation": "trec.csv"})  # doctest: +SKIP
        >>> ForgettingMonitor(old_task, "val_accuracy", every="100 steps", name="trec")  # doctest: +SKIP

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks" (the measure: performance on
        the old task while the new one is learnt).
    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        metric: str | Summed = "val_loss",
        *,
        every: float | str = "1 epoch",
        old: LightningModule | None = None,
        name: str | None = None,
        batches: int | None = None,
        layers: Layers | None = None,
    ) -> None:
        if batches is not None and batches < 1:
            raise ValueError(f"batches={batches!r} must be 1 or more")
        if not (isinstance(metric, str) or callable(metric)):
            raise ValueError(f"metric={metric!r} must be the name of a logged value, or a function of (module, batch)")
        self.datamodule = datamodule
        self.metric = metric
        self.every = Duration.parse(every, "every")
        self.old = old
        self.name = name or type(datamodule).__name__
        self.batches = batches
        self.layers = layers or Layers()
        self._beside: BesideValidation | None = None
        self._window = WindowTracker()
        self._reset()

    def _reset(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._done = 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def report(self) -> Report:
        """Each evaluation of the last fit."""
        if not self._rows:
            return Report(f"Forgetting of {self.name}")
        first, last = self._rows[0]["value"], self._rows[-1]["value"]
        metric = self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")
        facts = {"metric": metric, "at the start": first, "at the end": last, "change": last - first}
        return Report(f"Forgetting of {self.name}", facts, [dict(row) for row in self._rows])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.every.count(training_progress(trainer, 0))  # refuses a share of an endless training
        module = pl_module
        if self.old is not None:
            with torch.device("cpu"):
                self.old.configure_model()
            module = self.old.to(pl_module.device)
            share_body(module, pl_module, self.layers)
        self._beside = BesideValidation(trainer, module, self.datamodule, self.batches)
        self._beside.prepare()
        self._window = WindowTracker()
        # A run may be resumed from before the last evaluation.
        self._rows = [row for row in self._rows if row["step"] <= trainer.global_step]
        if not self._rows:
            self._measure(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._window.begins(trainer, batch_idx):
            due = self.every.count(training_progress(trainer, batch_idx))
            if due > self._done:
                self._measure(trainer)
            self._done = due

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer)
        rank_zero_info(str(self.report()))

    def _measure(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self._rows and self._rows[-1]["step"] == step:
            return
        value = self._evaluate()
        change = value - self._rows[0]["value"] if self._rows else 0.0
        self._rows.append({"step": step, "value": value, "change": change})
        rank_zero_info(f"ForgettingMonitor: {self.name} at step {step}: {value:.4g} ({change:+.4g} since the start)")
        numbers = {f"forgetting/{self.name}": value, f"forgetting/{self.name}_change": change}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        trainer.callback_metrics.update({key: torch.tensor(number) for key, number in numbers.items()})

    def _evaluate(self) -> float:
        assert self._beside is not None
        if not isinstance(self.metric, str):
            return self._beside.mean(self.metric)
        logged = self._beside.logged()
        if self.metric not in logged:
            raise ValueError(
                f"metric={self.metric!r} was not logged for {self.name}; logged were: {', '.join(logged) or 'none'}. "
                "Name one of these, or give a function of (module, batch)"
            )
        return logged[self.metric]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._beside is not None:
            self._beside.release()
            self._beside = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self._rows], "done": self._done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._done = state_dict["done"]
