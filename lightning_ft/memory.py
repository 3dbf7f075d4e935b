"""How much memory a configuration will take on its first batch: told before any training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lightning_ft.callbacks import GradualUnfreezing
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.memory import predict_memory


class _Told(Exception):  # noqa: N818 - it is no error
    """Ends the fit before its first step."""


class _Predict(Callback):
    def __init__(self, layers: Layers | None) -> None:
        self.layers = layers
        self.reports: list[Report] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        given: dict[str, Any] = {"precision": trainer.precision, "layers": self.layers}
        self.reports.append(predict_memory(pl_module, batch, optimizer=trainer.optimizers[0], **given))
        if any(isinstance(callback, GradualUnfreezing) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self.reports.append(self._thawed(trainer, pl_module, batch, given))
        raise _Told

    def _thawed(self, trainer: Trainer, module: LightningModule, batch: Any, given: dict[str, Any]) -> Report:
        held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        flags = [p.requires_grad for p in held]
        try:
            for p in held:
                p.requires_grad_(True)
            report = predict_memory(module, batch, optimizer=trainer.optimizers[0], **given)
        finally:
            for p, flag in zip(held, flags, strict=True):
                p.requires_grad_(flag)
        return Report(f"{report.title}, once all has thawed", report.facts, report.rows)


def memory(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    layers: Layers | None = None,
) -> list[Report]:
    """Tables of the memory that training will take, by part, and of what would bring it down by how much.

    The fit is set up as it will be, with data, callbacks, optimiser and precision, up to its first batch; it ends
    there. Nothing is logged or saved, and no step is made.

    Args:
        trainer: The trainer with the callbacks that will run.
        model: The module that will train, with ``train_dataloader`` if there is no data module.
        datamodule: Its data: the first training batch is the one that counts.
        layers: Where the blocks are, if they are not found by themselves.

    Returns:
        The report of :func:`~lightning_ft.functional.memory.predict_memory`; under GradualUnfreezing a second one of
        the time when everything trains.

    Raises:
        ValueError: The module optimises by hand, or takes no step without data.
    """
    predict = _Predict(layers)
    kept = list(trainer.callbacks), trainer.loggers, trainer.num_sanity_val_steps  # type: ignore[attr-defined]
    # First, since others save or measure at the first batch.
    trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps = [predict, *kept[0]], [], 0  # type: ignore[attr-defined]
    try:
        trainer.fit(model, datamodule=datamodule)
    except _Told:
        return predict.reports
    finally:
        trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps = kept  # type: ignore[attr-defined]
    raise ValueError("memory() needs a training batch, and the training has none")
