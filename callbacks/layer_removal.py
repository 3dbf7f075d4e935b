"""Removal of whole blocks before fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_ft.callbacks._surgery import when_built
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.layer_removal import layers_removed, parse_drop, remove_layers


class LayerRemoval(Callback):
    """Take whole blocks out of the model before training starts: a proportional gain in time and memory.

    What :func:`lightning_ft.functional.layer_removal.remove_layers` does, in ``setup("fit")``, or at the end of
    ``configure_model`` for a model that is built or loaded late: before a checkpoint is restored, before the model is
    wrapped and before optimisers are made. A model from which just these blocks were taken already, in an earlier fit
    or before it was saved, stays as it is: its configuration remembers. To take more away from it, ask for others,
    or call the function. In validation, test and prediction a model is shortened only to load a checkpoint into it.

    Put this callback before those that look at the model's weights in their own ``setup`` (weight averaging).

    Args:
        drop: ``"top:2"`` (the best on most tasks), ``"bottom:1"``, ``"alternate"``, ``"symmetric"``, or indices from 0;
            see :func:`lightning_ft.functional.layer_removal.layers_to_drop`.
        stack: Which stack, where there are several: ``"encoder"``, ``"decoder"``, the path of its list, or ``"all"``.
        layers: Where the blocks are, if they are not found by themselves.

    Attributes:
        report: What was removed in this run; None if nothing was.

    Raises:
        ValueError: Whatever :func:`lightning_ft.functional.layer_removal.remove_layers` refuses; a callback keeps a
            copy of the whole model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LayerRemoval("top:2")], logger=False)

    Reference:
        Sajjad, Dalvi, Durrani and Nakov 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models".
    """

    def __init__(self, drop: str | Sequence[int], *, stack: str | None = None, layers: Layers | None = None) -> None:
        if isinstance(drop, str):
            parse_drop(drop)  # refuses unknown words now
        self.drop = drop
        self.stack = stack
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._forget: list[Callable[[], None]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.report = None
        if stage == "fit":
            self._forget.append(when_built(pl_module, lambda: self._remove(trainer, pl_module)))
        else:
            # The model may be full, and its checkpoint's is not; without a checkpoint, what was given is evaluated.
            def shorten(*_: Any) -> None:
                self._remove(trainer, pl_module)

            handle = pl_module.register_load_state_dict_pre_hook(shorten)  # type: ignore[no-untyped-call]
            self._forget.append(handle.remove)

    def _remove(self, trainer: Trainer, module: LightningModule) -> None:
        if layers_removed(module, self.drop, stack=self.stack, layers=self.layers):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if any(isinstance(value, AveragedModel) for value in vars(callback).values()):
                raise ValueError(
                    f"{type(callback).__name__} has copied the whole model already: put LayerRemoval before it in the "
                    "list of callbacks, or call remove_layers where the module builds its model"
                )
        self.report = remove_layers(module, self.drop, stack=self.stack, layers=self.layers)
        rank_zero_info(f"LayerRemoval: {self.report}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for forget in self._forget:
            forget()
        self._forget.clear()
