"""The mean of the weights at the ends of epochs, the last one included."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_ft.callbacks._trainer import training_progress
from lightning_ft.callbacks._weight_average import WeightAverage, check_averaging
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration, Progress


class CheckpointAverage(Callback):
    """Average the weights at the ends of epochs, θ̄ = (1/n) Σ θ_e, and leave the mean in the module.

    A member is taken when an epoch ends (``on_train_epoch_end``; an end that a resume skipped is made good at the next
    epoch's first batch), and when training stops within one. Lightning's ``StochasticWeightAveraging`` takes its
    members at epochs' *beginnings*: it can hold the initial weights and never holds the last ones. It changes the
    learning rate, too; this callback does not.

    While it trains, validation and checkpoints see the weights that train. In ``on_train_end`` the module gets the
    mean, which is validated once more (a last row in the logs; ``report`` has both). From then on checkpoints hold it
    under ``state_dict``, and in this callback's state the weights that trained, so that a prolonged run goes on with
    them, bit for bit. Checkpoints that other callbacks write before, such as ExactResume's, do not hold it: name a
    ``path``. The mean is kept in fp32 beside the weights (one copy of them, or ``last`` copies in main memory) and in
    the checkpoints; under FSDP2 each process averages its own part.

    Buffers are not averaged: the statistics of batch norms are those of the weights that train, and a warning says so.

    Args:
        last: How many epoch ends to average; None for all.
        start: When the first member may be taken: ``"2 epochs"`` (the end of the second counts), ``"500 steps"``, or a
            fraction of training; by default the first epoch's end.
        path: A checkpoint file to write with the mean in it, when training ends.

    Attributes:
        report: The epochs averaged, and the last validation of the weights and of their mean.

    Raises:
        ValueError: ``last`` is below 1; ``start`` is a fraction of an endless training; FSDP1, DeepSpeed, or another
            callback that averages weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CheckpointAverage(last=3)], max_epochs=10, logger=False)

    Reference:
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"; Vaswani et al. 2017,
        "Attention Is All You Need", section 6.1 (the last checkpoints).
    """

    def __init__(
        self,
        last: int | None = None,
        *,
        start: float | str | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
            raise ValueError(f"last={last!r} must be a number of epoch ends, 1 or more, or None for all of them")
        self.last = last
        self.start = None if start is None else Duration.parse(start, "start")
        self.path = None if path is None else Path(path)
        self.report: Report | None = None
        self._average: WeightAverage | None = None
        self._window: deque[list[Tensor]] = deque(maxlen=last)
        self._epochs: list[int] = []
        self._loaded: dict[str, Any] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None
        if stage == "fit":
            self._average, self._epochs, self.report = None, [], None
            self._window.clear()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_averaging(trainer, pl_module, self)
        if self._loaded is not None:
            self._adopt(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Sharded strategies restore callbacks only after `on_fit_start`.
        if self._average is None or self._loaded is not None:
            self._adopt(trainer, pl_module)
        if self.start is not None:
            self.start.count(training_progress(trainer, 0))  # refuses a fraction of an endless training

    def _adopt(self, trainer: Trainer, module: LightningModule) -> None:
        self._average = average = WeightAverage(trainer, module)
        if self._loaded is not None:
            average.load(self._loaded)
            self._epochs = list(self._loaded["epochs"])
            self._window.extend(
                [part.to("cpu", copy=True) for part in average.parts(m)] for m in self._loaded["window"]
            )
            self._loaded = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # A checkpoint between an epoch's last validation and its end: the resumed run skips that end.
        if batch_idx == 0 and trainer.current_epoch > 0:
            self._take(trainer, trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take(trainer, trainer.current_epoch + 1)

    def _take(self, trainer: Trainer, epochs: int) -> None:
        average = self._average
        assert average is not None
        if epochs in self._epochs or (self.start is not None and not self.start.count(_at(trainer, epochs))):
            return
        self._epochs.append(epochs)
        if self.last is None:
            average.update(1 / len(self._epochs))
        else:
            self._epochs = self._epochs[-self.last :]
            self._window.append([value.detach().to("cpu", copy=True) for value in average.locals()])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._average
        assert average is not None
        if not self._epochs:
            rank_zero_warn(
                f"CheckpointAverage took no member, since start={self.start} never came: the module keeps the weights "
                "that it trained"
            )
            return
        for i, member in enumerate(self._window, 1):
            device = [m.to(value.device) for m, value in zip(member, average.locals(), strict=True)]
            average.mean = None if i == 1 else average.mean
            average.update(1 / i, device)
        average.put_in()
        before = {name: float(value) for name, value in trainer.callback_metrics.items()}
        after = _validate(trainer)
        rows = [
            {"weights": which, **{n: found.get(n) for n in after}}
            for which, found in (("last", before), ("mean", after))
        ]
        self.report = Report("Checkpoint average", {"epochs averaged": self._epochs}, rows if after else ())
        rank_zero_info(str(self.report))
        if self.path is not None:
            trainer.save_checkpoint(self.path)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._average is not None and trainer.state.fn == "fit":
            self._average.put_back()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        average = self._average
        state = {"mean": None, "raw": None} if average is None else average.state()
        window = [] if average is None else [average.whole(member) for member in self._window]
        return {"epochs": list(self._epochs), "window": window, **state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def _at(trainer: Trainer, epochs: int) -> Progress:
    """Progress at an epoch's end."""
    progress = training_progress(trainer, 0)
    fractions = [] if progress.fraction is None else [progress.fraction]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        fractions.append(epochs / trainer.max_epochs)
    return Progress(trainer.global_step, float(epochs), min(1.0, max(fractions)) if fractions else None)


def _validate(trainer: Trainer) -> dict[str, float]:
    """Validate as Lightning's training loop does it.

    Returns:
        What was logged.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    if not trainer.enable_validation or loop.skip:
        return {}
    trainer.validating, first = True, connector._first_loop_iter
    known = dict(connector._callback_metrics)
    connector._callback_metrics.clear()
    loop.run()
    logged = {name: float(value) for name, value in connector._callback_metrics.items()}
    connector._callback_metrics.update({**known, **connector._callback_metrics})
    trainer.training, connector._first_loop_iter = True, first
    return logged
