"""Trained adapters from files, added to a module once."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from lightning_ft.callbacks._altering import Altering
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.functional.adapter_files import AdapterFile, check_base, fill_adapter


class FrozenAdapters:
    """Adds adapters when the module is built, and loads their weights, unless that was done before.

    Checkpoints hold the adapters' weights, so that their files are needed only to start.

    Args:
        layers: Where the blocks are, if they are not found by themselves.
    """

    def __init__(self, layers: Layers | None) -> None:
        self.layers = layers
        self._altering: Altering | None = None

    def setup(self, trainer: Trainer, module: LightningModule, files: Sequence[AdapterFile], *, use: bool) -> None:
        """Call in ``setup``, at any stage.

        Args:
            trainer: The trainer.
            module: The module.
            files: The adapters.
            use: Whether they are put to work, one on the other.
        """
        adapters = [file.spec.plain() for file in files]
        settings = {"adapters": adapters, "use": use, "layers": plain_layers(self.layers)}
        altering = self._altering = Altering("frozen_adapters", settings)

        def fill() -> None:
            for file in files if altering.report is not None else ():
                check_base(module, file, self.layers)
                fill_adapter(module, file, layers=self.layers)

        altering.setup(trainer, module, fill)

    def release(self) -> None:
        """Call in ``teardown`` and ``on_exception``."""
        if self._altering is not None:
            self._altering.release()
