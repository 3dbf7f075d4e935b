"""Keep a model in agreement with what it said of the same example in earlier epochs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_ft.callbacks._trainer import training_progress
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.prefix_rows import rows_of
from lightning_ft.functional.snapshots import Answer, logits_of
from lightning_ft.functional.temporal_ensembling import (
    PredictionAverages,
    consistency,
    pack_keys,
    ramp_up,
    squash,
    unpack_keys,
)

Rows = int | str | Callable[[Any], Any]


class TemporalEnsembling(Callback):
    """Add w(t) · mean (p − p̃)² to the module's loss, where p̃ is the example's own prediction over earlier epochs.

    p = softmax(z) of the logits z of a row, p̃ = Z / (1 − aᵗ), Z ← aZ + (1 − a) p once an epoch, with t the epochs in
    which the row was seen, and w(t) = w_max exp(−5 (1 − min(1, t/T))²). The mean is over the rows and labels of the
    batch; rows that have no target yet, all of them in the first epoch, add nothing. What a row is told is a smoothed
    answer of many networks: it helps with few labels, and against wrong ones. Rows without a label (−100, which a
    cross-entropy ignores) are taught by this term alone.

    While the fit runs, ``training_step`` of the module is stood in for: the logits are those that the first call of
    ``forward`` in it returned (its dropout and its graph), and the term is added to the loss that the step returns, so
    that accumulation, precision and clipping treat both alike; under manual optimisation, to the first loss that the
    step gives to ``manual_backward``. Z is updated in ``on_train_epoch_end``, from the rows of all processes, and
    travels with the epoch's unfinished predictions in the checkpoint: a resumed run goes on exactly. Telling the rows
    of a batch apart costs one wait for the device a step.

    Logs ``consistency_loss``, w(t) included, where the trainer has a logger.

    Args:
        weight: w_max.
        ramp: T, the time over which the weight rises: a fraction of training, ``"500 steps"`` or ``"10 epochs"``.
        momentum: a; 0.6 in the paper.
        rows: What tells rows apart in every epoch: the key or position of a column of row numbers in a batch, or a
            function that takes the batch and returns them. By default the column ``row``, which batches of
            lightning_ft have, else the content of the token ids (equal texts are then one row).
        answer: What the logits mean: ``"single_label"`` (softmax), ``"multi_label"`` (sigmoid) or ``"regression"``.
        through: Path of the module inside whose ``forward`` returns the logits, ``(batch, labels)``; by default the
            LightningModule itself.

    Raises:
        ValueError: An argument is out of range; rows cannot be told apart; a step never called ``forward``, or its
            logits are not one vector a row.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TemporalEnsembling(10.0, "5 epochs")], max_epochs=20, logger=False)

    Reference:
        Laine and Aila 2017, "Temporal Ensembling for Semi-Supervised Learning".
    """

    def __init__(
        self,
        weight: float,
        ramp: float | str = 0.3,
        *,
        momentum: float = 0.6,
        rows: Rows | None = None,
        answer: Answer = "single_label",
        through: str = "",
    ) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight={weight!r} must be 0 or more")
        if answer not in ("single_label", "multi_label", "regression"):
            raise ValueError(f'answer={answer!r} must be "single_label", "multi_label" or "regression"')
        self.weight = weight
        self.ramp = Duration.parse(ramp, "ramp")
        self.momentum = momentum
        self.rows = rows
        self.answer: Answer = answer
        self.through = through
        self._averages = PredictionAverages(momentum)
        self._pending: list[_Seen] = []
        self._now = 0.0
        self._order = 0
        self._step: _Step | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._averages, self._pending = PredictionAverages(self.momentum), []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ramp.share(training_progress(trainer, 0))  # refuses a fraction of an endless training
        self._step = _Step(trainer, pl_module, pl_module.get_submodule(self.through), self._term)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._fold(trainer)  # of an epoch whose end a resume skipped
        self._now = self.weight * ramp_up(self.ramp.share(training_progress(trainer, batch_idx)))
        self._order = batch_idx * trainer.world_size + trainer.global_rank

    def _term(self, batch: Any, logits: Tensor) -> Tensor | None:
        keys = row_keys(batch, self.rows)
        if logits.ndim > 2 or len(logits) != len(keys):
            raise ValueError(
                f"the logits have the shape {tuple(logits.shape)} for {len(keys)} rows: TemporalEnsembling averages "
                "one vector of logits a row. Name the module that returns them, through=..., or the rows, rows=..."
            )
        now = squash(logits, self.answer)
        targets, known = self._averages.targets(keys)
        self._pending.append(_Seen(self._order, keys, now.detach()))
        if not self._now or not bool(known.any()):
            return None
        return self._now * consistency(now, targets.to(now.device), known.to(now.device))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fold(trainer)

    def _fold(self, trainer: Trainer) -> None:
        """Update the averages from the epoch's predictions; a row that came twice counts once, as it came last."""
        latest: dict[bytes, Tensor] = {}
        for seen in sorted(_gathered(trainer, self._pending), key=lambda seen: seen.order):
            latest.update(zip(seen.keys, seen.predictions.cpu(), strict=True))
        if latest:
            self._averages.update(list(latest), torch.stack(list(latest.values())))
        self._pending = []

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Rank 0 alone writes: what the other ranks have seen in this epoch would be lost.
        seen = _gathered(trainer, self._pending)
        checkpoint["callbacks"][self.state_key]["pending"] = [one.packed() for one in seen]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self._averages.state_dict(), "pending": [seen.packed() for seen in self._pending]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._averages.load_state_dict(state_dict)
        self._pending = [_Seen.unpacked(packed) for packed in state_dict["pending"]]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank:
            self._pending = []  # rank 0 has those of all

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._step is not None:
            self._step.remove()
            self._step = None


