"""A callback on a stranger, killed and resumed, beside the run that was never stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft.callbacks import ExactResume
from tests.callbacks.test_exact_resume import STRANGER, Kill, Killed
from tests.strangers import identical, outcome


@dataclass(frozen=True)
class Resuming:
    """Dropout, shuffling, accumulation 2, validation in mid-epoch.

    Args:
        make: A new callback.
        epochs: Of six batches.
    """

    make: Callable[[], Callback]
    epochs: int

    def callbacks(self, folder: Path) -> list[Callback]:
        return [ExactResume("1 steps", dirpath=folder), self.make()]

    def options(self, name: str, folder: Path) -> dict[str, Any]:
        accumulation = {} if name == "manual" else {"accumulate_grad_batches": 2}
        return {"val_check_interval": 3, "max_epochs": self.epochs, **accumulation, "default_root_dir": folder}

    def fit(self, name: str, folder: Path) -> Any:
        """The trainer of a run on the stranger of this name."""
        return STRANGER[name].fit(*self.callbacks(folder), **self.options(name, folder))

    def check(self, name: str, hook: str, epoch: int, batch: int, folder: Path) -> None:
        """A run that is killed in a hook and resumed ends with the same weights, optimiser and scheduler."""
        stranger, settings = STRANGER[name], self.options(name, folder)
        with pytest.raises(Killed):
            stranger.fit(*self.callbacks(folder), Kill(hook, epoch, batch), **settings)
        torch.manual_seed(99)
        trainer = stranger.trainer(self.callbacks(folder), **settings)
        trainer.fit(stranger.module(), ckpt_path=folder / "last.ckpt")
        assert identical(outcome(trainer), _uninterrupted(self, name))


@cache
def _uninterrupted(run: Resuming, name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return outcome(run.fit(name, Path(folder)))
