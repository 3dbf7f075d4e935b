"""A validation beside those that a fit runs itself: on other data, of another module, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_ft.core.undisturbed import eval_mode, same_randomness

Summed = Callable[[Any, Any], tuple[Any, Any]]
"""``(module, batch)`` to a sum over what the batch holds, and how many things it is a sum over."""

_UNWRITTEN = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")
"""Where the step is defined that a module has which overrides none, in either package."""
_EPOCH_HOOKS = ("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_end")


_ABSENT = object()


class BesideValidation:
    """Lightning's own validation loop once more, in the middle of a fit.

    It has the module's steps and hooks, ``self.log``, precision, device, ranks and samplers; but no callback, no logger
    and no progress bar hears of it, and metrics, modes, random states and the fit's own loop are as before. Under DDP
    the ranks share the batches; where rows do not divide some are counted twice, as in each validation of Lightning.

    Args:
        trainer: The trainer, in a fit.
        module: What is evaluated: the module that trains, or another one.
        datamodule: Other data, whose ``val_dataloader`` is read; None for the fit's own.
        batches: How many batches at most; of other data, all by default.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        datamodule: LightningDataModule | None = None,
        batches: int | None = None,
    ) -> None:
        self.trainer: Any = trainer
        self.module: Any = module
        self.datamodule: Any = datamodule
        self.batches = batches
        own = self.trainer.fit_loop.epoch_loop.val_loop
        # By the loop's own class, since there are two packages of it.
        self._loop = type(own)(trainer, own._trainer_fn, own._stage, verbose=False, inference_mode=False)
        if datamodule is None:
            self._loop._data_source = own._data_source
            self._loop._combined_loader, self._loop._max_batches = own._combined_loader, own._max_batches
        self._source = type(own._data_source)

    def prepare(self) -> None:
        """Make other data ready. Call on all ranks."""
        if self.datamodule is None:
            return
        self.datamodule.trainer = self.trainer
        if (self.trainer.local_rank if self.datamodule.prepare_data_per_node else self.trainer.global_rank) == 0:
            self.datamodule.prepare_data()
        self.trainer.strategy.barrier("prepare_data of other data")
        self.datamodule.setup("validate")
        # The loader itself: a data module of the other package is no data module to this one.
        self._loop._data_source = self._source(self.datamodule.val_dataloader(), "")

    def logged(self) -> dict[str, float]:
        """What the module's ``validation_step`` logs, by name; averaged over ranks that did not reduce it.

        Raises:
            ValueError: The module has no ``validation_step``.
        """
        if type(self.module).validation_step.__module__ in _UNWRITTEN:
            raise ValueError(
                f"{type(self.module).__name__} has no validation_step, so nothing measures it: write one, or give a "
                "function of (module, batch) as metric"
            )
        with self._beside():
            self._loop.run()
            device = self.trainer.strategy.root_device
            found = {n: torch.as_tensor(value, device=device) for n, value in self.trainer.callback_metrics.items()}
            return {name: float(self.trainer.strategy.reduce(v, reduce_op="mean")) for name, v in sorted(found.items())}

    def mean(self, summed: Summed) -> float:
        """The mean of what a function finds in each batch, over all ranks.

        Raises:
            ValueError: It has seen nothing.
        """
        totals: list[Tensor] = []

        def validation_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pair = [torch.as_tensor(part).detach() for part in summed(self.module, batch)]
            totals.append(torch.stack([part.cpu().double() for part in pair]))

        def hook() -> None:
            pass

        hooks: dict[str, Any] = dict.fromkeys(_EPOCH_HOOKS, hook)
        with self._beside(), _shadowed(self.module, {**hooks, "validation_step": validation_step}):
            self._loop.run()
            total = torch.stack(totals).sum(0) if totals else torch.zeros(2, dtype=torch.float64)
            device = self.trainer.strategy.root_device
            # Not every accelerator has float64.
            total = total.to(device, torch.float32 if device.type == "mps" else torch.float64)
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
        if not float(total[1]) > 0:
            raise ValueError("metric counted nothing in the validation data: are there rows, and does it count them?")
        return float(total[0] / total[1])

    def release(self) -> None:
        """Let go of other data's loaders. (Those of the fit are its own loop's.)"""
        if self.datamodule is not None:
            self._loop.teardown()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        trainer, module = self.trainer, self.module
        connector, strategy, epoch_loop = trainer._logger_connector, trainer.strategy, trainer.fit_loop.epoch_loop
        limit = trainer.limit_val_batches
        if self.datamodule is not None and not trainer.fast_dev_run:
            limit = 1.0 if self.batches is None else self.batches
        with (
            same_randomness(),
            eval_mode(module.modules()),
            _put(trainer, callbacks=[], _loggers=[], limit_val_batches=limit, _last_val_time=None),
            _put(connector, **dict.fromkeys(("_current_fx", "_first_loop_iter"))),
            _put(connector, _callback_metrics={}, _logged_metrics={}, _progress_bar_metrics={}),
            _put(epoch_loop, val_loop=self._loop),
            _put(trainer.state, stage=self._loop._stage),
            self._in_place_of(strategy),
            self._fed_by(),
        ):
            yield

    @contextmanager
    def _in_place_of(self, strategy: Any) -> Iterator[None]:
        """Another module in place of the one that trains."""
        if self.module is strategy.lightning_module:
            yield
            return
        with _put(strategy, _lightning_module=self.module, _model=None):
            self.module.trainer = self.trainer
            try:
                yield
            finally:
                self.module.trainer = None

    @contextmanager
    def _fed_by(self) -> Iterator[None]:
        """Batches on their way to the device pass the hooks of their own data module."""
        connector, datamodule = self.trainer._data_connector, self.datamodule or self.trainer.datamodule
        package = type(self._loop).__module__.split(".")[0]
        if not any(kind.__module__.startswith(f"{package}.") for kind in type(datamodule).__mro__):
            datamodule = None
        selector = type(connector._datahook_selector)(self.module, datamodule)
        with _put(connector, _datahook_selector=selector), _put(self.trainer, datamodule=datamodule):
            yield


@contextmanager
def _put(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes with other values for a while."""
    before = {name: getattr(owner, name, _ABSENT) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextmanager
def _shadowed(module: Any, functions: dict[str, Any]) -> Iterator[None]:
    """Methods of one instance replaced for a while."""
    before = {name: vars(module)[name] for name in functions if name in vars(module)}
    vars(module).update(functions)
    try:
        yield
    finally:
        for name in functions:
            vars(module).pop(name)
        vars(module).update(before)