class _Seen(NamedTuple):
    """Predictions for the rows of one batch; ``order`` is that of all batches of all ranks in the epoch."""

    order: int
    keys: list[bytes]
    predictions: Tensor

    def packed(self) -> dict[str, Any]:
        return {"order": self.order, "keys": pack_keys(self.keys), "predictions": self.predictions.cpu()}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> _Seen:
        return cls(packed["order"], unpack_keys(packed["keys"]), packed["predictions"])


class _Step:
    """Stands in for a module's ``training_step`` and ``manual_backward``, and adds a term to the loss."""

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        through: nn.Module,
        term: Callable[[Any, Tensor], Tensor | None],
    ) -> None:
        self._module = module
        self._logits: Tensor | None = None
        self._listens = False
        self._handle = through.register_forward_hook(self._hear)
        step, backward = module.training_step, module.manual_backward
        batch: list[Any] = []

        def added() -> Tensor | None:
            if self._logits is None:
                raise ValueError(
                    "TemporalEnsembling: training_step never called forward of the module that returns the logits: "
                    "name it, through=..."
                )
            logits, self._logits = self._logits, None
            value = term(batch[0], logits)
            if value is not None and trainer.loggers:
                module.log("consistency_loss", value.detach(), batch_size=len(logits))
            return value

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            batch[:] = [args[0] if args else kwargs["batch"]]
            self._logits, self._listens = None, True
            try:
                output = step(*args, **kwargs)
                return _plus(output, added()) if module.automatic_optimization and output is not None else output
            finally:
                self._logits, self._listens = None, False
                batch.clear()

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            value = added() if self._logits is not None else None
            backward(loss if value is None else loss + value, *args, **kwargs)

        self._attributes: dict[str, Any] = {"training_step": training_step, "manual_backward": manual_backward}
        self._before = {name: vars(module)[name] for name in self._attributes if name in vars(module)}
        vars(module).update(self._attributes)

    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:
        # The first call: a DDP wrapper calls the module around its own step, and that call returns the loss.
        if self._listens:
            self._logits, self._listens = logits_of(output), False

    def remove(self) -> None:
        """Leave the module as it was."""
        self._handle.remove()
        for name in self._attributes:
            vars(self._module).pop(name, None)
        vars(self._module).update(self._before)


def _plus(output: Any, value: Tensor | None) -> Any:
    if value is None:
        return output
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + value}
    return output + value


def row_keys(batch: Any, rows: Rows | None) -> list[bytes]:
    """What tells the rows of a batch apart, the same in every epoch.

    Raises:
        ValueError: Nothing does.
    """
    if rows is None and isinstance(batch, Mapping) and "row" in batch:
        rows = "row"
    if rows is not None:
        try:
            found = rows(batch) if callable(rows) else batch[rows]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"rows={rows!r} is not in the batches, which are {type(batch).__name__}s") from error
        numbers = found.tolist() if isinstance(found, Tensor) else list(found)
        return [int(number).to_bytes(8, "big", signed=True) for number in numbers]
    named = batch if isinstance(batch, Mapping) else dict(enumerate(tree_leaves(batch)))
    tables = {
        str(n): t for n, t in named.items() if isinstance(t, Tensor) and t.ndim == 2 and not t.is_floating_point()
    }
    if not tables:
        raise ValueError(
            "the batches have no column of row numbers and no token ids, so rows cannot be told apart: give rows=, the "
            "key or position of row numbers in a batch, or a function that takes the batch and returns them"
        )
    ids = next((t for n, t in tables.items() if n == "input_ids"), next(iter(tables.values())))
    names = ("input_ids", "attention_mask", "token_type_ids")
    columns = {n: t for n, t in tables.items() if t.shape == ids.shape and (n in names or t is ids)}
    return [row.key for row in rows_of(columns)]


def _gathered(trainer: Trainer, pending: list[_Seen]) -> list[_Seen]:
    if trainer.world_size == 1:
        return pending
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, [seen.packed() for seen in pending])
    return [_Seen.unpacked(packed) for part in parts for packed in part]
