"""Resume a run in the middle of an epoch so that it ends as if it had never stopped."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_ft.callbacks._trainer import WindowTracker, run_seed, training_progress
from lightning_ft.core.files import replace
from lightning_ft.core.schedule import Duration


class ExactResume(Callback):
    """Save so that the resumed run equals the uninterrupted one bit for bit.

    Two things are needed beside Lightning's own checkpoint. Randomness becomes a function of (seed, epoch, batch,
    rank): Python's, NumPy's and torch's generators are seeded in each ``on_train_batch_start``, since a saved
    generator state does not survive the data loader's own draws. And the state is saved in
    ``on_train_batch_start``, between two optimiser steps, when the validation, the schedulers and the hooks of the
    batch before are done; a checkpoint taken at a batch's end loses a validation that was due, or gradients that
    were accumulated. The file, ``last.ckpt``, is written at the first batch and replaced by one rename; the last one is
    written when training ends. ``fast_dev_run`` writes none.

    The data loader must say where it stands (``state_dict``, ``load_state_dict``):
    :class:`lightning_ft.data.ResumableDataLoader` or torchdata's ``StatefulDataLoader``. Sums kept over an epoch by
    metrics are not part of a checkpoint. Put this callback first, so that others draw from the seeded generators.

    Args:
        every: Time between two saves: ``"500 steps"`` (optimiser steps), ``"1 epoch"``, or a fraction of training.
        dirpath: Folder of ``last.ckpt``; ``checkpoints`` in the trainer's ``default_root_dir`` by default. The next run
            of the same folder replaces the file: give each run a folder of its own, as the command line does.
        seed: Base seed; that of ``seed_everything`` by default, else 0. A resumed run keeps the seed of its checkpoint.

    Raises:
        ValueError: A training data loader cannot say where it stands, or ModelCheckpoint(save_last=True) would write
            the same file.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume(every="200 steps")], logger=False)
    """

    def __init__(
        self,
        every: float | str = "500 steps",
        *,
        dirpath: str | os.PathLike[str] | None = None,
        seed: int | None = None,
    ) -> None:
        self.every = Duration.parse(every, "every")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.seed = seed
        self._window = WindowTracker()
        self._saves: int | None = None

    def path(self, trainer: Trainer) -> Path:
        """The checkpoint file that this trainer writes."""
        return (self.dirpath or Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"

    def save_next(self) -> None:
        """Save before the next batch that begins between two optimiser steps, whatever ``every`` says."""
        self._saves = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.every.count(training_progress(trainer, 0))  # refuses a fraction of an endless training
        self.seed = run_seed(self.seed)
        self._window = WindowTracker()
        self._saves = None
        folder = self.path(trainer).parent
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "save_last", None) and Path(callback.dirpath or ".").resolve() == folder.resolve():
                raise ValueError(
                    f"{type(callback).__name__}(save_last=True) and ExactResume would both write {self.path(trainer)}, "
                    "and only the one of ExactResume resumes exactly: remove save_last"
                )
        if trainer.is_global_zero:
            for leftover in folder.glob(".*last.ckpt*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for loader in tree_leaves(trainer.train_dataloader):
            if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
                raise ValueError(
                    f"ExactResume cannot resume a {type(loader).__name__}: it does not say which batches it has "
                    "delivered (state_dict, load_state_dict). Use lightning_ft.data.ResumableDataLoader or torchdata's "
                    "StatefulDataLoader, or remove ExactResume (on the command line: --exact_resume false) and resume "
                    "from whole epochs only"
                )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._window.begins(trainer, batch_idx):
            due = self.every.count(training_progress(trainer, batch_idx))
            # The first save is at once: a run that stops early is found by its own checkpoint, not by an older run's.
            if self._saves is None or due > self._saves:
                self._save(trainer)
            self._saves = due
        assert self.seed is not None
        _seed_generators(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        target = self.path(trainer)
        temporary = target.with_name(f".{target.name}.tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            replace(temporary, target)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning skips ReduceLROnPlateau at the end of the epoch in which a run resumed, since metrics are not in a
        # checkpoint. Those of a validation that ran after the resume are there all the same.
        loop = trainer.fit_loop
        monitors = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        if not (loop.restarting and monitors):
            return
        if missing := monitors - trainer.callback_metrics.keys():
            rank_zero_warn(
                f"ExactResume: {missing} was not logged since the resume, so ReduceLROnPlateau is left out at the end "
                "of this epoch and the run is no longer exact: validate at the end of each epoch"
            )
        else:
            loop._restarting = False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]


def _seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and torch's generators from a key of integers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "big")
    random.seed(seed)
    torch.manual_seed(seed >> 1)
    import numpy as np

    np.random.seed(seed & 0xFFFFFFFF)
