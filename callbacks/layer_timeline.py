"""What really trained when, and at which rate, as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.core.layers import Layers
from lightning_ft.core.timeline import Timeline
from lightning_ft.functional.plot_timeline import plot_timeline


class LayerTimeline(Callback):
    """Record which layer groups train and at which learning rate, and draw it when the fit ends.

    The rates are those that optimisers step with: after schedulers, and after what
    :class:`~lightning_ft.callbacks.DiscriminativeLR` and :class:`~lightning_ft.callbacks.GradualUnfreezing` multiply
    them by while ``step()`` runs; of a group, the highest. Reading them takes some microseconds a step. A resumed run
    goes on with the picture of the interrupted one; one that ends early draws what there is.
    ``lightning-ft plan --plot`` draws the same before any training.

    Args:
        path: The picture: ``.png``, ``.svg`` or ``.pdf``; by default ``layers.png`` in the trainer's default_root_dir.
        points: Entries kept at most, beside those at which other groups begin to train.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: ``points`` is less than 2, or the ending is unknown.
        ImportError: matplotlib is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_ft.callbacks import DiscriminativeLR
        >>> trainer = Trainer(callbacks=[DiscriminativeLR(0.9), LayerTimeline("layers.svg")], logger=False)
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, points: int = 400, layers: Layers | None = None
    ) -> None:
        if points < 2:
            raise ValueError(f"points={points} must be 2 or more")
        self.path = None if path is None else Path(path)
        self.points = points
        self.layers = layers or Layers()
        self.timeline: Timeline | None = None
        self._group_of: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []
        self._step = 0
        self._now: dict[str, float] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.timeline = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = self.layers.of(pl_module)
        if self.timeline is None or list(self.timeline.groups) != list(groups):
            self.timeline = Timeline(list(groups))
        self.timeline.clip(trainer.global_step)
        self._group_of = {id(p): name for name in groups for p in groups.parameters(name)}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step
        if not self._handles:
            # Only now, behind the hooks that other callbacks have put on the optimisers: these see what they made.
            self._handles = [optimizer.register_step_pre_hook(self._read) for optimizer in trainer.optimizers]

    def _read(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            rate = group.get("lr", 0.0)
            for name in {self._group_of[id(p)] for p in group["params"] if p.requires_grad and id(p) in self._group_of}:
                self._now[name] = max(float(rate), self._now.get(name, 0.0))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._now and trainer.global_step > self._step and self.timeline is not None:
            self.timeline.note(self._step, self._now)
            self.timeline.thin(self.points)
            self._now = {}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._draw(trainer, pl_module)
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        dry = not trainer.is_global_zero or trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry or self.timeline is None or not self.timeline.steps:
            return
        path = self.path or Path(trainer.default_root_dir) / "layers.png"
        plot_timeline(self.timeline, path, title=f"{type(module).__name__}: what trained when")
        rank_zero_info(f"LayerTimeline: {path}")

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        timeline = self.timeline
        return {} if timeline is None else {**vars(timeline), "groups": list(timeline.groups)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.timeline = Timeline(**state_dict)
